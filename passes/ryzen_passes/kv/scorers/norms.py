"""Scores that depend only on the token itself: key norm, value norm and position."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scorers.scorer import FLOAT, Scorer
from ryzen_passes.kv.static.cache_view import StaticCacheLayer


class KeyNormScorer(Scorer):
    """Score -|k|: the negative Euclidean norm of the key."""

    name: ClassVar[str] = "knorm"
    description: ClassVar[str] = "keeps keys with a small norm"
    paper: ClassVar[str] = "Devoto et al. 2024, arXiv 2406.11430"

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores of the step's tokens."""
        return self.context.op(before, "Neg", [self.context.norm(before, layer.key.update)])


class ValueNormScorer(Scorer):
    """Score |v|: the Euclidean norm of the value."""

    name: ClassVar[str] = "value-norm"
    description: ClassVar[str] = "keeps values with a large norm"
    paper: ClassVar[str] = "the value norm term of arXiv 2406.12335"

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores of the step's tokens."""
        return self.context.norm(before, layer.value.update)


class PositionScorer(Scorer):
    """Score equal to the token position in float32, exact up to 2^24."""

    name: ClassVar[str] = "position"
    description: ClassVar[str] = "keeps the latest tokens: a sliding window after the sinks"
    paper: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores of the step's tokens."""
        context = self.context
        position = context.op(before, "Cast", [context.new_position], FLOAT, to=int(FLOAT))
        expandable = context.op(before, "Unsqueeze", [position, context.writer.int64_vector(1)])
        return context.op(before, "Expand", [expandable, context.writer.int64_vector(1, layer.spec.kv_heads, 1)])
