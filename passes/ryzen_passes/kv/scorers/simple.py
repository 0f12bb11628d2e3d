"""Scores that look at a token alone."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scorers.scorer import FLOAT, Scoring
from ryzen_passes.kv.static.cache_view import FixedLayer


class KeyNorm(Scoring):
    """-|k|."""

    name: ClassVar[str] = "knorm"
    says: ClassVar[str] = "keys of small norm are kept"
    paper: ClassVar[str] = "Devoto et al. 2024, arXiv 2406.11430"

    def new(self, before: ir.Node, layer: FixedLayer) -> ir.Value:
        """Return the scores."""
        return self.place.op(before, "Neg", [self.place.norm(before, layer.key.new)])


class ValueNorm(Scoring):
    """|v|."""

    name: ClassVar[str] = "value-norm"
    says: ClassVar[str] = "values of large norm are kept"
    paper: ClassVar[str] = "the value term of arXiv 2406.12335"

    def new(self, before: ir.Node, layer: FixedLayer) -> ir.Value:
        """Return the scores."""
        return self.place.norm(before, layer.value.new)


class Position(Scoring):
    """The position itself: exact to 2^24."""

    name: ClassVar[str] = "position"
    says: ClassVar[str] = "the latest are kept: a window behind the sinks"
    paper: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"

    def new(self, before: ir.Node, layer: FixedLayer) -> ir.Value:
        """Return the scores."""
        place = self.place
        number = place.op(before, "Cast", [place.new_position], FLOAT, to=int(FLOAT))
        apart = place.op(before, "Unsqueeze", [number, place.write.integers(1)])
        return place.op(before, "Expand", [apart, place.write.integers(1, layer.told.kv_heads, 1)])
