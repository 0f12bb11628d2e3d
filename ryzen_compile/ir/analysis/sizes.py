"""Static shape inference: the dimensions of tensors and the elements of integer shape tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING

import onnx_ir as ir

from ryzen_compile.ir.analysis import dims as d
from ryzen_compile.ir.analysis.constants import (
    MAX_SHAPE_ELEMENTS,
    constant_ints,
    constant_tensor,
    int_attribute,
    ints_attribute,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

Size = Hashable
"""An int if the size is known, else a token; equal tokens represent equal sizes."""

_SHAPE_PRESERVING_OPS = frozenset(
    (
        "Abs Cast Ceil Clip Cos CumSum Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN "
        "LayerNormalization LeakyRelu Log Neg Not RMSNormalization Reciprocal Relu RotaryEmbedding Round Sigmoid Sign Sin "
        "Softmax Softplus Sqrt Tanh Trilu"
    ).split()
)
"""Ops whose first output has the shape of their first input."""
_BROADCAST_OPS = frozenset(
    "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Or Pow Sub Where Xor".split()
)
_FIXED_RANK_OPS = {"Size": 0, "Shape": 1, "Range": 1, "Flatten": 2}
_MAX_DEPTH = 64
"""The maximum number of nodes that a size is traced back; sizes from farther back get a new token."""


class ShapeInference:
    """Infers the sizes of one graph: from the declared shape of a tensor, else from the nodes that produce it."""

    def __init__(self) -> None:
        self._dims: dict[ir.Value, tuple[Size, ...] | None] = {}
        self._values: dict[ir.Value, tuple[Size, ...] | None] = {}
        self._depth = 0

    def rank(self, value: ir.Value) -> int | None:
        """Return the rank of `value`, or None if it is unknown."""
        if value.shape is not None:
            return len(value.shape)
        dims = self.dims(value)
        return None if dims is None else len(dims)

    def dims(self, value: ir.Value) -> tuple[Size, ...] | None:
        """Return the size of every axis of `value`, or None if the rank is unknown."""
        if value in self._dims:
            return self._dims[value]
        if self._depth > _MAX_DEPTH:
            return self._declared(value)
        self._depth += 1
        inferred = self._infer_dims(value)
        self._depth -= 1
        declared = self._declared(value)
        if inferred is None or (declared is not None and len(declared) != len(inferred)):
            dims = declared
        elif declared is None:
            dims = inferred
        else:
            dims = tuple(
                declared_size if isinstance(declared_size, int) else inferred_size
                for declared_size, inferred_size in zip(declared, inferred, strict=True)
            )
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
        """Return the sizes that the producer of `value` implies, None for each unknown size; None if the rank is unknown."""
        node = value.producer()
        if node is None or node.domain != "" or node.inputs and node.inputs[0] is None:
            return None
        if node.op_type in _SHAPE_PRESERVING_OPS:
            return self.dims(node.inputs[0])  # type: ignore[arg-type]
        if node.op_type in _BROADCAST_OPS:
            return self._broadcast_dims([self.dims(operand) for operand in node.inputs if operand is not None])
        if node.op_type in ("Reshape", "Expand", "ConstantOfShape"):
            return self._dims_from_shape_input(node)
        if node.op_type == "Tile":
            input_dims, repeats = self.dims(node.inputs[0]), self.int_values(node.inputs[1])  # type: ignore[arg-type]
            if input_dims is None:
                return None
            if repeats is None:
                return (None,) * len(input_dims)
            return tuple(_combine("Mul", size, repeat) for size, repeat in zip(input_dims, repeats, strict=True))
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
            distinct = {dims[axis - rank] for dims in operands if dims and axis - rank >= -len(dims)} - {1}
            sizes.append(1 if not distinct else distinct.pop() if len(distinct) == 1 else None)
        return tuple(sizes)

    def _dims_from_shape_input(self, node: ir.Node) -> tuple[Size, ...] | None:
        shape_input = node.inputs[-1]
        target = self.int_values(shape_input) if shape_input is not None else None
        if target is None:
            return None
        if node.op_type == "ConstantOfShape":
            return target
        input_dims = self.dims(node.inputs[0])  # type: ignore[arg-type]
        if node.op_type == "Expand":
            return self._broadcast_dims([input_dims, target])
        if node.op_type == "Reshape":
            # An unknown element may be -1 or 0, which represent other sizes.
            target = tuple(None if isinstance(size, tuple) and size[0] == "element" else size for size in target)
        if not int_attribute(node, "allowzero", 0):
            target = tuple(
                (input_dims[axis] if input_dims and axis < len(input_dims) else None) if size == 0 else size
                for axis, size in enumerate(target)
            )
        inferred = _solve_minus_one(input_dims, target) if input_dims and -1 in target else None
        return tuple(inferred if size == -1 else size for size in target)

    def _dims_of_layout_op(self, node: ir.Node) -> tuple[Size, ...] | None:
        input_dims = self.dims(node.inputs[0])  # type: ignore[arg-type]
        perm = ints_attribute(node, "perm")
        if input_dims is None:
            return (None,) * len(perm) if perm else None
        rank = len(input_dims)
        if node.op_type == "Transpose":
            return tuple(input_dims[axis] for axis in (perm if perm else range(rank - 1, -1, -1)))
        if node.op_type == "Concat":
            axis = int_attribute(node, "axis", 0) % rank
            joined = [
                dims
                for operand in node.inputs
                if operand is not None and (dims := self.dims(operand)) is not None and len(dims) == rank
            ]
            input_dims = tuple(
                next((size for size in sizes if isinstance(size, int)), sizes[0]) for sizes in zip(*joined, strict=True)
            )
            return (*input_dims[:axis], self._concat_size(node, axis), *input_dims[axis + 1 :])
        axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else ints_attribute(node, "axes")
        if node.op_type == "Slice":
            axes = constant_ints(node.inputs[3]) if len(node.inputs) > 3 else None
            sliced_axes = None if axes is None else {axis % rank for axis in axes}
            return (
                None
                if sliced_axes is None
                else tuple(None if axis in sliced_axes else size for axis, size in enumerate(input_dims))
            )
        if axes is None:
            return None
        if node.op_type == "Squeeze":
            squeezed_axes = {axis % rank for axis in axes}
            return tuple(size for axis, size in enumerate(input_dims) if axis not in squeezed_axes)
        rank += len(axes)
        unsqueezed_axes, remaining = {axis % rank for axis in axes}, iter(input_dims)
        return tuple(1 if axis in unsqueezed_axes else next(remaining) for axis in range(rank))

    def _dims_of_matmul_or_gather(self, node: ir.Node) -> tuple[Size, ...] | None:
        left, right = (self.dims(operand) if operand is not None else None for operand in node.inputs[:2])
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
        input_dims = self.dims(node.inputs[0])  # type: ignore[arg-type]
        axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else ints_attribute(node, "axes")
        if input_dims is None or axes is None:
            return None
        reduced_axes = {axis % len(input_dims) for axis in axes}
        if int_attribute(node, "keepdims", 1):
            return tuple(1 if axis in reduced_axes else size for axis, size in enumerate(input_dims))
        return tuple(size for axis, size in enumerate(input_dims) if axis not in reduced_axes)

    def _dims_of_split(self, node: ir.Node, value: ir.Value) -> tuple[Size, ...] | None:
        input_dims = self.dims(node.inputs[0])  # type: ignore[arg-type]
        if input_dims is None:
            return None
        axis, split_sizes = (
            int_attribute(node, "axis", 0) % len(input_dims),
            constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None,
        )
        total, index = input_dims[axis], node.outputs.index(value)
        if split_sizes is None and isinstance(total, int) and total % len(node.outputs) == 0:
            split_sizes = (total // len(node.outputs),) * len(node.outputs)
        return (*input_dims[:axis], split_sizes[index] if split_sizes else None, *input_dims[axis + 1 :])

    def _concat_size(self, node: ir.Node, axis: int) -> Size:
        total: Size = 0
        for value in node.inputs:
            dims = self.dims(value) if value is not None else None
            if dims is None:
                return None
            total = _combine("Add", total, dims[axis])
        return total

    def int_values(self, value: ir.Value) -> tuple[Size, ...] | None:
        """Return the elements of an integer tensor of rank 0 or 1, or None if they are unknown."""
        if value in self._values:
            return self._values[value]
        if self._depth > _MAX_DEPTH:
            return None
        self._depth += 1
        constant = constant_ints(value)
        result = constant if constant is not None else self._infer_int_values(value)
        self._depth -= 1
        self._values[value] = result
        return result

    def _infer_int_values(self, value: ir.Value) -> tuple[Size, ...] | None:
        node = value.producer()
        if node is None or node.domain != "" or not node.inputs:
            return None
        first = node.inputs[0]
        if node.op_type == "Shape" and first is not None:
            dims = self.dims(first)
            if (dims is None or (len(dims) == 1 and not isinstance(dims[0], int))) and (elements := self.int_values(first)):
                dims = (len(elements),)
            start, end = int_attribute(node, "start", 0), int_attribute(node, "end", len(dims) if dims else 0)
            return None if dims is None else dims[start:end]
        if any(operand is None for operand in node.inputs):
            return None
        operands = [self.int_values(operand) for operand in node.inputs if operand is not None]
        source = operands[0]
        if node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            if (
                source is None
                or len(source) > 1
                or not all(isinstance(size, int) and size <= MAX_SHAPE_ELEMENTS for size in source)
            ):
                return None
            fill_value = int(fill.as_tensor().numpy().reshape(-1)[0]) if fill else 0
            return (fill_value,) * (source[0] if source else 1)  # type: ignore[operator]
        if node.op_type == "Concat":
            parts = [part or self._element_token(value) for part, value in zip(operands, node.inputs, strict=True)]
            return None if None in parts else tuple(element for part in parts for element in (part or ()))
        if source is None and node.op_type == "Gather":
            return self._gathered_dims(node)
        if source is None:
            return None
        if node.op_type == "Cast" and not ir.DataType(int_attribute(node, "to", 0)).is_integer():
            return None
        if node.op_type in ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape"):
            return source
        if node.op_type == "Gather":
            indices = constant_ints(node.inputs[1])
            return (
                None
                if indices is None or any(abs(index) > len(source) for index in indices)
                else tuple(source[index] for index in indices)
            )
        if node.op_type == "Slice":
            return self._slice_values(node, source)
        if node.op_type in ("Add", "Sub", "Mul", "Div", "Equal", "Where"):
            return self._elementwise_values(node.op_type, operands)
        return None

    def _element_token(self, value: ir.Value | None) -> tuple[Size, ...] | None:
        """Return a token for the unknown element of `value` if it has exactly one element, else None."""
        return (("element", id(value)),) if value is not None and self.dims(value) == (1,) else None

    def _gathered_dims(self, node: ir.Node) -> tuple[Size, ...] | None:
        """Return the tokens of Gather(Shape(x), constant) for an x of unknown rank, or None for other nodes."""
        shape_node, indices = node.inputs[0].producer(), constant_ints(node.inputs[1])  # type: ignore[union-attr]
        if shape_node is None or shape_node.op_type != "Shape" or shape_node.attributes.get("start") or indices is None:
            return None
        return tuple(("dim", id(shape_node.inputs[0]), index) for index in indices)

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
            selected = [
                on_true if condition is True else on_false if condition is False else None
                for condition, on_true, on_false in columns
            ]
            return None if None in selected else tuple(selected)
        return tuple(_combine(op, *column) for column in columns)


def _solve_minus_one(input_dims: tuple[Size, ...], target_dims: tuple[Size, ...]) -> Size:
    """Return the size that -1 represents in a Reshape of `input_dims` to `target_dims`: an int, a token, or None."""
    input_factors, target_factors = (
        [part for size in sizes for part in _factors(size)]
        for sizes in (input_dims, (size for size in target_dims if size != -1))
    )
    for size in [*target_factors]:
        if size in input_factors:
            input_factors.remove(size)
            target_factors.remove(size)
    if None in input_factors or None in target_factors:
        return None
    numerator = math.prod(size for size in input_factors if isinstance(size, int))
    denominator = math.prod(size for size in target_factors if isinstance(size, int))
    tokens = [size for size in input_factors if not isinstance(size, int)]
    if denominator and numerator % denominator == 0 and all(isinstance(size, int) for size in target_factors):
        return functools.reduce(lambda product, token: _combine("Mul", product, token), [numerator // denominator, *tokens])
    return ("rest", *input_factors, "of", *target_factors)


def _factors(size: Size) -> list[Size]:
    """Return the factors of `size`."""
    if isinstance(size, tuple) and size[0] == "Mul":
        return [part for operand in size[1:] for part in _factors(operand)]
    return [size]


def _combine(op: str, left: Size, right: Size) -> Size:
    """Return the size of `left op right`; sums and products do not depend on the order of operands."""
    if isinstance(left, int) and isinstance(right, int):
        if op == "Equal":
            return left == right
        if op == "Div":
            return d.truncated_quotient(left, right)
        return left + right if op == "Add" else left - right if op == "Sub" else left * right
    if op == "Equal":
        # A size is never negative; different tokens may be equal or not.
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
