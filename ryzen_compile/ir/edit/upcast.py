"""Conversion of half-precision tensors of a model to fp32, which represents all of their values exactly."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.analysis.element_types import is_standard_op
from ryzen_compile.ir.lazy_cast import LazyCastTensor
from ryzen_compile.ir.traversal import all_graphs

_DTYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_datatype", "output_dtype", "stash_type", "softmax_precision"})
"""The attributes of standard ops that specify an element type."""


def upcast_to_fp32(model: ir.Model, half_types: Collection[ir.DataType]) -> list[ir.Node]:
    """Convert every tensor with an element type in `half_types` to fp32 in place, and return the nodes that changed.

    Converts inputs, outputs, subgraphs and the bodies of model functions. Weights are converted when they are read.

    Raises:
        ModelError: A BitCast reads or produces the bits of a half-precision number, which have no fp32 equivalent.
    """
    _refuse_bitcasts(model, half_types)
    touched: list[ir.Node] = []
    for graph in all_graphs(model):
        for value in (*graph.inputs, *graph.initializers.values()):
            _upcast_value(value, half_types)
        for node in graph:
            changed = [_upcast_value(value, half_types) for value in node.outputs]
            changed += [_upcast_attribute(node, attribute, half_types) for attribute in tuple(node.attributes.values())]
            if any(changed):
                touched.append(node)
    return touched


def _refuse_bitcasts(model: ir.Model, half_types: Collection[ir.DataType]) -> None:
    for graph in all_graphs(model):
        for node in graph:
            if node.op_type == "BitCast" and is_standard_op(node):
                input_types = [value.dtype for value in node.inputs if value is not None]
                if {*input_types, ir.DataType(node.attributes["to"].as_int())} & set(half_types):
                    raise ModelError(
                        f"node `{node.name}` (BitCast) uses the bits of a half-precision number, which has no fp32 equivalent",
                        hint="keep the half-precision type",
                    )


def _upcast_value(value: ir.Value, half_types: Collection[ir.DataType]) -> bool:
    changed = False
    if value.type is not None and value.type.dtype in half_types:
        if isinstance(value.type, ir.TensorType):
            value.type = ir.TensorType(ir.DataType.FLOAT)
        else:
            value.type.dtype = ir.DataType.FLOAT  # the element type of the tensors in the sequence or optional
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
