"""Sizes: what is known, before anything runs, of the dimensions of a tensor and of the integers in a shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

Size = Hashable
"""An int where the number is known; else a token: equal tokens stand for equal numbers."""

_SHAPE_PRESERVING_OPS = frozenset(
    (
        "Abs Cast Ceil Clip Cos CumSum Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN "
        "LayerNormalization LeakyRelu Log Neg Not RMSNormalization Reciprocal Relu RotaryEmbedding Round Sigmoid Sign Sin "
        "Softmax Softplus Sqrt Tanh Trilu"
    ).split()
)
"""Ops whose output has the shape of their first input."""
_BROADCAST_OPS = frozenset(
    "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Or Pow Sub Where Xor".split()
)
_FIXED_RANK_OPS = {"Size": 0, "Shape": 1, "Range": 1, "Flatten": 2}
_MAX_DEPTH = 64
"""How many nodes back a size is followed; what lies further is a token of its own."""
_MAX_SHAPE_ELEMENTS = 16
"""The most elements of an integer tensor that is read as a shape."""


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return the integer attribute `name` of `node`."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor that `value` always is, or None."""
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if value.const_value is not None or node is None or node.op_type != "Constant":
        return value.const_value
    held = node.attributes.get("value")
    # The first is what all but few constants are, and a hundred times faster.
    return held.value if held is not None and not held.is_ref() else ir.convenience.get_const_tensor(value)


def constant_ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the elements of a constant tensor of integers or booleans and of at most one axis, or None."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size > _MAX_SHAPE_ELEMENTS or len(tensor.shape) > 1:
        return None
    if tensor.dtype != ir.DataType.BOOL and not tensor.dtype.is_integer():
        return None
    return tuple(tensor.numpy().reshape(-1).tolist())


class ShapeInference:
    """Reads sizes off one graph. A size is taken from the tensor's declared shape, else from the nodes that make it."""

    def __init__(self) -> None:
        self._dims: dict[ir.Value, tuple[Size, ...] | None] = {}
        self._values: dict[ir.Value, tuple[Size, ...] | None] = {}
        self._depth = 0

    def rank(self, value: ir.Value) -> int | None:
        """Return the number of axes of `value`, or None."""
        if value.shape is not None:
            return len(value.shape)
        dims = self.dims(value)
        return None if dims is None else len(dims)

    def dims(self, value: ir.Value) -> tuple[Size, ...] | None:
        """Return the size of every axis of `value`, or None where not even their number is known."""
        if value in self._dims:
            return self._dims[value]
        if self._depth > _MAX_DEPTH:
            return self._declared(value)
        self._depth += 1
        traced = self._infer_dims(value)
        self._depth -= 1
        declared = self._declared(value)
        if traced is None or (declared is not None and len(declared) != len(traced)):
            dims = declared
        elif declared is None:
            dims = traced
        else:
            dims = tuple(one if isinstance(one, int) else two for one, two in zip(declared, traced, strict=True))
        if dims is not None and any(size is None for size in dims):
            names = declared or (None,) * len(dims)
            dims = tuple(
                (names[axis] if names[axis] is not None else ("dim", id(value), axis)) if size is None else size
                for axis, size in enumerate(dims)
            )
        self._dims[value] = dims
        return dims

    def _declared(self, value: ir.Value) -> tuple[Size, ...] | None:
        if value.shape is None:
            tensor = constant_tensor(value)
            return None if tensor is None else tuple(int(size) for size in tensor.shape.numpy())
        return tuple(
            size if isinstance(size, int) else size.value if size.value is not None else ("dim", id(value), axis)
            for axis, size in enumerate(value.shape)
        )

    def _infer_dims(self, value: ir.Value) -> tuple[Size, ...] | None:
        """Return the sizes that follow from the node that makes `value`; None for one that does not follow."""
        node = value.producer()
        if node is None or node.domain != "" or node.inputs and node.inputs[0] is None:
            return None
        if node.op_type in _SHAPE_PRESERVING_OPS:
            return self.dims(node.inputs[0])  # type: ignore[arg-type]
        if node.op_type in _BROADCAST_OPS:
            return self._broadcast_dims([self.dims(one) for one in node.inputs if one is not None])
        if node.op_type in ("Reshape", "Expand", "ConstantOfShape"):
            return self._dims_from_shape_input(node)
        if node.op_type == "Tile":
            before, times = self.dims(node.inputs[0]), self.int_values(node.inputs[1])  # type: ignore[arg-type]
            if before is None:
                return None
            if times is None:
                return (None,) * len(before)
            return tuple(_combine("Mul", size, time) for size, time in zip(before, times, strict=True))
        if node.op_type == "GatherElements":
            return self.dims(node.inputs[1])  # type: ignore[arg-type]
        if node.op_type in _FIXED_RANK_OPS:
            return (None,) * _FIXED_RANK_OPS[node.op_type]
        if node.op_type.startswith("Reduce"):
            return self._dims_of_reduce(node)
        if node.op_type in ("MatMul", "Gemm", "Gather"):
            return self._dims_of_matmul_or_gather(node)
        if node.op_type == "Split":
            return self._dims_of_split(node, value)
        if node.op_type in ("Transpose", "Unsqueeze", "Squeeze", "Concat", "Slice"):
            return self._dims_of_layout_op(node)
        return None

    def _broadcast_dims(self, operands: Sequence[tuple[Size, ...] | None]) -> tuple[Size, ...] | None:
        if any(dims is None for dims in operands):
            return None
        rank = max(len(dims or ()) for dims in operands)
        sizes = []
        for axis in range(rank):
            found = {dims[axis - rank] for dims in operands if dims and axis - rank >= -len(dims)} - {1}
            sizes.append(1 if not found else found.pop() if len(found) == 1 else None)
        return tuple(sizes)

    def _dims_from_shape_input(self, node: ir.Node) -> tuple[Size, ...] | None:
        to = node.inputs[-1]
        vector = self.int_values(to) if to is not None else None
        if vector is None:
            return None
        if node.op_type == "ConstantOfShape":
            return vector
        before = self.dims(node.inputs[0])  # type: ignore[arg-type]
        if node.op_type == "Expand":
            return self._broadcast_dims([before, vector])
        if node.op_type == "Reshape":
            # What nothing is known of may be -1, or 0, and then stands for other sizes elsewhere.
            vector = tuple(None if isinstance(size, tuple) and size[0] == "element" else size for size in vector)
        if not int_attribute(node, "allowzero", 0):
            vector = tuple(
                (before[axis] if before and axis < len(before) else None) if size == 0 else size
                for axis, size in enumerate(vector)
            )
        rest = _solve_minus_one(before, vector) if before and -1 in vector else None
        return tuple(rest if size == -1 else size for size in vector)

    def _dims_of_layout_op(self, node: ir.Node) -> tuple[Size, ...] | None:
        before = self.dims(node.inputs[0])  # type: ignore[arg-type]
        perm = node.attributes.get("perm")
        if before is None:
            return (None,) * len(perm.as_ints()) if perm else None
        rank = len(before)
        if node.op_type == "Transpose":
            return tuple(before[axis] for axis in (perm.as_ints() if perm else range(rank - 1, -1, -1)))
        if node.op_type == "Concat":
            axis = int_attribute(node, "axis", 0) % rank
            joined = [
                dims for one in node.inputs if one is not None and (dims := self.dims(one)) is not None and len(dims) == rank
            ]
            before = tuple(
                next((size for size in sizes if isinstance(size, int)), sizes[0]) for sizes in zip(*joined, strict=True)
            )
            return (*before[:axis], self._concat_size(node, axis), *before[axis + 1 :])
        axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else self._axes_attribute(node)
        if node.op_type == "Slice":
            axes = constant_ints(node.inputs[3]) if len(node.inputs) > 3 else None
            cut = None if axes is None else {axis % rank for axis in axes}
            return None if cut is None else tuple(None if axis in cut else size for axis, size in enumerate(before))
        if axes is None:
            return None
        if node.op_type == "Squeeze":
            gone = {axis % rank for axis in axes}
            return tuple(size for axis, size in enumerate(before) if axis not in gone)
        rank += len(axes)
        new, rest = {axis % rank for axis in axes}, iter(before)
        return tuple(1 if axis in new else next(rest) for axis in range(rank))

    def _dims_of_matmul_or_gather(self, node: ir.Node) -> tuple[Size, ...] | None:
        left, right = (self.dims(one) if one is not None else None for one in node.inputs[:2])
        if left is None or right is None:
            return None
        if node.op_type == "Gather":
            axis = int_attribute(node, "axis", 0) % len(left)
            return (*left[:axis], *right, *left[axis + 1 :])
        if node.op_type == "Gemm":
            return left[1 if int_attribute(node, "transA", 0) else 0], right[0 if int_attribute(node, "transB", 0) else 1]
        if len(left) < 2 or len(right) < 2:
            return None
        batch = self._broadcast_dims([left[:-2], right[:-2]])
        return None if batch is None else (*batch, left[-2], right[-1])

    def _dims_of_reduce(self, node: ir.Node) -> tuple[Size, ...] | None:
        before = self.dims(node.inputs[0])  # type: ignore[arg-type]
        axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else self._axes_attribute(node)
        if before is None or axes is None:
            return None
        gone = {axis % len(before) for axis in axes}
        if int_attribute(node, "keepdims", 1):
            return tuple(1 if axis in gone else size for axis, size in enumerate(before))
        return tuple(size for axis, size in enumerate(before) if axis not in gone)

    def _dims_of_split(self, node: ir.Node, value: ir.Value) -> tuple[Size, ...] | None:
        before = self.dims(node.inputs[0])  # type: ignore[arg-type]
        if before is None:
            return None
        axis, parts = (
            int_attribute(node, "axis", 0) % len(before),
            constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None,
        )
        whole, at = before[axis], node.outputs.index(value)
        if parts is None and isinstance(whole, int) and whole % len(node.outputs) == 0:
            parts = (whole // len(node.outputs),) * len(node.outputs)
        return (*before[:axis], parts[at] if parts else None, *before[axis + 1 :])

    def _axes_attribute(self, node: ir.Node) -> tuple[int, ...] | None:
        axes = node.attributes.get("axes")
        return None if axes is None else tuple(axes.as_ints())

    def _concat_size(self, node: ir.Node, axis: int) -> Size:
        total: Size = 0
        for value in node.inputs:
            dims = self.dims(value) if value is not None else None
            if dims is None:
                return None
            total = _combine("Add", total, dims[axis])
        return total

    def int_values(self, value: ir.Value) -> tuple[Size, ...] | None:
        """Return the elements of an integer tensor of at most one axis, or None."""
        if value in self._values:
            return self._values[value]
        if self._depth > _MAX_DEPTH:
            return None
        self._depth += 1
        known = constant_ints(value)
        found = known if known is not None else self._infer_int_values(value)
        self._depth -= 1
        self._values[value] = found
        return found

    def _infer_int_values(self, value: ir.Value) -> tuple[Size, ...] | None:
        node = value.producer()
        if node is None or node.domain != "" or not node.inputs:
            return None
        first = node.inputs[0]
        if node.op_type == "Shape" and first is not None:
            dims = self.dims(first)
            if (dims is None or (len(dims) == 1 and not isinstance(dims[0], int))) and (vector := self.int_values(first)):
                dims = (len(vector),)
            start, end = int_attribute(node, "start", 0), int_attribute(node, "end", len(dims) if dims else 0)
            return None if dims is None else dims[start:end]
        if any(one is None for one in node.inputs):
            return None
        operands = [self.int_values(one) for one in node.inputs if one is not None]
        source = operands[0]
        if node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            if (
                source is None
                or len(source) > 1
                or not all(isinstance(size, int) and size <= _MAX_SHAPE_ELEMENTS for size in source)
            ):
                return None
            item = int(fill.as_tensor().numpy().reshape(-1)[0]) if fill else 0
            return (item,) * (source[0] if source else 1)  # type: ignore[operator]
        if node.op_type == "Concat":
            parts = [part or self._element_token(value) for part, value in zip(operands, node.inputs, strict=True)]
            return None if None in parts else tuple(item for part in parts for item in (part or ()))
        if source is None and node.op_type == "Gather":
            return self._gathered_dims(node)
        if source is None:
            return None
        if node.op_type == "Cast" and not ir.DataType(int_attribute(node, "to", 0)).is_integer():
            return None
        if node.op_type in ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape"):
            return source
        if node.op_type == "Gather":
            picks = constant_ints(node.inputs[1])
            return None if picks is None or any(abs(at) > len(source) for at in picks) else tuple(source[at] for at in picks)
        if node.op_type == "Slice":
            return self._slice_values(node, source)
        if node.op_type in ("Add", "Sub", "Mul", "Div", "Equal", "Where"):
            return self._elementwise_values(node.op_type, operands)
        return None

    def _element_token(self, value: ir.Value | None) -> tuple[Size, ...] | None:
        """Return a token for the element of `value` where it has one element, which nothing is known of."""
        return (("element", id(value)),) if value is not None and self.dims(value) == (1,) else None

    def _gathered_dims(self, node: ir.Node) -> tuple[Size, ...] | None:
        """Return the tokens of Gather(Shape(x), constant), where not even the rank of x is known."""
        shape, picks = node.inputs[0].producer(), constant_ints(node.inputs[1])  # type: ignore[union-attr]
        if shape is None or shape.op_type != "Shape" or shape.attributes.get("start") or picks is None:
            return None
        return tuple(("dim", id(shape.inputs[0]), at) for at in picks)

    def _slice_values(self, node: ir.Node, source: tuple[Size, ...]) -> tuple[Size, ...] | None:
        starts, ends = constant_ints(node.inputs[1]), constant_ints(node.inputs[2])
        steps = constant_ints(node.inputs[4]) if len(node.inputs) > 4 else (1,)
        if starts is None or ends is None or steps is None or not len(starts) == len(ends) == len(steps) == 1:
            return None
        return source[starts[0] : ends[0] : steps[0]]

    def _elementwise_values(self, op: str, operands: Sequence[tuple[Size, ...] | None]) -> tuple[Size, ...] | None:
        if any(part is None for part in operands):
            return None
        length = max(len(part or ()) for part in operands)
        if any(len(part or ()) not in (1, length) for part in operands):
            return None
        columns = zip(*((part * length if len(part) == 1 else part) for part in operands if part is not None), strict=True)
        if op == "Where":
            chosen = [yes if test is True else no if test is False else None for test, yes, no in columns]
            return None if None in chosen else tuple(chosen)
        return tuple(_combine(op, *column) for column in columns)


def _solve_minus_one(before: tuple[Size, ...], after: tuple[Size, ...]) -> Size:
    """Return what -1 stands for in a Reshape of `before` to `after`: a number, or a token of all that it follows from."""
    have, want = (
        [part for size in sizes for part in _factors(size)] for sizes in (before, (size for size in after if size != -1))
    )
    for size in [*want]:
        if size in have:
            have.remove(size)
            want.remove(size)
    if None in have or None in want:
        return None
    over = math.prod(size for size in have if isinstance(size, int))
    under = math.prod(size for size in want if isinstance(size, int))
    tokens = [size for size in have if not isinstance(size, int)]
    if under and over % under == 0 and all(isinstance(size, int) for size in want):
        return functools.reduce(lambda product, token: _combine("Mul", product, token), [over // under, *tokens])
    return ("rest", *have, "of", *want)


def _factors(size: Size) -> list[Size]:
    """Return the sizes that `size` is the product of."""
    if isinstance(size, tuple) and size[0] == "Mul":
        return [part for one in size[1:] for part in _factors(one)]
    return [size]


def _combine(op: str, left: Size, right: Size) -> Size:
    """Return the token of `one op two`; sums do not depend on their order."""
    if isinstance(left, int) and isinstance(right, int):
        if op == "Equal":
            return left == right
        if op == "Div":
            return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1) if right else None
        return left + right if op == "Add" else left - right if op == "Sub" else left * right
    if op == "Equal":
        # A size is never negative; whether two different tokens are equal is not known.
        return True if left == right else False if any(isinstance(side, int) and side < 0 for side in (left, right)) else None
    if op == "Add" and 0 in (left, right):
        return left if right == 0 else right
    if (op in ("Mul", "Div") and right == 1) or (op == "Mul" and left == 1):
        return left if right == 1 else right
    if op == "Div" and len(factors := _factors(left)) > 1 and right in factors:
        factors.remove(right)
        return functools.reduce(lambda product, factor: _combine("Mul", product, factor), factors)
    if op in ("Add", "Mul"):
        left, right = sorted((left, right), key=repr)
    return (op, left, right)
