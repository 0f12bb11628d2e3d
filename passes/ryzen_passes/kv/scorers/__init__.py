"""Eviction scores: each file writes one score into a graph; the tokens with the highest scores are kept."""

from __future__ import annotations

from ryzen_passes.kv.scorers.keydiff import KeyDiffScorer
from ryzen_passes.kv.scorers.kvzap import KvZapScorer
from ryzen_passes.kv.scorers.norms import KeyNormScorer, PositionScorer, ValueNormScorer
from ryzen_passes.kv.scorers.scorer import Scorer, ScoringContext
from ryzen_passes.kv.scorers.snapkv import SnapKvScorer
from ryzen_passes.kv.scorers.triattention import TriAttentionScorer

SCORERS: dict[str, type[Scorer]] = {
    "knorm": KeyNormScorer,
    "value-norm": ValueNormScorer,
    "position": PositionScorer,
    "keydiff": KeyDiffScorer,
    "kvzap": KvZapScorer,
    "triattention": TriAttentionScorer,
    "snapkv": SnapKvScorer,
}

__all__ = ["SCORERS", "ScoringContext", "Scorer"]
