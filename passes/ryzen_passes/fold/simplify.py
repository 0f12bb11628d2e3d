"""Simplifications: nodes whose output equals one of their inputs, constant shape operands, and merged views.

Each is a rule whose `rewrite` returns the replacement, which the folding traversal puts in place. `EQUIVALENCE_RULES` return
the value that always equals the first output of a node, also in element type and dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute_or_none
from ryzen_compile.ir.analysis.dims import SymbolicDim, SymbolicDims
from ryzen_compile.ir.analysis.node_inputs import Operands, ints_attribute_or_input, operand
from ryzen_compile.ir.analysis.op_traits import VIEW_OPS
from ryzen_compile.ir.analysis.shape_rules import permutation, slice_bounds
from ryzen_compile.ir.analysis.value_info import ValueInfo
from ryzen_compile.ir.patterns import Match, MatchFailure, NodePattern, RewriteRule, RuleSet

Array = np.ndarray[Any, Any]

MAX_VIEW_DEPTH = 8
"""The maximum number of consecutive views to search for a source with the same dims."""
_VIEW = "|".join(sorted(VIEW_OPS))


@dataclass(slots=True)
class NodeContext:
    """What a simplification reads about its node."""

    operands: Operands
    outputs: Sequence[ValueInfo]
    opset: int
    lookup_info: Callable[[ir.Value], ValueInfo]

    @property
    def output(self) -> ValueInfo:
        """The info of the first output."""
        return self.outputs[0]

    def dims(self, index: int) -> SymbolicDims | None:
        """Return the dims of input `index`, or None if they are unknown."""
        info = operand(self.operands, index)
        return None if info is None else info.dims

    def keeps_dims(self, index: int) -> bool:
        """Return whether the output is known to have the dims of input `index`."""
        dims = self.dims(index)
        return dims is not None and dims == self.output.dims


class EquivalenceRule(RewriteRule[NodeContext, "ir.Value | None"]):
    """A node whose first output equals its input `x`. A rule with another result overrides `rewrite`."""

    def rewrite(self, match: Match, context: NodeContext) -> ir.Value | None:
        """Return the value that equals the output; None if there is none after all."""
        return match["x"]


def _unless(holds: bool, reason: str, match: Match) -> MatchFailure | None:
    return None if holds else MatchFailure.at(reason, match.node)


class SkipIdentity(EquivalenceRule):
    """Identity."""

    pattern = NodePattern("Identity", ("x",))


class SkipDropout(EquivalenceRule):
    """Dropout at inference."""

    pattern = NodePattern("Dropout", ("x", "*"))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """The training mode must be off: an input from opset 12 on, an attribute below 7."""
        if context.opset >= 12:
            training = operand(context.operands, 2)
            return _unless(training is None or training.ints() == (0,), "it may be in training mode", match)
        is_test = int_attribute_or_none(match.node, "is_test", 0) == 1
        return _unless(context.opset >= 7 or is_test, "it is in training mode", match)


class SkipCast(EquivalenceRule):
    """A Cast of a tensor to its own type."""

    pattern = NodePattern("Cast", ("x",))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """The types must be known and equal."""
        source = context.operands[0]
        is_same = source is not None and source.dtype is not None and source.dtype == context.output.dtype
        return _unless(is_same, "it may change the type", match)


class SkipCastLike(EquivalenceRule):
    """A CastLike of a tensor to its own type."""

    pattern = NodePattern("CastLike", ("x", "like"))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """The types must be known and equal."""
        source, like = context.operands
        is_same = source is not None and like is not None and source.dtype is not None and source.dtype == like.dtype
        return _unless(is_same, "it may change the type", match)


class SkipTranspose(EquivalenceRule):
    """A Transpose that keeps the order of the axes."""

    pattern = NodePattern("Transpose", ("x",))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """The permutation must be known and the identity."""
        dims = context.dims(0)
        is_identity = dims is not None and permutation(match.node, len(dims)) == tuple(range(len(dims)))
        return _unless(is_identity, "it may permute axes", match)


class SkipExpand(EquivalenceRule):
    """An Expand to the shape of its input."""

    pattern = NodePattern("Expand", ("x", "shape"))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """Input and output must have the same dims."""
        return _unless(context.keeps_dims(0), "it may repeat elements", match)


class SkipSlice(EquivalenceRule):
    """A Slice of the whole tensor."""

    pattern = NodePattern("Slice", ("x", "*"))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """Input and output must have the same dims, and no axis may be reversed."""
        bounds = slice_bounds(match.node, context.operands)
        is_whole = bounds is not None and context.keeps_dims(0) and all(step == 1 for _, _, step in bounds.values())
        return _unless(is_whole, "it may drop elements", match)


class SkipConcat(EquivalenceRule):
    """A Concat of one tensor."""

    pattern = NodePattern("Concat", ("x",))


class SkipSplit(EquivalenceRule):
    """A Split into one part."""

    pattern = NodePattern("Split", ("x", "*"))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """There must be one output."""
        return _unless(len(match.node.outputs) == 1, "it has several parts", match)


class SkipPad(EquivalenceRule):
    """A Pad by nothing."""

    pattern = NodePattern("Pad", ("x", "*"))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """All pads must be 0."""
        pads = ints_attribute_or_input(match.node, context.operands, "pads", 1)
        return _unless(pads is not None and not any(pads), "it may pad", match)


class SkipTile(EquivalenceRule):
    """A Tile by 1 along every axis."""

    pattern = NodePattern("Tile", ("x", "repeats", "*"))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """All counts must be 1; opset 1 has other inputs."""
        repeats = operand(context.operands, 1)
        counts = repeats.ints() if repeats is not None and context.opset >= 6 else None
        return _unless(counts is not None and all(count == 1 for count in counts), "it may repeat elements", match)


class SkipView(EquivalenceRule):
    """A chain of views that restores the dims of a tensor before it."""

    pattern = NodePattern(_VIEW, ("x", "*"))

    def rewrite(self, match: Match, context: NodeContext) -> ir.Value | None:
        """Return the nearest value before the views that has the dims of the output."""
        value: ir.Value | None = match["x"]
        for _ in range(MAX_VIEW_DEPTH):
            if value is None:
                return None
            if context.output.dims is not None and context.lookup_info(value).dims == context.output.dims:
                return value
            producer = value.producer()
            if producer is None or producer.op_type not in VIEW_OPS or producer.domain:
                return None
            value = producer.inputs[0]
        return None


class SkipConstantWhere(EquivalenceRule):
    """A Where whose condition is constant and the same for all elements."""

    pattern = NodePattern("Where", ("condition", "on_true", "on_false"))

    def rewrite(self, match: Match, context: NodeContext) -> ir.Value | None:
        """Return the selected branch."""
        info = context.operands[0]
        condition = info.small_array() if info is not None else None
        if condition is None or not (condition.all() or not condition.any()):
            return None
        index, name = (1, "on_true") if condition.all() else (2, "on_false")
        return match[name] if context.keeps_dims(index) else None


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


class SkipNeutralOperand(EquivalenceRule):
    """An elementwise op with a constant operand that has no effect, such as `x + 0`."""

    pattern = NodePattern("Add|Sub|Mul|Div|Pow|And|Or|Xor", ("left", "right"))

    NEUTRAL_OPERANDS: dict[str, tuple[Callable[[Array], bool], tuple[int, ...]]] = {
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

    def rewrite(self, match: Match, context: NodeContext) -> ir.Value | None:
        """Return the other operand."""
        test, indices = self.NEUTRAL_OPERANDS[match.node.op_type]
        for index in indices:
            info = context.operands[index]
            array = info.small_array() if info is not None and info.dims is not None else None
            if array is not None and array.size and test(array):
                return match[("right", "left")[index]] if context.keeps_dims(1 - index) else None
        return None


EQUIVALENCE_RULES: RuleSet[NodeContext, ir.Value | None] = RuleSet(
    SkipIdentity(),
    SkipDropout(),
    SkipCast(),
    SkipCastLike(),
    SkipTranspose(),
    SkipExpand(),
    SkipSlice(),
    SkipConcat(),
    SkipSplit(),
    SkipPad(),
    SkipTile(),
    SkipView(),
    SkipConstantWhere(),
    SkipNeutralOperand(),
)
"""The rules for nodes whose first output equals one of their inputs."""


def equivalent_input(node: ir.Node, context: NodeContext) -> ir.Value | None:
    """Return the value that always equals the first output of `node`, also in element type and dims; None if there is none.

    A node whose other outputs are used has none.
    """
    outputs = node.outputs
    if len(outputs) > 1 and any(output.uses() or output.is_graph_output() for output in outputs[1:]):
        return None
    return EQUIVALENCE_RULES.apply(node, context).result


@dataclass(frozen=True)
class NewSource:
    """The input that a Reshape or Transpose reads instead of that of the node before it."""

    source: ir.Value
    perm: tuple[int, ...] | None = None
    """The new permutation of a Transpose."""


class ConstantShapeOperand(RewriteRule[NodeContext, "tuple[int, ...] | None"]):
    """A computed shape operand of a Reshape or Expand that a constant can replace.

    Reshape: 0 for a dim that equals the input dim at the same index, and -1 for the only other dynamic dim, if no other dim can
    be 0 at run time. Expand: 1 for a dim that equals the input dim.
    """

    pattern = NodePattern("Reshape|Expand", ("x", "shape"))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """The elements of the operand must be known, and not all be numbers."""
        shape = operand(context.operands, 1)
        is_known = context.dims(0) is not None and shape is not None and shape.elements is not None and shape.ints() is None
        return _unless(is_known, "the shape operand is constant or unknown", match)

    def rewrite(self, match: Match, context: NodeContext) -> tuple[int, ...] | None:
        """Return the constant, or None if there is none."""
        shape = context.operands[1]
        dims, elements = context.dims(0) or (), (shape.elements if shape is not None else None) or ()
        if match.node.op_type == "Expand":
            return _constant_expand_shape(dims, elements)
        return _constant_reshape_target(match.node, dims, elements)


def _constant_reshape_target(node: ir.Node, dims: SymbolicDims, elements: tuple[SymbolicDim, ...]) -> tuple[int, ...] | None:
    if int_attribute_or_none(node, "allowzero", 0) != 0:
        return None
    target: list[int | None] = []
    for index, dim in enumerate(elements):
        if isinstance(dim, int):
            target.append(dim)
        else:
            target.append(0 if index < len(dims) and dims[index] == dim else None)
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


class MergeTransposes(RewriteRule[NodeContext, NewSource]):
    """Two consecutive Transposes."""

    pattern = NodePattern("Transpose", (NodePattern("Transpose", ("x",), name="inner"),))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """Both permutations must be known."""
        dims = context.dims(0)
        is_known = dims is not None and None not in (
            permutation(match.node, len(dims)),
            permutation(match.nodes["inner"], len(dims)),
        )
        return _unless(is_known, "a permutation is unknown", match)

    def rewrite(self, match: Match, context: NodeContext) -> NewSource:
        """Return the input and the permutation of the Transpose that replaces both."""
        rank = len(context.dims(0) or ())
        outer, inner = permutation(match.node, rank) or (), permutation(match.nodes["inner"], rank) or ()
        return NewSource(match["x"], tuple(inner[axis] for axis in outer))


class MergeViews(RewriteRule[NodeContext, NewSource]):
    """A Reshape that can read the input of the view before it directly."""

    pattern = NodePattern("Reshape", (NodePattern(_VIEW, ("x", "*")), "shape"))

    def check(self, match: Match, context: NodeContext) -> MatchFailure | None:
        """The view must have no other use, and the shape operand must be constant without copied dims."""
        shape, value = operand(context.operands, 1), match.node.inputs[0]
        ints = shape.ints() if shape is not None else None
        if ints is None or (0 in ints and int_attribute_or_none(match.node, "allowzero", 0) != 1):
            return MatchFailure.at("the shape operand is not constant or copies dims", match.node)
        is_only_use = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
        return _unless(is_only_use, "the view has other uses", match)

    def rewrite(self, match: Match, context: NodeContext) -> NewSource:
        """Return the input of the view."""
        return NewSource(match["x"])


SHAPE_OPERAND_RULES: RuleSet[NodeContext, tuple[int, ...] | None] = RuleSet(ConstantShapeOperand())
"""The rules for computed shape operands."""
MERGE_RULES: RuleSet[NodeContext, NewSource] = RuleSet(MergeViews(), MergeTransposes())
"""The rules for two consecutive nodes of one kind."""
SHAPE_OPS = frozenset({"Expand", "Reshape", "Transpose"})
"""The ops that `SHAPE_OPERAND_RULES` and `MERGE_RULES` have rules for."""
