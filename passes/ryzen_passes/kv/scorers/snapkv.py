"""SnapKV: what the latest queries of a prompt attend to is kept, and what was appended since."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scorers.scorer import FLOAT, Scorer
from ryzen_passes.kv.static.cache_view import StaticCacheLayer

APPENDED_SCORE_OFFSET = 2
"""Scores of attention are means of probabilities: at most 1."""


class SnapKvScorer(Scorer):
    """Attention where a prompt was compacted, see `_kv.compacting`; of an appended token its position + 2, exact to 2^24."""

    name: ClassVar[str] = "snapkv"
    description: ClassVar[str] = "what the latest queries of a prompt attend to is kept, and what was appended since"
    paper: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469"

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores of appended tokens."""
        place = self.context
        score = place.op(before, "Cast", [place.new_position], FLOAT, to=int(FLOAT))
        above = place.op(before, "Add", [score, place.writer.scalar(APPENDED_SCORE_OFFSET, FLOAT)])
        apart = place.op(before, "Unsqueeze", [above, place.writer.int64_vector(1)])
        return place.op(before, "Expand", [apart, place.writer.int64_vector(1, layer.spec.kv_heads, 1)])
