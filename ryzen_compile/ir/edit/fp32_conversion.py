"""Conversion of tensors of other floating-point types of a model to fp32: exact for half precision, rounded for float64."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.analysis.element_types import is_standard_op
from ryzen_compile.ir.lazy_cast import LazyCastTensor
from ryzen_compile.ir.traversal import all_graphs

_DTYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_datatype", "output_dtype", "stash_type", "softmax_precision"})
"""The attributes of standard ops that specify an element type."""


def convert_to_fp32(model: ir.Model, dtypes: Collection[ir.DataType]) -> list[ir.Node]:
    """Convert every tensor with an element type in `dtypes` to fp32 in place, and return the nodes that changed.

    `dtypes` holds FLOAT16, BFLOAT16 and DOUBLE, or some of them. Converts inputs, outputs, subgraphs and the bodies of model
    functions. Weights are converted when they are read. Constants of float64 beyond the range of fp32 are clamped to it,
    infinities are kept.

    Raises:
        ModelError: A BitCast reads or produces the bits of a number of these types, which have no fp32 equivalent.
    """
    if (bitcast := find_bitcast(model, dtypes)) is not None:
        raise ModelError(
            f"node `{bitcast.name}` (BitCast) uses the bits of a number whose type is converted to fp32",
            hint="keep the element types of this model",
        )
    touched: list[ir.Node] = []
    for graph in all_graphs(model):
        for value in (*graph.inputs, *graph.initializers.values()):
            _convert_value(value, dtypes)
        for node in graph:
            changed = [_convert_value(value, dtypes) for value in node.outputs]
            changed += [_convert_attribute(node, attribute, dtypes) for attribute in tuple(node.attributes.values())]
            if any(changed):
                touched.append(node)
    return touched


def find_bitcast(model: ir.Model, dtypes: Collection[ir.DataType]) -> ir.Node | None:
    """Return the first BitCast that reads or produces the bits of a number of a type in `dtypes`, or None."""
    for graph in all_graphs(model):
        for node in graph:
            if node.op_type == "BitCast" and is_standard_op(node):
                input_types = [value.dtype for value in node.inputs if value is not None]
                if {*input_types, ir.DataType(node.attributes["to"].as_int())} & set(dtypes):
                    return node
    return None


def _convert_value(value: ir.Value, dtypes: Collection[ir.DataType]) -> bool:
    changed = False
    if value.type is not None and value.type.dtype in dtypes:
        if isinstance(value.type, ir.TensorType):
            value.type = ir.TensorType(ir.DataType.FLOAT)
        else:
            value.type.dtype = ir.DataType.FLOAT  # the element type of the tensors in the sequence or optional
        changed = True
    if value.is_initializer() and value.const_value is not None and value.const_value.dtype in dtypes:
        value.const_value = _as_fp32(value.const_value)
        changed = True
    return changed


def _convert_attribute(node: ir.Node, attribute: ir.Attr, dtypes: Collection[ir.DataType]) -> bool:
    if attribute.is_ref():
        return False
    if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in dtypes:
        node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _as_fp32(attribute.value))
        return True
    if (
        attribute.type == ir.AttributeType.INT
        and attribute.name in _DTYPE_ATTRIBUTES
        and is_standard_op(node)
        and attribute.value in set(map(int, dtypes))
    ):
        node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
        return True
    return False


def _as_fp32(tensor: ir.TensorProtocol) -> LazyCastTensor:
    bound = float(np.finfo(np.float32).max) if tensor.dtype == ir.DataType.DOUBLE else None
    return LazyCastTensor(tensor, ir.DataType.FLOAT, bound=bound)
