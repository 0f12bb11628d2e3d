"""Widening: every half-precision tensor of a model becomes fp32, which holds all of its values."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.analysis.element_types import is_standard_op
from ryzen_compile.ir.lazy_cast import LazyCastTensor

_DTYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_datatype", "output_dtype", "stash_type", "softmax_precision"})
"""The attributes by which ONNX's own ops name an element type."""


def upcast_to_fp32(model: ir.Model, half_types: Collection[ir.DataType]) -> list[ir.Node]:
    """Make every tensor of the types `halves` fp32, in place, and return the nodes that were touched.

    That takes in inputs and outputs, subgraphs and the bodies of local functions. Weights are converted as they are read.
    Raises ModelError where a node reads the bits of a half, for which there is nothing to widen to.
    """
    _refuse_bitcasts(model, half_types)
    touched: list[ir.Node] = []
    for graph in _all_graphs(model):
        for value in (*graph.inputs, *graph.initializers.values()):
            _upcast_value(value, half_types)
        for node in graph:
            changed = [_upcast_value(value, half_types) for value in node.outputs]
            changed += [_upcast_attribute(node, attribute, half_types) for attribute in tuple(node.attributes.values())]
            if any(changed):
                touched.append(node)
    return touched


def _all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield graph
        yield from graph.subgraphs()


def _refuse_bitcasts(model: ir.Model, half_types: Collection[ir.DataType]) -> None:
    for graph in _all_graphs(model):
        for node in graph:
            if node.op_type == "BitCast" and is_standard_op(node):
                given = [value.dtype for value in node.inputs if value is not None]
                if {*given, ir.DataType(node.attributes["to"].as_int())} & set(half_types):
                    raise ModelError(
                        f"`{node.name}` (BitCast) reads the bits of a half-precision number", hint="keep that precision"
                    )


def _upcast_value(value: ir.Value, half_types: Collection[ir.DataType]) -> bool:
    changed = False
    if value.type is not None and value.type.dtype in half_types:
        if isinstance(value.type, ir.TensorType):
            value.type = ir.TensorType(ir.DataType.FLOAT)
        else:
            value.type.dtype = ir.DataType.FLOAT  # that of what is in the sequence or the optional
        changed = True
    if value.is_initializer() and value.const_value is not None and value.const_value.dtype in half_types:
        value.const_value = LazyCastTensor(value.const_value, ir.DataType.FLOAT)
        changed = True
    return changed


def _upcast_attribute(node: ir.Node, attribute: ir.Attr, half_types: Collection[ir.DataType]) -> bool:
    if attribute.is_ref():
        return False
    if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in half_types:
        node.attributes[attribute.name] = ir.AttrTensor(attribute.name, LazyCastTensor(attribute.value, ir.DataType.FLOAT))
        return True
    if (
        attribute.type == ir.AttributeType.INT
        and attribute.name in _DTYPE_ATTRIBUTES
        and is_standard_op(node)
        and attribute.value in set(map(int, half_types))
    ):
        node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
        return True
    return False
