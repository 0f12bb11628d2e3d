"""KeyDiff: keys that point elsewhere than the others are kept."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scorers.scorer import FLOAT, Scorer, ScoringContext
from ryzen_passes.kv.scorers.statistics import Statistics
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView

_EPSILON = 1e-12


class KeyDiffScorer(Scorer):
    """-cos(k, a) for the anchor a = sum over the tokens seen so far of k / |k|.

    The paper's anchor is over the tokens that are kept. This one needs no key of an evicted token, is one vector a head as a
    state, and costs a step nothing that grows.
    """

    name: ClassVar[str] = "keydiff"
    description: ClassVar[str] = "keys that point elsewhere than the mean are kept"
    paper: ClassVar[str] = "Park et al. 2025, arXiv 2504.15364"
    time_dependent: ClassVar[bool] = True

    def __init__(self, context: ScoringContext) -> None:
        super().__init__(context)
        self._layer_anchors: list[ir.Value] = []
        self._updated_anchors: list[ir.Value] = []

    @classmethod
    def problem(cls, view: StaticCacheView, statistics: Statistics | None) -> str | None:
        """Return that the sizes of keys differ, where they do."""
        sizes = sorted({layer.spec.key.head_size for layer in view.layers})
        return f"keydiff keeps one anchor state for all layers, and their keys are of sizes {sizes}" if len(sizes) > 1 else None

    def begin(self) -> None:
        """Add the anchors: a state (batch, layers * kv_heads, size)."""
        place = self.context
        heads = [layer.spec.kv_heads for layer in place.layers]
        shape = ir.Shape((place.batch, sum(heads), place.layers[0].spec.key.head_size))
        self._anchor = place.states.add_input(f"anchor{place.state_suffix}", FLOAT, shape)
        self._layer_anchors = place.writer.split(place.insertion_point, self._anchor, heads)

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores by the anchor that the step's tokens are part of."""
        place, integers = self.context, self.context.writer.int64_vector
        unit = self._normalize(before, place.to_float32(before, layer.key.update))
        real = place.op(before, "Unsqueeze", [place.token_mask, integers(1, 3)])
        counted = place.op(before, "Where", [real, unit, place.writer.scalar(0.0, FLOAT)], FLOAT)
        added = place.op(before, "ReduceSum", [counted, integers(2)], keepdims=0)
        anchor = place.op(before, "Add", [self._layer_anchors[len(self._updated_anchors)], added])
        self._updated_anchors.append(anchor)
        return self._score(before, unit, anchor)

    def rescore(self, keys: ir.Value, positions: ir.Value) -> ir.Value:
        """Return the scores by the anchor before the step."""
        return self._score(self.context.insertion_point, self._normalize(self.context.insertion_point, keys), self._anchor)

    def end(self, last: ir.Node) -> None:
        """Hand the anchors on."""
        whole = (
            self._updated_anchors[0]
            if len(self._updated_anchors) == 1
            else self.context.op(last, "Concat", self._updated_anchors, axis=1)
        )
        self.context.states.set_output(f"anchor{self.context.state_suffix}", whole)

    def _normalize(self, before: ir.Node, keys: ir.Value) -> ir.Value:
        place = self.context
        norm = place.op(before, "Max", [place.norm(before, keys, keepdims=True), place.writer.scalar(_EPSILON, FLOAT)])
        return place.op(before, "Div", [keys, norm])

    def _score(self, before: ir.Node, unit: ir.Value, anchor: ir.Value) -> ir.Value:
        place = self.context
        column = place.op(before, "Unsqueeze", [self._normalize(before, anchor), place.writer.int64_vector(3)])
        cosine = place.op(before, "Squeeze", [place.op(before, "MatMul", [unit, column]), place.writer.int64_vector(3)])
        return place.op(before, "Neg", [cosine])
