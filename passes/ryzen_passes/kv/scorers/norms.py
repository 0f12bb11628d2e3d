"""Scores that look at a token alone."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scorers.scorer import FLOAT, Scorer
from ryzen_passes.kv.static.cache_view import StaticCacheLayer


class KeyNormScorer(Scorer):
    """-|k|."""

    name: ClassVar[str] = "knorm"
    description: ClassVar[str] = "keys of small norm are kept"
    paper: ClassVar[str] = "Devoto et al. 2024, arXiv 2406.11430"

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores."""
        return self.context.op(before, "Neg", [self.context.norm(before, layer.key.update)])


class ValueNormScorer(Scorer):
    """|v|."""

    name: ClassVar[str] = "value-norm"
    description: ClassVar[str] = "values of large norm are kept"
    paper: ClassVar[str] = "the value term of arXiv 2406.12335"

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores."""
        return self.context.norm(before, layer.value.update)


class PositionScorer(Scorer):
    """The position itself: exact to 2^24."""

    name: ClassVar[str] = "position"
    description: ClassVar[str] = "the latest are kept: a window behind the sinks"
    paper: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores."""
        place = self.context
        number = place.op(before, "Cast", [place.new_position], FLOAT, to=int(FLOAT))
        apart = place.op(before, "Unsqueeze", [number, place.writer.int64_vector(1)])
        return place.op(before, "Expand", [apart, place.writer.int64_vector(1, layer.spec.kv_heads, 1)])
