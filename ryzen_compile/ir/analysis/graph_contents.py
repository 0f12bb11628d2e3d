"""Which element types and ops occur in a model, without type inference."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute_or_none
from ryzen_compile.ir.analysis.element_types import DTYPE_ATTRIBUTES
from ryzen_compile.ir.traversal import all_graphs
from ryzen_compile.spec.legalization_pass import GraphContents


def graph_contents(model: ir.Model) -> GraphContents:
    """Return the element types that inputs, constants, declared tensors and attributes of `model` have, and its ops.

    A tensor without a declared type has a type that one of these has too, or the default type of an op, such as float32.
    """
    dtypes, ops = set[ir.DataType](), set[str]()
    for graph in all_graphs(model):
        dtypes.update(value.dtype for value in (*graph.inputs, *graph.initializers.values()) if value.dtype is not None)
        for node in graph:
            ops.add(f"{'' if node.domain == 'ai.onnx' else node.domain}::{node.op_type}")
            dtypes.update(_node_dtypes(node))
    names = {str(dtype.numpy()) if dtype != ir.DataType.STRING else "string" for dtype in dtypes - {ir.DataType.UNDEFINED}}
    return GraphContents(element_types=tuple(sorted(names)), ops=tuple(sorted(ops)))


def _node_dtypes(node: ir.Node) -> Iterator[ir.DataType]:
    yield from (value.dtype for value in node.outputs if value.dtype is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
            yield attribute.value.dtype
    name = DTYPE_ATTRIBUTES.get(node.op_type)
    if name is not None and node.domain in ("", "ai.onnx") and (dtype := int_attribute_or_none(node, name, 0)):
        yield ir.DataType(dtype)
