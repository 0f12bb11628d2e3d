"""Symbolic shape rules: output type and dims of the ops that occur in shape computations, around reshapes and in attention.

A rule reads the attributes and operands of a node; a node with too few operands has unknown outputs, not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.ir.analysis import dims as d
from ryzen_compile.ir.analysis.block_quantized import GATHER_BLOCK_QUANTIZED, MATMUL_NBITS, dense_weight_dims, op_key
from ryzen_compile.ir.analysis.constants import int_attribute_or_none
from ryzen_compile.ir.analysis.dims import SymbolicDim
from ryzen_compile.ir.analysis.node_inputs import (
    Operands,
    has_attribute_or_input,
    ints_attribute_or_input,
    normalize_axes,
    operand,
)
from ryzen_compile.ir.analysis.op_traits import COMPARISON_OPS, REDUCE_OPS
from ryzen_compile.ir.analysis.symbols import PartialDims, SymbolTable, broadcast
from ryzen_compile.ir.analysis.value_info import ElementValues, ValueInfo


@dataclass(slots=True)
class InferredOutput:
    """What a rule infers about one output; None means unknown, also for a single dim."""

    dtype: ir.DataType | None = None
    dims: PartialDims | None = None
    elements: ElementValues | None = None

    def complete(self, symbols: SymbolTable) -> ValueInfo:
        """Return the info of the output, with a fresh symbol for each unknown dim."""
        dims = self.dims
        if dims is not None and None in dims:
            dims = tuple(map(symbols.or_fresh, dims))
        return ValueInfo(self.dtype, dims, self.elements)  # type: ignore[arg-type]


ShapeRule = Callable[[ir.Node, Operands, SymbolTable], Sequence[InferredOutput] | None]
"""Return what is known about the outputs, or None if the rule does not cover the node."""

INT64_MAX = 2**63 - 1
"""The largest dim that ONNX can represent."""
SLICE_END_MAX = 2**31 - 1
"""An end of a Slice of at least this value means "to the end", as the ONNX specification states."""

SAME_SHAPE_OPS = frozenset(
    """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Clip Cos Cosh CumSum Elu Erf Exp Floor Gelu GroupNormalization
    HardSigmoid HardSwish Hardmax InstanceNormalization LeakyRelu Log LogSoftmax LpNormalization LRN
    MeanVarianceNormalization Mish Neg Not PRelu RMSNormalization Reciprocal Relu Round ScatterElements ScatterND Selu Shrink
    Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Trilu Identity""".split()
)
BROADCAST_OPS = frozenset("Add Sub Mul Div Mod And Or Xor BitwiseAnd BitwiseOr BitwiseXor BitShift Pow".split())


def _single_output(dtype: ir.DataType | None, dims: PartialDims | None) -> list[InferredOutput]:
    return [InferredOutput(dtype, dims)]


def _same_as_first_input(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first = operand(operands, 0)
    return None if first is None else _single_output(first.dtype, first.dims)


def _broadcast_binary(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    left, right = operand(operands, 0), operand(operands, 1)
    if left is None or right is None:
        return None
    dtype = left.dtype if node.op_type == "Pow" else left.dtype or right.dtype
    dtype = ir.DataType.BOOL if node.op_type in COMPARISON_OPS else dtype
    if "axis" in node.attributes or "broadcast" in node.attributes:
        return _single_output(dtype, None)  # opsets before 7 have other broadcasting rules
    return _single_output(dtype, broadcast([left.dims, right.dims]))


def _where(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    condition, left, right = operand(operands, 0), operand(operands, 1), operand(operands, 2)
    if condition is None or left is None or right is None:
        return None
    return _single_output(left.dtype or right.dtype, broadcast([condition.dims, left.dims, right.dims]))


def _matmul(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    left, right = operand(operands, 0), operand(operands, 1)
    if left is None or right is None:
        return None
    dtype = left.dtype or right.dtype
    if not left.dims or not right.dims:
        return _single_output(dtype, None)
    if len(left.dims) < 2 or len(right.dims) < 2:
        return None
    batch = broadcast([left.dims[:-2], right.dims[:-2]])
    return _single_output(dtype, None if batch is None else (*batch, left.dims[-2], right.dims[-1]))


def _matmul_nbits(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    left, weight_dims = operand(operands, 0), dense_weight_dims(node, None)
    if left is None or not left.dims or weight_dims is None:
        return None
    return _single_output(left.dtype, (*left.dims[:-1], weight_dims[1]))


def _gather_block_quantized(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    indices, scales, weight_dims = operand(operands, 1), operand(operands, 2), dense_weight_dims(node, operand(operands, 0))
    if indices is None or indices.dims is None or scales is None or weight_dims is None:
        return None
    return _single_output(scales.dtype, (*indices.dims, weight_dims[1]))


def _cast(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first, to = operand(operands, 0), int_attribute_or_none(node, "to", 0)
    return None if first is None or not to else _single_output(ir.DataType(to), first.dims)


def _transpose(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first = operand(operands, 0)
    if first is None:
        return None
    if first.dims is None:
        attribute = node.attributes.get("perm")
        rank_known = attribute is not None and not attribute.is_ref()
        return _single_output(first.dtype, (None,) * len(attribute.as_ints())) if rank_known else None  # type: ignore[union-attr]
    perm = permutation(node, len(first.dims))
    return None if perm is None else _single_output(first.dtype, tuple(first.dims[axis] for axis in perm))


def permutation(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """Return the permutation of a Transpose, by default the reversed axes; None if unknown or invalid."""
    attribute = node.attributes.get("perm")
    if attribute is None:
        return tuple(reversed(range(rank)))
    perm = None if attribute.is_ref() else tuple(attribute.as_ints())
    return perm if perm is not None and sorted(perm) == list(range(rank)) else None


def _concat(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    shapes = [info.dims for info in operands if info is not None and info.dims is not None]
    axis = int_attribute_or_none(node, "axis", 1)
    if axis is None or len(set(map(len, shapes))) != 1:
        return None
    rank = len(shapes[0])
    index = axis + rank if axis < 0 else axis
    if not 0 <= index < rank:
        return None
    total: SymbolicDim | None = 0 if len(shapes) == len(operands) else None
    for shape in shapes:
        total = None if total is None else d.add(total, shape[index])
    # The dims of the other axes are equal in all inputs: use a number if one input has it.
    dims: list[SymbolicDim | None] = [
        next((dim for dim in column if isinstance(dim, int)), column[0]) for column in zip(*shapes, strict=True)
    ]
    dims[index] = total
    dtype = next((info.dtype for info in operands if info is not None and info.dtype is not None), None)
    return _single_output(dtype, tuple(dims))


def _gather(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    data, indices = operand(operands, 0), operand(operands, 1)
    axis = int_attribute_or_none(node, "axis", 0)
    if data is None or indices is None or data.dims is None or indices.dims is None or axis is None:
        return None
    normalized = normalize_axes((axis,), len(data.dims))
    return (
        None
        if normalized is None
        else _single_output(data.dtype, data.dims[: normalized[0]] + indices.dims + data.dims[normalized[0] + 1 :])
    )


def _unsqueeze(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first, axes = operand(operands, 0), ints_attribute_or_input(node, operands, "axes", 1)
    if first is None or first.dims is None or axes is None:
        return None
    normalized = normalize_axes(axes, len(first.dims) + len(axes))
    if normalized is None or len(set(normalized)) < len(axes):
        return None
    remaining = iter(first.dims)
    return _single_output(
        first.dtype, tuple(1 if index in normalized else next(remaining) for index in range(len(first.dims) + len(axes)))
    )


def _squeeze(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first, axes = operand(operands, 0), ints_attribute_or_input(node, operands, "axes", 1)
    if first is None or first.dims is None:
        return None
    if axes is None:
        if has_attribute_or_input(node, "axes", 1) or not all(isinstance(dim, int) for dim in first.dims):
            return _single_output(first.dtype, None)
        return _single_output(first.dtype, tuple(dim for dim in first.dims if dim != 1))
    normalized = normalize_axes(axes, len(first.dims))
    if normalized is None:
        return None
    return _single_output(first.dtype, tuple(dim for index, dim in enumerate(first.dims) if index not in normalized))


def _flatten(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first, axis = operand(operands, 0), int_attribute_or_none(node, "axis", 1)
    if first is None or first.dims is None or axis is None:
        return None
    split_axis = axis + len(first.dims) if axis < 0 else axis
    return _single_output(
        first.dtype,
        (d.product(first.dims[:split_axis]), d.product(first.dims[split_axis:])),
    )


def _reshape(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first, shape = operand(operands, 0), operand(operands, 1)
    if first is None or shape is None:
        return None  # opsets 1 to 4 have the shape in an attribute
    if shape.elements is None:
        rank = shape.dims[0] if shape.dims else None
        return _single_output(first.dtype, (None,) * rank if isinstance(rank, int) else None)
    allowzero = int_attribute_or_none(node, "allowzero", 0)
    source = first.dims or ()
    dims: list[SymbolicDim | None] = []
    for index, dim in enumerate(shape.elements):
        input_dim = source[index] if index < len(source) else None
        if allowzero or dim == input_dim or (isinstance(dim, int) and dim > 0):
            dims.append(dim)
        elif isinstance(dim, int):
            dims.append(input_dim if dim == 0 else None)
        else:
            # A symbol with the value 0 copies the dim of the input, so the output dim may differ from the symbol.
            is_dim = symbols.assume_nonempty and not d.may_be_negative(dim)
            dims.append(dim if is_dim or (d.lower_bound(dim) or 0) > 0 else None)
    if -1 in shape.elements:
        inferred_index = shape.elements.index(-1)
        others = dims[:inferred_index] + dims[inferred_index + 1 :]
        known = [dim for dim in others if dim is not None]
        is_known = first.dims is not None and len(known) == len(others)
        dims[inferred_index] = symbols.quotient(source, known) if is_known else None
    return _single_output(first.dtype, tuple(dims))


def _expand(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first, shape = operand(operands, 0), operand(operands, 1)
    if first is None or shape is None:
        return None
    return _single_output(first.dtype, broadcast([first.dims, shape.elements]))


def _slice(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first = operand(operands, 0)
    if first is None or first.dims is None:
        return None
    dims: list[SymbolicDim | None] = list(first.dims)
    bounds = slice_bounds(node, operands)
    if bounds is None:
        sliced_axes = _slice_axes(node, operands, len(dims))
        return _single_output(
            first.dtype, tuple(None if sliced_axes is None or axis in sliced_axes else dim for axis, dim in enumerate(dims))
        )
    for axis, (start, end, step) in bounds.items():
        dims[axis] = _sliced_dim(first.dims[axis], start, end, step)
    return _single_output(first.dtype, tuple(dims))


def _slice_axes(node: ir.Node, operands: Operands, rank: int) -> tuple[int, ...] | None:
    """Return the axes that the attribute or the input `axes` of a Slice lists; None if unknown or absent."""
    axes = ints_attribute_or_input(node, operands, "axes", 3)
    return None if axes is None else normalize_axes(axes, rank)


def slice_bounds(node: ir.Node, operands: Operands) -> dict[int, tuple[SymbolicDim, SymbolicDim, int]] | None:
    """Return {axis: (start, end, step)} of a Slice; None if unknown."""
    first = operand(operands, 0)
    if first is None or first.dims is None:
        return None
    starts: Sequence[SymbolicDim] | None = ints_attribute_or_input(node, (), "starts", 1)
    ends: Sequence[SymbolicDim] | None = ints_attribute_or_input(node, (), "ends", 2)
    if starts is None or ends is None:
        start, end = operand(operands, 1), operand(operands, 2)
        starts, ends = (start.elements, end.elements) if start is not None and end is not None else (None, None)
    if starts is None or ends is None or len(starts) != len(ends):
        return None
    axes = (
        ints_attribute_or_input(node, operands, "axes", 3)
        if has_attribute_or_input(node, "axes", 3)
        else tuple(range(len(starts)))
    )
    steps = (
        ints_attribute_or_input(node, operands, "steps", 4) if has_attribute_or_input(node, "steps", 4) else (1,) * len(starts)
    )
    normalized = normalize_axes(axes, len(first.dims)) if axes is not None else None
    if normalized is None or steps is None or not len(starts) == len(normalized) == len(steps) == len(set(normalized)):
        return None
    return dict(zip(normalized, zip(starts, ends, steps, strict=True), strict=True))


def _sliced_dim(dim: SymbolicDim, start: SymbolicDim, end: SymbolicDim, step: int) -> SymbolicDim | None:
    if isinstance(dim, int) and isinstance(start, int) and isinstance(end, int) and step:
        # With a negative step, Python and ONNX differ for a start before the first element.
        return len(range(dim)[start:end:step]) if step > 0 or start >= -dim else None
    to_the_end = end == dim or (isinstance(end, int) and end >= SLICE_END_MAX)
    return dim if step == 1 and start == 0 and to_the_end else None


def _split(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first, axis = operand(operands, 0), int_attribute_or_none(node, "axis", 0)
    if first is None or first.dims is None or axis is None:
        return None
    normalized, count = normalize_axes((axis,), len(first.dims)), len(node.outputs)
    if normalized is None:
        return None
    split_axis = normalized[0]
    sizes: Sequence[SymbolicDim | None] | None = ints_attribute_or_input(node, operands, "split", 1)
    if sizes is None or len(sizes) != count:
        total = first.dims[split_axis]
        is_equal_split = not has_attribute_or_input(node, "split", 1) and isinstance(total, int)
        size = -(-total // count) if is_equal_split and isinstance(total, int) else 0
        sizes = [
            min(size, total - size * index) if is_equal_split and isinstance(total, int) else None for index in range(count)
        ]
    return [InferredOutput(first.dtype, (*first.dims[:split_axis], size, *first.dims[split_axis + 1 :])) for size in sizes]


def _reduce(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first, keepdims = operand(operands, 0), int_attribute_or_none(node, "keepdims", 1)
    if first is None or first.dims is None or keepdims is None:
        return None
    axes = ints_attribute_or_input(node, operands, "axes", 1)
    if axes is None and has_attribute_or_input(node, "axes", 1):
        return _single_output(first.dtype, None)
    if not axes:
        noop = int_attribute_or_none(node, "noop_with_empty_axes", 0)
        normalized: tuple[int, ...] | None = () if noop else tuple(range(len(first.dims)))
    else:
        normalized = normalize_axes(axes, len(first.dims))
    if normalized is None:
        return None
    dims = [(1 if index in normalized else dim) for index, dim in enumerate(first.dims) if keepdims or index not in normalized]
    return _single_output(first.dtype, tuple(dims))


def _broadcast_all(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    infos = [info for info in operands if info is not None]
    if not infos or len(infos) != len(operands):
        return None
    dtype = next((info.dtype for info in infos if info.dtype is not None), None)
    return _single_output(dtype, broadcast([info.dims for info in infos]))


def _first_output_like_first_input(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    """Infer a node with one output; the further outputs of a normalization have other shapes."""
    return _same_as_first_input(node, operands, symbols) if len(node.outputs) == 1 else None


def _dropout(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first = operand(operands, 0)
    return None if first is None else [InferredOutput(first.dtype, first.dims), InferredOutput(None, first.dims)]


def _test_elements(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first = operand(operands, 0)
    return None if first is None else _single_output(ir.DataType.BOOL, first.dims)


def _gather_elements(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    data, indices = operand(operands, 0), operand(operands, 1)
    return None if data is None or indices is None else _single_output(data.dtype, indices.dims)


def _top_k(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    data, count, axis = operand(operands, 0), operand(operands, 1), int_attribute_or_none(node, "axis", -1)
    if data is None or data.dims is None or axis is None or (axes := normalize_axes((axis,), len(data.dims))) is None:
        return None
    k = count.elements[0] if count is not None and count.elements else None
    dims = (*data.dims[: axes[0]], k, *data.dims[axes[0] + 1 :])
    return [InferredOutput(data.dtype, dims), InferredOutput(ir.DataType.INT64, dims)]


def _tile(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first, repeats = operand(operands, 0), operand(operands, 1)
    if first is None or first.dims is None or repeats is None or len(operands) != 2:
        return None  # opset 1 has the inputs `tiles` and `axis`
    if repeats.elements is None or len(repeats.elements) != len(first.dims):
        return _single_output(first.dtype, (None,) * len(first.dims))
    return _single_output(
        first.dtype, tuple(d.multiply(dim, count) for dim, count in zip(first.dims, repeats.elements, strict=True))
    )


def _gemm(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    left, right = operand(operands, 0), operand(operands, 1)
    transposed = int_attribute_or_none(node, "transA", 0), int_attribute_or_none(node, "transB", 0)
    if left is None or right is None or left.dims is None or right.dims is None or None in transposed:
        return None
    if len(left.dims) != 2 or len(right.dims) != 2:
        return None
    return _single_output(
        left.dtype or right.dtype, (left.dims[1 if transposed[0] else 0], right.dims[0 if transposed[1] else 1])
    )


def _attention(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    """Infer the first output only; for the others, ONNX shape inference would add unknown dims as 0."""
    query, value = operand(operands, 0), operand(operands, 2)
    if query is None or value is None or query.dims is None or value.dims is None:
        return [InferredOutput(query.dtype if query is not None else None)]
    head_size: SymbolicDim | None = value.dims[-1]
    if len(query.dims) == 3:
        heads, kv_heads = int_attribute_or_none(node, "q_num_heads", 0), int_attribute_or_none(node, "kv_num_heads", 0)
        total = d.multiply(value.dims[-1], heads) if heads else None
        head_size = d.divide(total, kv_heads) if total is not None and kv_heads else None
    return _single_output(query.dtype, (*query.dims[:-1], head_size))


def _dtype_only(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    return [InferredOutput(info.dtype) for info in operands[:1] if info is not None]


def _shape(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first = operand(operands, 0)
    dims = first.dims if first is not None else None
    start, end = int_attribute_or_none(node, "start", 0), int_attribute_or_none(node, "end", SLICE_END_MAX)
    if dims is None or start is None or end is None:
        return _single_output(ir.DataType.INT64, (None,))
    selected = dims[slice(start, end)]
    return [InferredOutput(ir.DataType.INT64, (len(selected),), selected)]


def _size(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    first = operand(operands, 0)
    total = d.product(first.dims) if first is not None and first.dims is not None else None
    return [InferredOutput(ir.DataType.INT64, (), None if total is None else (total,))]


def _constant_of_shape(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    shape, value = operand(operands, 0), node.attributes.get("value")
    if shape is None or (value is not None and value.is_ref()):
        return None
    return _single_output(ir.DataType.FLOAT if value is None else value.as_tensor().dtype, shape.elements)


def _range(node: ir.Node, operands: Operands, symbols: SymbolTable) -> Sequence[InferredOutput] | None:
    start, limit, delta = operand(operands, 0), operand(operands, 1), operand(operands, 2)
    if start is None or limit is None or delta is None:
        return None
    length: SymbolicDim | None = None
    values = [info.ints() for info in (start, limit, delta)]
    if all(ints is not None for ints in values):
        first, last, step = (ints[0] for ints in values if ints is not None)
        length = max(0, -(-(last - first) // step)) if step else None
        length = length if length is not None and length <= INT64_MAX else None
    elif start.elements == (0,) and delta.elements == (1,) and limit.elements and d.lower_bound(limit.elements[0]) is not None:
        length = limit.elements[0] if (d.lower_bound(limit.elements[0]) or 0) >= 0 else None
    return _single_output(start.dtype or limit.dtype or delta.dtype, (length,))


def shape_rule(node: ir.Node) -> ShapeRule | None:
    """Return the rule for the op of `node`, or None."""
    return _CONTRIB_SHAPE_RULES.get(op_key(node)) if node.domain else SHAPE_RULES.get(node.op_type)


_CONTRIB_SHAPE_RULES: dict[tuple[str, str], ShapeRule] = {
    MATMUL_NBITS: _matmul_nbits,
    GATHER_BLOCK_QUANTIZED: _gather_block_quantized,
}
SHAPE_RULES: dict[str, ShapeRule] = {
    **dict.fromkeys(SAME_SHAPE_OPS, _same_as_first_input),
    **dict.fromkeys(BROADCAST_OPS | COMPARISON_OPS, _broadcast_binary),
    **dict.fromkeys(REDUCE_OPS, _reduce),
    **dict.fromkeys(("Max", "Min"), _broadcast_all),
    **dict.fromkeys(("LayerNormalization", "RotaryEmbedding"), _first_output_like_first_input),
    **dict.fromkeys(("IsInf", "IsNaN"), _test_elements),
    "Dropout": _dropout,
    "GatherElements": _gather_elements,
    "Gemm": _gemm,
    "Tile": _tile,
    "TopK": _top_k,
    "Where": _where,
    "MatMul": _matmul,
    "Cast": _cast,
    "Transpose": _transpose,
    "Concat": _concat,
    "Gather": _gather,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Attention": _attention,
    "STFT": _dtype_only,  # ONNX shape inference ignores the attribute `onesided`
}
