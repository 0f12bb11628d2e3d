"""KeyDiff: keys that point elsewhere than the others are kept."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scorers.scorer import FLOAT, Place, Scoring
from ryzen_passes.kv.scorers.statistics import Statistics
from ryzen_passes.kv.static.cache_view import FixedForm, FixedLayer

_TINY = 1e-12


class KeyDiff(Scoring):
    """-cos(k, a) for the anchor a = sum over the tokens seen so far of k / |k|.

    The paper's anchor is over the tokens that are kept. This one needs no key of an evicted token, is one vector a head as a
    state, and costs a step nothing that grows.
    """

    name: ClassVar[str] = "keydiff"
    says: ClassVar[str] = "keys that point elsewhere than the mean are kept"
    paper: ClassVar[str] = "Park et al. 2025, arXiv 2504.15364"
    ages: ClassVar[bool] = True

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._parts: list[ir.Value] = []
        self._updated: list[ir.Value] = []

    @classmethod
    def problem(cls, form: FixedForm, statistics: Statistics | None) -> str | None:
        """Return that the sizes of keys differ, where they do."""
        sizes = sorted({layer.told.key.size for layer in form.layers})
        return f"keydiff keeps one anchor state for all layers, and their keys are of sizes {sizes}" if len(sizes) > 1 else None

    def begin(self) -> None:
        """Add the anchors: a state (batch, layers * kv_heads, size)."""
        place = self.place
        heads = [layer.told.kv_heads for layer in place.layers]
        shape = ir.Shape((place.batch, sum(heads), place.layers[0].told.key.size))
        self._anchor = place.states.begin(f"anchor{place.suffix}", FLOAT, shape)
        self._parts = place.write.split(place.first, self._anchor, heads)

    def new(self, before: ir.Node, layer: FixedLayer) -> ir.Value:
        """Return the scores by the anchor that the step's tokens are part of."""
        place, integers = self.place, self.place.write.integers
        unit = self._unit(before, place.wide(before, layer.key.new))
        real = place.op(before, "Unsqueeze", [place.real, integers(1, 3)])
        counted = place.op(before, "Where", [real, unit, place.write.number(0.0, FLOAT)], FLOAT)
        added = place.op(before, "ReduceSum", [counted, integers(2)], keepdims=0)
        anchor = place.op(before, "Add", [self._parts[len(self._updated)], added])
        self._updated.append(anchor)
        return self._score(before, unit, anchor)

    def told_again(self, keys: ir.Value, positions: ir.Value) -> ir.Value:
        """Return the scores by the anchor before the step."""
        return self._score(self.place.first, self._unit(self.place.first, keys), self._anchor)

    def end(self, last: ir.Node) -> None:
        """Hand the anchors on."""
        whole = self._updated[0] if len(self._updated) == 1 else self.place.op(last, "Concat", self._updated, axis=1)
        self.place.states.end(f"anchor{self.place.suffix}", whole)

    def _unit(self, before: ir.Node, keys: ir.Value) -> ir.Value:
        place = self.place
        norm = place.op(before, "Max", [place.norm(before, keys, keep=True), place.write.number(_TINY, FLOAT)])
        return place.op(before, "Div", [keys, norm])

    def _score(self, before: ir.Node, unit: ir.Value, anchor: ir.Value) -> ir.Value:
        place = self.place
        column = place.op(before, "Unsqueeze", [self._unit(before, anchor), place.write.integers(3)])
        cosine = place.op(before, "Squeeze", [place.op(before, "MatMul", [unit, column]), place.write.integers(3)])
        return place.op(before, "Neg", [cosine])
