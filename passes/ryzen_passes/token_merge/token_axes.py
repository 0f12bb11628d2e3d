"""The token axes of tensors: which axes of a value have one element per token.

They follow from those of the residual stream, (batch, tokens, features), by the ops that transformers use, so that a Reshape
between two values is rewritten to sizes that do not depend on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_ints, int_attribute, ints_attribute
from ryzen_compile.ir.analysis.dims import product
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.patterns import PatternNotMatched

Axes: TypeAlias = frozenset[int]
"""Axes, counted from 0."""
TokenAxes: TypeAlias = Mapping[ir.Value, Axes]
"""Value -> the axes that have one element per token."""

_ELEMENTWISE = frozenset(
    """Abs Add Cast Clip Cos Div Dropout Elu Erf Exp FastGelu Gelu HardSigmoid HardSwish Identity IsInf IsNaN LayerNormalization
    LeakyRelu Log Max Min Mish Mul Neg Pow QuickGelu Reciprocal Relu RMSNormalization Sigmoid SimplifiedLayerNormalization Sin
    Softmax Softplus Sqrt Sub Tanh Where""".split()
)
"""Ops whose output has the broadcast shape of its inputs; of normalizations, those along the last axis only."""
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"})
_SHAPE_OPS = frozenset({"Shape", "Size"})


def find_token_axes(start: ir.Value, nodes: Iterable[ir.Node], shapes: ShapeInference) -> dict[ir.Value, Axes]:
    """Return the token axes of what `nodes`, in graph order, compute from `start` (batch, tokens, features).

    Raises PatternNotMatched if a node moves tokens in a way that is not known.
    """
    axes: dict[ir.Value, Axes] = {start: frozenset({1})}
    for node in nodes:
        if node.op_type in _SHAPE_OPS or not any(value in axes for value in node.inputs if value is not None):
            continue
        rule = _RULES.get(node.op_type) or (_elementwise if node.op_type in _ELEMENTWISE else None)
        if rule is None:
            raise PatternNotMatched(f"{node.op_type} between blocks is not known to keep tokens apart", node)
        found = rule(node, axes, shapes)
        axes.update(dict.fromkeys(node.outputs, found))
    return axes


def _rank(value: ir.Value | None, shapes: ShapeInference) -> int:
    rank = shapes.rank(value) if value is not None else None
    if rank is None:
        raise PatternNotMatched("the rank of a value is unknown", value)
    return rank


def _elementwise(node: ir.Node, axes: TokenAxes, shapes: ShapeInference) -> Axes:
    rank = _rank(node.outputs[0], shapes)
    tokens = frozenset(
        axis + rank - _rank(value, shapes)
        for value in node.inputs
        if value is not None and value in axes
        for axis in axes[value]
    )
    if node.op_type in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization") and tokens & {rank - 1}:
        raise PatternNotMatched("a normalization along the tokens", node)
    return tokens


def _matmul(node: ir.Node, axes: TokenAxes, shapes: ShapeInference) -> Axes:
    rank = _rank(node.outputs[0], shapes)
    found: set[int] = set()
    for value, contracted in zip(node.inputs, (-1, -2), strict=False):
        if value is not None and value in axes:
            operand_rank = _rank(value, shapes)
            found |= {axis + rank - operand_rank for axis in axes[value] if axis != operand_rank + contracted}
    return frozenset(found)


def _transpose(node: ir.Node, axes: TokenAxes, shapes: ShapeInference) -> Axes:
    source = _source(node)
    perm = ints_attribute(node, "perm") or tuple(reversed(range(_rank(source, shapes))))
    return frozenset(index for index, axis in enumerate(perm) if axis in axes[source])


def _reshape(node: ir.Node, axes: TokenAxes, shapes: ShapeInference) -> Axes:
    source, target = shapes.dims(_source(node)), shapes.dims(node.outputs[0])
    tokens = axes[_source(node)]
    if source is None or target is None or len(tokens) != 1:
        raise PatternNotMatched("a Reshape of an unknown shape", node)
    (axis,) = tokens
    before = product(source[:axis])
    found = [
        index
        for index, dim in enumerate(target)
        if dim == source[axis] and before is not None and product(target[:index]) == before
    ]
    if not found:
        raise PatternNotMatched("a Reshape joins or splits the axis of tokens", node)
    return frozenset(found[:1])


def _reduction(node: ir.Node, axes: TokenAxes, shapes: ShapeInference) -> Axes:
    source = _source(node)
    reduced = ints_attribute(node, "axes") or (constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None)
    rank = _rank(source, shapes)
    reduced = tuple(axis % rank for axis in reduced) if reduced else None
    if not reduced or axes[source] & {*reduced}:
        raise PatternNotMatched("a reduction over the tokens", node)
    if int_attribute(node, "keepdims", 1):
        return axes[source]
    return frozenset(axis - sum(other < axis for other in reduced) for axis in axes[source])


def _attention(node: ir.Node, axes: TokenAxes, shapes: ShapeInference) -> Axes:
    if node.inputs[0] not in axes:
        raise PatternNotMatched("an attention between tokens and other rows", node)
    return axes[_source(node)]


def _split(node: ir.Node, axes: TokenAxes, shapes: ShapeInference) -> Axes:
    source = _source(node)
    if int_attribute(node, "axis", 0) % _rank(source, shapes) in axes[source]:
        raise PatternNotMatched("a Split of the tokens", node)
    return axes[source]


def _gather(node: ir.Node, axes: TokenAxes, shapes: ShapeInference) -> Axes:
    source, indices = _source(node), node.inputs[1]
    axis = int_attribute(node, "axis", 0) % _rank(source, shapes)
    if indices in axes or source not in axes or axis in axes[source]:
        raise PatternNotMatched("a Gather of tokens", node)
    added = _rank(indices, shapes) - 1
    return frozenset(each + added if each > axis else each for each in axes[source])


def _slice(node: ir.Node, axes: TokenAxes, shapes: ShapeInference) -> Axes:
    source = _source(node)
    rank = _rank(source, shapes)
    sliced = constant_ints(node.inputs[3]) if len(node.inputs) > 3 else tuple(range(rank))
    if sliced is None or axes[source] & {axis % rank for axis in sliced}:
        raise PatternNotMatched("a Slice of the tokens", node)
    return axes[source]


def _unsqueeze(node: ir.Node, axes: TokenAxes, shapes: ShapeInference) -> Axes:
    source, rank = _source(node), _rank(node.outputs[0], shapes)
    added = ints_attribute(node, "axes") or (constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None)
    if added is None:
        raise PatternNotMatched("an Unsqueeze of unknown axes", node)
    kept = [axis for axis in range(rank) if axis not in {each % rank for each in added}]
    return frozenset(kept[axis] for axis in axes[source])


def _source(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise PatternNotMatched("a node without its first input", node)
    return value


_Rule: TypeAlias = Callable[[ir.Node, TokenAxes, ShapeInference], Axes]
_RULES: Mapping[str, _Rule] = {
    "Attention": _attention,
    "Gather": _gather,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    **dict.fromkeys(_REDUCTIONS, _reduction),
}
"""Op -> the rule for the axes of its outputs; those of `_ELEMENTWISE` have one rule."""


def reshape_target(node: ir.Node, axes: TokenAxes, shapes: ShapeInference) -> Sequence[int | None]:
    """Return the sizes of the output of a Reshape of tokens: 0 copies that of the same axis, -1 is computed, None is the number
    of tokens.

    Raises PatternNotMatched if several other sizes are unknown.
    """
    source, target = shapes.dims(_source(node)), shapes.dims(node.outputs[0])
    (before,), (axis,) = axes[_source(node)], axes[node.outputs[0]]
    sizes: list[int | None] = []
    for index, dim in enumerate(target or ()):
        if index == axis:
            sizes.append(0 if axis == before else None)
        elif isinstance(dim, int):
            sizes.append(dim)
        else:
            sizes.append(0 if index < axis and (source or ())[: index + 1] == (target or ())[: index + 1] else -1)
    if sizes.count(-1) > 1:
        raise PatternNotMatched("a Reshape of unknown sizes", node)
    return sizes


def outside_readers(values: Collection[ir.Value], nodes: Collection[ir.Node]) -> list[tuple[ir.Value, ir.Node | None]]:
    """Return the uses of `values` outside of `nodes`, except by Shape nodes; None for a graph output."""
    found: list[tuple[ir.Value, ir.Node | None]] = []
    for value in values:
        found += [(value, None)] if value.is_graph_output() else []
        found += [(value, user) for user, _ in value.uses() if user not in nodes and user.op_type not in _SHAPE_OPS]
    return found
