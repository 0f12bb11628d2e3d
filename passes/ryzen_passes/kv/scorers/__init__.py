"""Scores: what a token is worth keeping; high is kept. One score a file, its form in a graph."""

from __future__ import annotations

from ryzen_passes.kv.scorers.keydiff import KeyDiff
from ryzen_passes.kv.scorers.kvzap import KvZap
from ryzen_passes.kv.scorers.scorer import Place, Scoring
from ryzen_passes.kv.scorers.simple import KeyNorm, Position, ValueNorm
from ryzen_passes.kv.scorers.snapkv import SnapKv
from ryzen_passes.kv.scorers.triattention import TriAttention

SCORES: dict[str, type[Scoring]] = {
    "knorm": KeyNorm,
    "value-norm": ValueNorm,
    "position": Position,
    "keydiff": KeyDiff,
    "kvzap": KvZap,
    "triattention": TriAttention,
    "snapkv": SnapKv,
}

__all__ = ["SCORES", "Place", "Scoring"]
