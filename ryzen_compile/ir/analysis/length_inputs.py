"""Lengths: integers, one for each row, that count elements of the row along an axis; found by what the graph does with them.

A graph uses lengths as the sequence lengths of a recurrent op, of ReverseSequence or of Attention, or compares them with the
positions 0, 1, 2, ... along the axis. A model that shortens the axis may compute with them first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_tensor
from ryzen_compile.ir.analysis.dims import SymbolicDim, SymbolicDims, product
from ryzen_compile.ir.analysis.op_traits import CONVERSION_OPS, LAYOUT_OPS
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.spec.dims import dim_names
from ryzen_compile.spec.interface import InputSpec

_ARITHMETIC_OPS = frozenset({"Add", "Sub", "Mul", "Div", "Floor", "Ceil", "Min", "Max", "Clip"})
"""Ops that compute the lengths of a shortened axis."""
_ORDER_OPS = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_RECURRENT_OPS = frozenset({"LSTM", "GRU", "RNN"})
_SEQUENCE_LENS, _NONPAD_KV_SEQLEN = 4, 6
"""The input indices of lengths of a recurrent op and of Attention."""
_VALUE_PRESERVING_OPS = LAYOUT_OPS | CONVERSION_OPS | {"Gather", "GatherElements", "TopK"}
"""Ops whose first output holds elements of their first input; exporters sort rows by their lengths."""
_MAX_TRACED_VALUES = 256
_MAX_POSITIONS = 1 << 20
"""The largest constant that is read."""


def with_length_roles(graph: ir.Graph, specs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """Return the specs of the inputs of `graph` with the role of those that are lengths.

    Lengths along an axis of a fixed size are values from 1 to it. If it is unknown which dim they count along, they are 1.
    """
    values = {value.name: value for value in graph.inputs}
    inference = ShapeInference()
    return tuple(_with_length_role(spec, values, specs, inference) for spec in specs)


def _with_length_role(
    spec: InputSpec, values: Mapping[str | None, ir.Value], specs: Sequence[InputSpec], inference: ShapeInference
) -> InputSpec:
    if spec.role != "values" or not spec.dtype.startswith("int") or not _has_one_number_per_row(spec):
        return spec
    axes = _counted_axes(values[spec.name], inference)
    if not axes:
        return spec
    names = {
        dims[axis]: dim
        for other in specs
        if other.name != spec.name and (dims := inference.dims(values[other.name])) is not None
        for axis, dim in enumerate(other.dims or ())
        if isinstance(dim, str) and dim not in (spec.dims or ()) and dim_names(dim) == (dim,)
    }
    for size, is_computed in axes:
        if not is_computed and size in names:
            return msgspec.structs.replace(spec, role="lengths", low=1, length_dim=names[size])
        if is_computed and len(candidates := _row_dims(spec, specs)) == 1:
            return msgspec.structs.replace(spec, role="lengths", low=1, length_dim=candidates.pop())
    fixed = [size for size, is_computed in axes if isinstance(size, int) and not is_computed]
    return msgspec.structs.replace(spec, low=1, high=min(fixed, default=1))


def _has_one_number_per_row(spec: InputSpec) -> bool:
    return spec.dims is not None and len(spec.dims) in (1, 2) and all(dim == 1 for dim in spec.dims[1:])


def _row_dims(spec: InputSpec, specs: Sequence[InputSpec]) -> set[str]:
    """Return the dynamic dims of the elements of a row of other inputs than states."""
    return {
        dim
        for other in specs
        if other.name != spec.name and other.role != "state"
        for dim in (other.dims or ())[1:]
        if isinstance(dim, str) and dim not in (spec.dims or ()) and dim_names(dim) == (dim,)
    }


def _counted_axes(value: ir.Value, inference: ShapeInference) -> list[tuple[SymbolicDim | None, bool]]:
    """Return the size of each axis that `value` counts elements along, and whether the graph computes with it first.

    The size is None if it is unknown. Empty if `value` does not count elements.
    """
    axes: list[tuple[SymbolicDim | None, bool]] = []
    pending, visited = [(value, False)], {value}
    while pending and len(visited) < _MAX_TRACED_VALUES:
        current, is_computed = pending.pop()
        for node, index in current.uses():
            if node.domain not in ("", "ai.onnx"):
                continue
            if (counted := _counted_dims(node, index, inference)) is not None:
                axes.append((product(counted) if counted else None, is_computed))
            elif node.op_type in _ARITHMETIC_OPS or (index == 0 and node.op_type in _VALUE_PRESERVING_OPS):
                output = node.outputs[0]
                if output not in visited:
                    visited.add(output)
                    pending.append((output, is_computed or node.op_type in _ARITHMETIC_OPS))
    return axes


def _counted_dims(node: ir.Node, index: int, inference: ShapeInference) -> SymbolicDims | None:
    """Return the dims along which input `index` of `node` counts elements, () if unknown; None if it does not count."""
    if node.op_type in _RECURRENT_OPS and index == _SEQUENCE_LENS:
        return _axis_of(node.inputs[0], node.attributes.get_int("layout", 0), inference)
    if node.op_type == "ReverseSequence" and index == 1:
        return _axis_of(node.inputs[0], node.attributes.get_int("time_axis", 0), inference)
    if node.op_type == "Attention" and index == _NONPAD_KV_SEQLEN:
        return _axis_of(node.inputs[1], -2, inference)
    if node.op_type in _ORDER_OPS and (positions := _position_vector(node.inputs[1 - index])) is not None:
        return inference.dims(positions) or ()
    return None


def _axis_of(value: ir.Value | None, axis: int, inference: ShapeInference) -> SymbolicDims:
    dims = inference.dims(value) if value is not None else None
    return (dims[axis],) if dims is not None and -len(dims) <= axis < len(dims) else ()


def _position_vector(value: ir.Value | None) -> ir.Value | None:
    """Return the tensor of 0, 1, 2, ... along one axis that `value` repeats along others; None if it holds other numbers."""
    vector = current = value
    while current is not None:
        if (tensor := constant_tensor(current)) is not None:
            return vector if _counts_up(tensor) else None
        node = current.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Range":
            return vector
        if node.op_type not in LAYOUT_OPS | CONVERSION_OPS:
            return None
        current = node.inputs[0]
        if node.op_type == "Expand":
            vector = current
    return None


def _counts_up(tensor: ir.TensorProtocol) -> bool:
    if not tensor.dtype.is_integer() or not 1 < tensor.size <= _MAX_POSITIONS:
        return False
    return np.array_equal(tensor.numpy().reshape(-1), np.arange(tensor.size))
