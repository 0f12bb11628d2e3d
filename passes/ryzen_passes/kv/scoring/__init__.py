"""The interface of scores in ONNX and PyTorch, and the statistics of calibrated scores."""

from __future__ import annotations

from ryzen_passes.kv.scoring.estimators import Estimator
from ryzen_passes.kv.scoring.scorer import Scorer, ScoringContext, find_scorer
from ryzen_passes.kv.scoring.statistics import Statistics
from ryzen_passes.kv.scoring.torch_scorer import TorchScorer
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView

__all__ = [
    "Estimator",
    "Scorer",
    "ScoringContext",
    "StaticCacheLayer",
    "StaticCacheView",
    "Statistics",
    "TorchScorer",
    "find_scorer",
]
