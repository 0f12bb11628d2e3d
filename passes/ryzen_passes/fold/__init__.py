"""The pass `fold`: evaluate constant subgraphs, simplify shape computations, and remove redundant and dead nodes."""

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
    """Evaluate constant nodes, share repeated expressions and weights, and remove unused nodes.

    The results, the inputs and the outputs of the model do not change. The pass folds: ops with constant operands; shape
    arithmetic, which is evaluated symbolically for dynamic sizes; nodes whose output equals their input; repeated expressions
    and weights; an If with a constant condition; dead nodes, initializers, functions and opset imports. Nodes inside
    subgraphs and functions are folded too.

    Dynamic sizes of the inputs that have the same name are assumed to be equal, as the ONNX specification states.

    The pass does not fold: random ops, ops of non-standard domains, inputs with a default, and quantized weights. A node is
    evaluated only if its operands and results take at most 1 MiB together, and its results at most 64 KiB or twice the bytes
    of its operands, so that the model does not grow. Larger weights are not moved, and only read to compare weights that are
    equal in type, shape and first bytes.

    The run time of the pass is bounded: a node is evaluated only if it takes at most 268 million operations (estimated), all
    evaluated nodes together at most 4.3 billion operations and 1 GiB of results. Nodes with subgraphs (Loop, Scan, If) and
    calls of local functions are never evaluated. The notes of the change list the nodes with constant operands that stay in
    the graph for these reasons.
    """

    name: ClassVar[str] = "fold"
    runs_before_legalization: ClassVar[bool] = True
    ensures: ClassVar[frozenset[Property]] = frozenset({GRAPH_LIVE})

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Fold a copy that shares the weights, and count nodes and weight bytes."""
        copy = model.clone()
        self.rewrite(copy, context)
        return PassEstimate(
            nodes=_node_count(copy) - _node_count(model),
            weight_bytes=_weight_bytes(copy) - _weight_bytes(model),
            reason="counted on a folded copy",
        )

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Fold `model` in place until nothing changes."""
        from ryzen_compile.ir.edit.recorded_tensors import RecordedTensors
        from ryzen_passes.fold import dead_code
        from ryzen_passes.fold.iteration import FoldIteration
        from ryzen_passes.fold.stats import FoldStats

        stats, recorded = FoldStats(), RecordedTensors(model)
        dead_code.eliminate_dead_nodes(model, stats)
        while (iteration := FoldIteration(model, stats)).run():
            recorded.follow(iteration.replacements)
            dead_code.eliminate_dead_nodes(model, stats)
        recorded.write()
        dead_code.eliminate_unused_declarations(model, stats)
        return stats.to_change()


def _node_count(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def _weight_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
