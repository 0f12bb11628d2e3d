"""Simplifications: nodes whose output equals one of their inputs, constant shape operands, and merged views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute_or_none
from ryzen_compile.ir.analysis.dims import SymbolicDim
from ryzen_compile.ir.analysis.node_inputs import Operands, ints_attribute_or_input, operand
from ryzen_compile.ir.analysis.op_traits import VIEW_OPS
from ryzen_compile.ir.analysis.shape_rules import permutation, slice_bounds
from ryzen_compile.ir.analysis.value_info import ValueInfo

InfoLookup = Callable[[ir.Value], ValueInfo]

MAX_VIEW_DEPTH = 8
"""The maximum number of consecutive views to search for a source with the same dims."""


def equivalent_input(
    node: ir.Node, operands: Operands, outputs: list[ValueInfo], lookup_info: InfoLookup, opset: int
) -> ir.Value | None:
    """Return the value that always equals the first output of `node`, also in element type and dims; None if there is none.

    A node whose other outputs are used has none.
    """
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return None
    if not node.inputs or node.inputs[0] is None or operands[0] is None:
        return None
    rule = _IDENTITY_RULES.get(node.op_type)
    if rule is not None:
        return node.inputs[0] if rule(node, operands, outputs[0], opset) else None
    if node.op_type in VIEW_OPS:
        return _equivalent_view_source(node, outputs[0], lookup_info)
    if node.op_type in _NEUTRAL_OPERANDS or node.op_type == "Where":
        return _skip_neutral_operand(node, operands, outputs[0])
    return None


def _identity(node: ir.Node, operands: Operands, output: ValueInfo, opset: int) -> bool:
    return True


def _dropout(node: ir.Node, operands: Operands, output: ValueInfo, opset: int) -> bool:
    if opset >= 12:
        training = operand(operands, 2)
        return training is None or training.ints() == (0,)
    return opset >= 7 or int_attribute_or_none(node, "is_test", 0) == 1


def _cast(node: ir.Node, operands: Operands, output: ValueInfo, opset: int) -> bool:
    source = operands[0]
    return source is not None and source.dtype is not None and source.dtype == output.dtype


def _cast_like(node: ir.Node, operands: Operands, output: ValueInfo, opset: int) -> bool:
    source, like = operands
    return source is not None and like is not None and source.dtype is not None and source.dtype == like.dtype


def _transpose(node: ir.Node, operands: Operands, output: ValueInfo, opset: int) -> bool:
    dims = operands[0].dims if operands[0] is not None else None
    return dims is not None and permutation(node, len(dims)) == tuple(range(len(dims)))


def _expand(node: ir.Node, operands: Operands, output: ValueInfo, opset: int) -> bool:
    source = operands[0]
    return source is not None and source.dims is not None and source.dims == output.dims


def _slice(node: ir.Node, operands: Operands, output: ValueInfo, opset: int) -> bool:
    bounds, source = slice_bounds(node, operands), operands[0]
    if bounds is None or source is None or source.dims is None:
        return False
    return source.dims == output.dims and all(step == 1 for _, _, step in bounds.values())


def _concat(node: ir.Node, operands: Operands, output: ValueInfo, opset: int) -> bool:
    return len(node.inputs) == 1


def _split(node: ir.Node, operands: Operands, output: ValueInfo, opset: int) -> bool:
    return len(node.outputs) == 1


def _pad(node: ir.Node, operands: Operands, output: ValueInfo, opset: int) -> bool:
    pads = ints_attribute_or_input(node, operands, "pads", 1)
    return pads is not None and not any(pads)


def _tile(node: ir.Node, operands: Operands, output: ValueInfo, opset: int) -> bool:
    repeats = operand(operands, 1)
    return opset >= 6 and repeats is not None and (counts := repeats.ints()) is not None and all(count == 1 for count in counts)


_IDENTITY_RULES: dict[str, Callable[[ir.Node, Operands, ValueInfo, int], bool]] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Transpose": _transpose,
    "Expand": _expand,
    "Slice": _slice,
    "Concat": _concat,
    "Split": _split,
    "Pad": _pad,
    "Tile": _tile,
}


def _equivalent_view_source(node: ir.Node, output: ValueInfo, lookup_info: InfoLookup) -> ir.Value | None:
    value = node.inputs[0]
    for _ in range(MAX_VIEW_DEPTH):
        if value is None:
            return None
        if output.dims is not None and lookup_info(value).dims == output.dims:
            return value
        producer = value.producer()
        if producer is None or producer.op_type not in VIEW_OPS or producer.domain:
            return None
        value = producer.inputs[0]
    return None


Array = np.ndarray[Any, Any]


def _all_ones(array: Array) -> bool:
    return bool((array == 1).all())


def _all_subtractive_zeros(array: Array) -> bool:
    """Return whether subtracting `array` has no effect: -0.0 - 0.0 is -0.0."""
    return bool((array == 0).all()) and (array.dtype.kind in "iu" or not np.signbit(array.astype(np.float64)).any())


def _all_additive_zeros(array: Array) -> bool:
    """Return whether adding `array` has no effect: -0.0 + 0.0 is 0.0, so floating-point zeros must be -0.0."""
    return bool((array == 0).all()) and (array.dtype.kind in "iu" or bool(np.signbit(array.astype(np.float64)).all()))


def _all_true(array: Array) -> bool:
    return bool(array.all())


def _all_false(array: Array) -> bool:
    return not array.any()


_NEUTRAL_OPERANDS: dict[str, tuple[Callable[[Array], bool], tuple[int, ...]]] = {
    "Add": (_all_additive_zeros, (0, 1)),
    "Sub": (_all_subtractive_zeros, (1,)),
    "Mul": (_all_ones, (0, 1)),
    "Div": (_all_ones, (1,)),
    "Pow": (_all_ones, (1,)),
    "And": (_all_true, (0, 1)),
    "Or": (_all_false, (0, 1)),
    "Xor": (_all_false, (0, 1)),
}
"""Op type to (test for a neutral constant operand, the input indices that the constant may have)."""


def _skip_neutral_operand(node: ir.Node, operands: Operands, output: ValueInfo) -> ir.Value | None:
    if node.op_type == "Where":
        condition = operands[0].small_array() if operands[0] is not None else None
        if condition is None or not (condition.all() or not condition.any()):
            return None
        return _input_if_same_dims(node, operands, output, 1 if condition.all() else 2)
    test, indices = _NEUTRAL_OPERANDS[node.op_type]
    for index in indices:
        info = operands[index]
        array = info.small_array() if info is not None and info.dims is not None else None
        if array is not None and array.size and test(array):
            return _input_if_same_dims(node, operands, output, 1 - index)
    return None


def _input_if_same_dims(node: ir.Node, operands: Operands, output: ValueInfo, index: int) -> ir.Value | None:
    info = operands[index]
    is_same = info is not None and info.dims is not None and info.dims == output.dims
    return node.inputs[index] if is_same else None


def constant_shape_operand(node: ir.Node, operands: Operands) -> tuple[int, ...] | None:
    """Return a constant that can replace the computed shape operand of a Reshape or Expand; None if there is none.

    Reshape: 0 for a dim that equals the input dim at the same index, and -1 for the only other dynamic dim, if no other dim can
    be 0 at run time. Expand: 1 for a dim that equals the input dim.
    """
    first, shape = operands[0], operand(operands, 1)
    if first is None or first.dims is None or shape is None or shape.elements is None or shape.ints() is not None:
        return None
    if node.op_type == "Expand":
        return _constant_expand_shape(first.dims, shape.elements)
    if int_attribute_or_none(node, "allowzero", 0) != 0:
        return None
    target: list[int | None] = []
    for index, dim in enumerate(shape.elements):
        if isinstance(dim, int):
            target.append(dim)
        else:
            target.append(0 if index < len(first.dims) and first.dims[index] == dim else None)
    if target.count(None) == 1 and all(dim is None or dim > 0 for dim in target):
        target[target.index(None)] = -1
    return None if None in target else tuple(dim for dim in target if dim is not None)


def _constant_expand_shape(dims: tuple[SymbolicDim, ...], elements: tuple[SymbolicDim, ...]) -> tuple[int, ...] | None:
    padded = (None,) * (len(elements) - len(dims)) + dims[max(0, len(dims) - len(elements)) :]
    target = [
        dim if isinstance(dim, int) else 1 if dim == input_dim else None
        for dim, input_dim in zip(elements, padded, strict=True)
    ]
    return None if None in target else tuple(target_dim for target_dim in target if target_dim is not None)


def merged_transpose(node: ir.Node, rank: int) -> tuple[ir.Value, tuple[int, ...]] | None:
    """Return the input and the permutation of the Transpose that replaces two consecutive ones; None if not applicable."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Transpose" or producer.domain:
        return None
    outer, inner, source = permutation(node, rank), permutation(producer, rank), producer.inputs[0]
    if outer is None or inner is None or source is None:
        return None
    return source, tuple(inner[axis] for axis in outer)


def merged_view(node: ir.Node, operands: Operands) -> ir.Value | None:
    """Return the input of the view before a Reshape if the Reshape can read it directly, else None.

    The view must have no other use, and the shape operand must be constant without copied dims.
    """
    shape = operand(operands, 1)
    ints = shape.ints() if shape is not None else None
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if ints is None or value is None or producer is None or producer.op_type not in VIEW_OPS or producer.domain:
        return None
    copies_dims = 0 in ints and int_attribute_or_none(node, "allowzero", 0) != 1
    if copies_dims or len(value.uses()) > 1 or value.is_graph_output():
        return None
    return producer.inputs[0]
