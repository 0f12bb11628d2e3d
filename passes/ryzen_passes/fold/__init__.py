"""Fold: compute now what does not depend on the inputs, and drop what nobody needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import GRAPH_LIVE

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Compute what is constant, share what is repeated, drop what is unused.

    What the model computes, and its inputs and outputs, stay as they are. Folded are: ops of constants; shape arithmetic, seen
    through with symbols for the sizes that a run decides; nodes that give back their input; repeated expressions and
    weights; an If whose condition is known; dead nodes, initializers, functions and opset imports. Subgraphs and functions
    are folded inside.

    Sizes of the inputs that have one name are taken to be equal, as ONNX says they are.

    Left alone are: random ops, ops of other domains than ONNX's own, inputs with a default, and quantised weights. A constant
    is computed only where it and its operands take at most 1 MiB, and at most 64 KiB or twice its operands, so that no model
    grows; larger weights are neither read, except to compare those of equal type, shape and first bytes, nor moved.
    """

    name: ClassVar[str] = "fold"
    ensures: ClassVar[frozenset[Property]] = frozenset({GRAPH_LIVE})

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Fold a copy that shares the weights, and count."""
        copy = model.clone()
        self.rewrite(copy, context)
        return PassEstimate(
            nodes=_node_count(copy) - _node_count(model),
            weight_bytes=_weight_bytes(copy) - _weight_bytes(model),
            reason="counted on a folded copy",
        )

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Fold `model` in place, until there is nothing left to fold."""
        from ryzen_passes.fold import dead_code
        from ryzen_passes.fold.fold_pass import FoldPass
        from ryzen_passes.fold.stats import FoldStats

        tally = FoldStats()
        dead_code.eliminate_dead_nodes(model, tally)
        while FoldPass(model, tally).run():
            dead_code.eliminate_dead_nodes(model, tally)
        dead_code.eliminate_unused_declarations(model, tally)
        return tally.to_change()


def _node_count(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def _weight_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
