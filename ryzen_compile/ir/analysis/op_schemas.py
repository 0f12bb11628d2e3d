"""Op schemas of the ONNX domains, and the check of a node against the schema of its op."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

_DOMAINS = {"": "", "ai.onnx": "", "ai.onnx.ml": "ai.onnx.ml"}
"""The domains whose schemas the `onnx` package defines, by the names that models give them."""


@dataclass(frozen=True)
class OpSchema:
    """The syntax of one version of an op."""

    inputs: range
    """The allowed numbers of inputs."""
    required_inputs: frozenset[int]
    """The positions of the inputs that must not be absent: those of a Loop may, although others follow them."""
    outputs: range
    """The allowed numbers of outputs."""
    attributes: Mapping[str, str]
    """The name of the ONNX attribute type of each attribute."""
    required: frozenset[str]
    """The attributes without a default that a node must have."""


@functools.cache
def op_schema(domain: str, op_type: str, opset: int) -> OpSchema | None:
    """Return the schema of an op in version `opset` of its domain, or None if ONNX defines none."""
    if domain not in _DOMAINS:
        return None
    try:
        schema = onnx.defs.get_schema(op_type, opset, _DOMAINS[domain])
    except onnx.defs.SchemaError:
        return None
    return OpSchema(
        inputs=range(schema.min_input, schema.max_input + 1),
        required_inputs=frozenset(
            index
            for index, parameter in enumerate(schema.inputs)
            if parameter.option == onnx.defs.OpSchema.FormalParameterOption.Single
        ),
        outputs=range(schema.min_output, schema.max_output + 1),
        attributes={name: attribute.type.name for name, attribute in schema.attributes.items()},  # type: ignore[attr-defined]
        required=frozenset(name for name, attribute in schema.attributes.items() if attribute.required),
    )


def find_violation(node: ir.Node, schema: OpSchema) -> str | None:
    """Return how `node` violates the schema of its op in a few words, or None if it does not."""
    inputs, outputs, attributes = node.inputs, node.outputs, node.attributes
    if len(inputs) not in schema.inputs:
        return f"has {len(inputs)} inputs (allowed: {_format(schema.inputs)})"
    if len(outputs) not in schema.outputs:
        return f"has {len(outputs)} outputs (allowed: {_format(schema.outputs)})"
    for index, value in enumerate(inputs):
        if value is None and index in schema.required_inputs:
            return f"lacks input {index}, which is required"
    for name, attribute in attributes.items():
        expected = schema.attributes.get(name)
        if expected is None:
            return f"has the unknown attribute `{name}`"
        if expected != attribute.type.name:
            return f"has attribute `{name}` of type {attribute.type.name} (must be {expected})"
    for name in schema.required:
        if name not in attributes:
            return f"lacks attribute `{name}`, which is required"
    return None


def _format(counts: range) -> str:
    if len(counts) == 1:
        return str(counts.start)
    return f"{counts.start} or more" if counts.stop > 1 << 30 else f"{counts.start} to {counts.stop - 1}"
