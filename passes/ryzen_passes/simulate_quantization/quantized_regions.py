"""Quantized regions: nodes connected by integer tensors, of which at least one computes what TensorRT does not."""

from __future__ import annotations

import math

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_tensor, int_attribute
from ryzen_compile.ir.analysis.element_types import ElementTypes, element_types, is_standard_op
from ryzen_compile.ir.analysis.op_traits import DATA_MOVEMENT_OPS
from ryzen_passes.opset import standard_opset

Region = list[ir.Node]
"""The nodes of a region, in the order of the graph."""

QUANTIZED_TYPES = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16})
NARROW_TYPES = QUANTIZED_TYPES | {ir.DataType.INT32}
"""The types of quantized tensors and of sums of their products."""
_INTEGER_OPS = frozenset({"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"})
"""Ops that TensorRT does not implement."""
_MOVEMENT_OPS = DATA_MOVEMENT_OPS | {"MaxPool"}
_OPS = _INTEGER_OPS | _MOVEMENT_OPS | {"QuantizeLinear", "DequantizeLinear", "Cast", "Add"}
_SCALE_INPUTS = {
    "QuantizeLinear": (1,),
    "DequantizeLinear": (1,),
    "QLinearMatMul": (1, 4, 6),
    "QLinearConv": (1, 4, 6),
}
_ZERO_POINT_INPUTS = {
    "QuantizeLinear": (2,),
    "DequantizeLinear": (2,),
    "MatMulInteger": (2, 3),
    "ConvInteger": (2, 3),
    "QLinearMatMul": (2, 5, 7),
    "QLinearConv": (2, 5, 7),
}
_SAME_RANK_OPS = frozenset({"QuantizeLinear", "DequantizeLinear", "Identity", "Cast"})
_MIN_OPSET = 13


def find_regions(model: ir.Model) -> tuple[list[Region], list[str]]:
    """Return the regions of the main graph to rewrite, and why others that TensorRT refuses are not rewritten."""
    types = element_types(model)
    opset = standard_opset(model)
    regions, notes = [], []
    for region in _connected(model.graph, types, find_quantized_values(model.graph, types)):
        if not any(_is_unsupported_by_tensorrt(node, types) for node in region):
            continue
        reason = f"opset {opset} is older than {_MIN_OPSET}" if opset < _MIN_OPSET else None
        reason = reason or next((reason for node in region if (reason := _reason_against(node, types)) is not None), None)
        if reason is None:
            regions.append(region)
        else:
            notes.append(f"{region[0].name or region[0].op_type}: {reason}")
    return regions, notes


def find_quantized_values(graph: ir.Graph, types: ElementTypes) -> frozenset[ir.Value]:
    """Return the values of `graph` that have a type of 8 or 16 bits, or are sums of products of such numbers."""
    found = {value for value in (*graph.inputs, *graph.initializers.values()) if types.get(value) in QUANTIZED_TYPES}
    for node in graph:
        is_sum = is_standard_op(node) and (
            node.op_type in ("MatMulInteger", "ConvInteger")
            or (node.op_type in _MOVEMENT_OPS | {"Add"} and not found.isdisjoint(filter(None, node.inputs)))
        )
        for value in node.outputs:
            if types.get(value) in QUANTIZED_TYPES or (is_sum and types.get(value) == ir.DataType.INT32):
                found.add(value)
    return frozenset(found)


def _connected(graph: ir.Graph, types: ElementTypes, quantized: frozenset[ir.Value]) -> list[Region]:
    """Return the nodes that read or write quantized values, grouped by the values that connect them."""
    order = {node: index for index, node in enumerate(graph)}
    parents: dict[ir.Node, ir.Node] = {}

    def root(node: ir.Node) -> ir.Node:
        while parents[node] is not node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for node in order:
        links = [value for value in (*node.inputs, *node.outputs) if value in quantized and value is not None]
        if node.op_type == "Constant":
            continue
        if not links and not _is_quantized_constant_reader(node, types):
            continue
        parents.setdefault(node, node)
        for value in links:
            producer = value.producer()
            for other in (producer, *value.consumers()):
                if other is not None and other in order and constant_tensor(value) is None:
                    parents.setdefault(other, other)
                    parents[root(other)] = root(node)
    groups: dict[ir.Node, Region] = {}
    for node in sorted(parents, key=order.__getitem__):
        groups.setdefault(root(node), []).append(node)
    return list(groups.values())


def _is_quantized_constant_reader(node: ir.Node, types: ElementTypes) -> bool:
    """Return whether `node` dequantizes an int32 constant, such as a bias."""
    return node.op_type == "DequantizeLinear" and is_standard_op(node) and _input_type(node, 0, types) == ir.DataType.INT32


def _is_unsupported_by_tensorrt(node: ir.Node, types: ElementTypes) -> bool:
    if not is_standard_op(node):
        return False
    if node.op_type in _INTEGER_OPS:
        return True
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        value = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        dtype = types.get(value) if value is not None else None
        return dtype in NARROW_TYPES and (dtype != ir.DataType.INT8 or not has_zero(node, 2))
    # TensorRT accepts a quantized constant in front of DequantizeLinear only.
    return any(value is not None and _is_quantized_constant(value, types) for value in node.inputs)


def _is_quantized_constant(value: ir.Value, types: ElementTypes) -> bool:
    return types.get(value) in QUANTIZED_TYPES and constant_tensor(value) is not None


def has_zero(node: ir.Node, index: int) -> bool:
    """Return whether the zero point at input `index` is absent or a constant of zeros."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return True
    tensor = constant_tensor(value)
    return tensor is not None and not tensor.numpy().any()


def _reason_against(node: ir.Node, types: ElementTypes) -> str | None:
    """Return why `node` cannot be rewritten, or None if it can."""
    if not is_standard_op(node) or node.op_type not in _OPS:
        return f"`{node.name or node.op_type}` [{node.op_type}] reads or writes quantized tensors and has no float form"
    if node.op_type == "Cast" and types.get(node.outputs[0]) in QUANTIZED_TYPES:
        return f"`{node.name or 'Cast'}` [Cast] converts to {types[node.outputs[0]].name.lower()} without a scale"
    if int_attribute(node, "block_size", 0):
        return f"`{node.name or node.op_type}` [{node.op_type}] has a scale per block"
    for index in _SCALE_INPUTS.get(node.op_type, ()):
        if _input_type(node, index, types) != ir.DataType.FLOAT:
            return f"`{node.name or node.op_type}` [{node.op_type}] has a scale of another type than float32"
    for index in (*_SCALE_INPUTS.get(node.op_type, ()), *_ZERO_POINT_INPUTS.get(node.op_type, ())):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and constant_tensor(value) is None and not _is_scalar(value):
            return f"`{node.name or node.op_type}` [{node.op_type}] computes its scales or zero points, one per row or channel"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not _has_scalar(node, 1) and rank_of(node.inputs[0]) is None:
        return f"`{node.name or node.op_type}` [{node.op_type}] has a scale per channel and an input of unknown rank"
    return None


def _input_type(node: ir.Node, index: int, types: ElementTypes) -> ir.DataType | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else types.get(value)


def _has_scalar(node: ir.Node, index: int) -> bool:
    value = node.inputs[index]
    return value is not None and _is_scalar(value)


def _is_scalar(value: ir.Value) -> bool:
    tensor, producer = constant_tensor(value), value.producer()
    if tensor is not None:
        return tensor.size == 1
    if producer is not None and producer.op_type == "DynamicQuantizeLinear":
        return True
    return value.shape is not None and value.shape.is_static() and math.prod(value.shape.numpy()) == 1


def rank_of(value: ir.Value | None) -> int | None:
    """Return the rank of a constant, of a value with a declared shape, or of its quantized form; None if it is unknown."""
    while value is not None:
        if (tensor := constant_tensor(value)) is not None:
            return len(tensor.shape)
        if value.shape is not None:
            return len(value.shape)
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _SAME_RANK_OPS else None
    return None
