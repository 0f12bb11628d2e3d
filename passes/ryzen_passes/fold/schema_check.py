"""Check nodes against the ONNX op schema; only nodes that match it are rewritten."""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir


@functools.cache
def _schema(op: str, opset: int) -> tuple[range, range, dict[str, str], frozenset[str]] | None:
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
    return (
        range(schema.min_input, schema.max_input + 1),
        range(schema.min_output, schema.max_output + 1),
        {name: attribute.type.name for name, attribute in schema.attributes.items()},  # type: ignore[attr-defined]
        frozenset(name for name, attribute in schema.attributes.items() if attribute.required),
    )


def matches_schema(node: ir.Node, opset: int) -> bool:
    """Return whether `opset` has the op of `node`, and the inputs, outputs and attributes of `node` match its schema."""
    schema = _schema(node.op_type, opset)
    if schema is None:
        return False
    inputs, outputs, attributes, required = schema
    if len(node.inputs) not in inputs or len(node.outputs) not in outputs:
        return False
    if None in node.inputs[: inputs.start]:
        return False
    node_attributes = node.attributes
    if not all(attributes.get(name) == attribute.type.name for name, attribute in node_attributes.items()):
        return False
    return not required or all(name in node_attributes for name in required)
