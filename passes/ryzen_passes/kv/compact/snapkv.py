"""SnapKV score: keeps the prompt tokens that the last queries of the prompt attend to, and all tokens appended later."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scoring.scorer import FLOAT, Scorer
from ryzen_passes.kv.static.cache_view import StaticCacheLayer

APPENDED_SCORE_OFFSET = 2
"""Puts appended tokens above attention scores, which are mean probabilities and at most 1."""


class SnapKvScorer(Scorer):
    """Score of tokens that are appended after a prompt: the position + 2 in float32, exact up to 2^24.

    The scores of a compacted prompt are attention probabilities; `kv/compact` writes them.
    """

    name: ClassVar[str] = "snapkv"
    description: ClassVar[str] = "keeps prompt tokens that the last prompt queries attend to, and later tokens"
    paper: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469"

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores of the step's tokens as appended tokens."""
        context = self.context
        score = context.op(before, "Add", [context.position_score(before), context.writer.scalar(APPENDED_SCORE_OFFSET, FLOAT)])
        return context.expand_to_heads(before, score, layer)
