"""Nodes that give back one of their inputs, and nodes that can be written with less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.dims import Dim
from ryzen_passes.fold.node_reading import Operands, integer, integers, operand
from ryzen_passes.fold.shape_rules import permutation, slicing
from ryzen_passes.fold.value_info import Known

Look = Callable[[ir.Value], Known]

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
"""They keep every element where it is in row-major order, so equal sizes make equal tensors."""
DEEPEST = 8


def same_as(node: ir.Node, operands: Operands, outputs: list[Known], look: Look, opset: int) -> ir.Value | None:
    """Return the value that the first output of `node` always equals, in element type and sizes too; None where there is none.

    The other outputs of such a node are not used.
    """
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return None
    if not node.inputs or node.inputs[0] is None or operands[0] is None:
        return None
    rule = _SAME.get(node.op_type)
    if rule is not None:
        return node.inputs[0] if rule(node, operands, outputs[0], opset) else None
    if node.op_type in VIEWS:
        return _view_of(node, outputs[0], look)
    if node.op_type in _NEUTRAL or node.op_type == "Where":
        return _neutral(node, operands, outputs[0])
    return None


def _identity(node: ir.Node, operands: Operands, output: Known, opset: int) -> bool:
    return True


def _dropout(node: ir.Node, operands: Operands, output: Known, opset: int) -> bool:
    if opset >= 12:
        training = operand(operands, 2)
        return training is None or training.ints() == (0,)
    return opset >= 7 or integer(node, "is_test", 0) == 1


def _cast(node: ir.Node, operands: Operands, output: Known, opset: int) -> bool:
    source = operands[0]
    return source is not None and source.dtype is not None and source.dtype == output.dtype


def _cast_like(node: ir.Node, operands: Operands, output: Known, opset: int) -> bool:
    source, like = operands
    return source is not None and like is not None and source.dtype is not None and source.dtype == like.dtype


def _transpose(node: ir.Node, operands: Operands, output: Known, opset: int) -> bool:
    dims = operands[0].dims if operands[0] is not None else None
    return dims is not None and permutation(node, len(dims)) == tuple(range(len(dims)))


def _expand(node: ir.Node, operands: Operands, output: Known, opset: int) -> bool:
    source = operands[0]
    return source is not None and source.dims is not None and source.dims == output.dims


def _slice(node: ir.Node, operands: Operands, output: Known, opset: int) -> bool:
    bounds, source = slicing(node, operands), operands[0]
    if bounds is None or source is None or source.dims is None:
        return False
    return source.dims == output.dims and all(step == 1 for _, _, step in bounds.values())


def _concat(node: ir.Node, operands: Operands, output: Known, opset: int) -> bool:
    return len(node.inputs) == 1


def _split(node: ir.Node, operands: Operands, output: Known, opset: int) -> bool:
    return len(node.outputs) == 1


def _pad(node: ir.Node, operands: Operands, output: Known, opset: int) -> bool:
    pads = integers(node, operands, "pads", 1)
    return pads is not None and not any(pads)


def _tile(node: ir.Node, operands: Operands, output: Known, opset: int) -> bool:
    repeats = operand(operands, 1)
    return opset >= 6 and repeats is not None and (counts := repeats.ints()) is not None and all(one == 1 for one in counts)


_SAME: dict[str, Callable[[ir.Node, Operands, Known, int], bool]] = {
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


def _view_of(node: ir.Node, output: Known, look: Look) -> ir.Value | None:
    value = node.inputs[0]
    for _ in range(DEEPEST):
        if value is None:
            return None
        if output.dims is not None and look(value).dims == output.dims:
            return value
        producer = value.producer()
        if producer is None or producer.op_type not in VIEWS or producer.domain:
            return None
        value = producer.inputs[0]
    return None


Array = np.ndarray[Any, Any]


def _ones(array: Array) -> bool:
    return bool((array == 1).all())


def _zeros(array: Array) -> bool:
    """Tell whether subtracting these changes nothing: -0.0 - 0.0 is -0.0."""
    return bool((array == 0).all()) and (array.dtype.kind in "iu" or not np.signbit(array.astype(np.float64)).any())


def _added_zeros(array: Array) -> bool:
    """Tell whether adding these changes nothing: -0.0 + 0.0 is 0.0, so for floating-point numbers it takes -0.0."""
    return bool((array == 0).all()) and (array.dtype.kind in "iu" or bool(np.signbit(array.astype(np.float64)).all()))


def _all(array: Array) -> bool:
    return bool(array.all())


def _none(array: Array) -> bool:
    return not array.any()


_NEUTRAL: dict[str, tuple[Callable[[Array], bool], tuple[int, ...]]] = {
    "Add": (_added_zeros, (0, 1)),
    "Sub": (_zeros, (1,)),
    "Mul": (_ones, (0, 1)),
    "Div": (_ones, (1,)),
    "Pow": (_ones, (1,)),
    "And": (_all, (0, 1)),
    "Or": (_none, (0, 1)),
    "Xor": (_none, (0, 1)),
}
"""What a constant must be for the other operand to come through, and at which inputs it may stand."""


def _neutral(node: ir.Node, operands: Operands, output: Known) -> ir.Value | None:
    if node.op_type == "Where":
        condition = operands[0].array() if operands[0] is not None else None
        if condition is None or not (condition.all() or not condition.any()):
            return None
        return _if_same(node, operands, output, 1 if condition.all() else 2)
    test, places = _NEUTRAL[node.op_type]
    for at in places:
        known = operands[at]
        array = known.array() if known is not None and known.dims is not None else None
        if array is not None and array.size and test(array):
            return _if_same(node, operands, output, 1 - at)
    return None


def _if_same(node: ir.Node, operands: Operands, output: Known, index: int) -> ir.Value | None:
    known = operands[index]
    same = known is not None and known.dims is not None and known.dims == output.dims
    return node.inputs[index] if same else None


def shorter_shape(node: ir.Node, operands: Operands) -> tuple[int, ...] | None:
    """Return a constant that can stand for the computed shape operand of a Reshape or Expand; None where there is none.

    Reshape: 0 where the size is that of the input at the same place, and -1 for the one size that is left, where no other one
    can be 0 at run time. Expand: 1 where the size is the input's.
    """
    first, shape = operands[0], operand(operands, 1)
    if first is None or first.dims is None or shape is None or shape.content is None or shape.ints() is not None:
        return None
    if node.op_type == "Expand":
        return _shorter_expand(first.dims, shape.content)
    if integer(node, "allowzero", 0) != 0:
        return None
    written: list[int | None] = []
    for at, dim in enumerate(shape.content):
        if isinstance(dim, int):
            written.append(dim)
        else:
            written.append(0 if at < len(first.dims) and first.dims[at] == dim else None)
    if written.count(None) == 1 and all(one is None or one > 0 for one in written):
        written[written.index(None)] = -1
    return None if None in written else tuple(one for one in written if one is not None)


def _shorter_expand(dims: tuple[Dim, ...], content: tuple[Dim, ...]) -> tuple[int, ...] | None:
    padded = (None,) * (len(content) - len(dims)) + dims[max(0, len(dims) - len(content)) :]
    written = [dim if isinstance(dim, int) else 1 if dim == own else None for dim, own in zip(content, padded, strict=True)]
    return None if None in written else tuple(one for one in written if one is not None)


def merged_perm(node: ir.Node, rank: int) -> tuple[ir.Value, tuple[int, ...]] | None:
    """Return the input and the permutation of the one Transpose that does what a Transpose of a Transpose does."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Transpose" or producer.domain:
        return None
    outer, inner, source = permutation(node, rank), permutation(producer, rank), producer.inputs[0]
    if outer is None or inner is None or source is None:
        return None
    return source, tuple(inner[axis] for axis in outer)


def merged_view(node: ir.Node, operands: Operands) -> ir.Value | None:
    """Return the input of the view that only a Reshape looks at, where the Reshape's own shape says all."""
    shape = operand(operands, 1)
    ints = shape.ints() if shape is not None else None
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if ints is None or value is None or producer is None or producer.op_type not in VIEWS or producer.domain:
        return None
    copies = 0 in ints and integer(node, "allowzero", 0) != 1
    if copies or len(value.uses()) > 1 or value.is_graph_output():
        return None
    return producer.inputs[0]
