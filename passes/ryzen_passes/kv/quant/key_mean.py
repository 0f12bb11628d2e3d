"""Mean keys: a constant part of the keys, which is subtracted before they are quantized.

Softmax is invariant to a constant that is added to all scores of a query, and the product of the query with the mean key is
one. Keys without their mean are shorter, and so is their quantization error. SageAttention, Zhang et al. 2024, arXiv
2410.02367, subtracts the mean over the keys of a call. Here it is calibrated, so that a token has one code for all steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.analysis.constants import float_attribute
from ryzen_passes.kv.recognition.recognized_decoder import RecognizedDecoder
from ryzen_passes.kv.scoring.estimators import Estimator
from ryzen_passes.kv.static.cache_view import StaticCacheView

Array = np.ndarray[Any, Any]

KEY_MEAN = "key-mean"
"""The kind of the statistics, and the name of the tensor (kv_heads, head_size) float32 of each layer."""
_MIN_TOKENS = 256


def key_mean_problem(view: StaticCacheView) -> str | None:
    """Return why attention would depend on the mean that is subtracted, or None."""
    for layer in view.layers:
        if float_attribute(layer.attention, "softcap", 0.0):
            node = layer.spec.attention_node
            return f"the scores of `{node}` are soft-capped, so that they change if the mean key is subtracted"
    return None


def key_mean_estimators(decoder: RecognizedDecoder, view: StaticCacheView) -> Sequence[Estimator]:
    """Return the estimator of the mean keys of each layer; raises ModelError if attention would depend on the mean."""
    if (problem := key_mean_problem(view)) is not None:
        raise ModelError(problem, hint="use kv-quant without `statistics`: keys=8")
    return [KeyMeanEstimator((layer.key.update.name or "",)) for layer in decoder.layers]


@dataclass
class KeyMeanEstimator:
    """The mean of the keys of one layer, as attention reads them."""

    tensor_names: tuple[str, ...]
    count: int = 0
    key_sum: Array | float = 0.0
    """(kv_heads, head_size) float64"""
    square_sum: Array | float = 0.0
    """(kv_heads,) float64: the sum of the squared norms."""

    @property
    def min_tokens(self) -> int:
        """Minimum number of tokens: 256."""
        return _MIN_TOKENS

    def add(self, tensors: Sequence[Array], recent_window: int, token_count: int) -> None:
        """Add the first `token_count` keys of a document, (1, kv_heads, seq, head_size)."""
        keys = tensors[0][0, :, :token_count].astype(np.float64)
        self.count += token_count
        self.key_sum = self.key_sum + keys.sum(axis=1)
        self.square_sum = self.square_sum + np.square(keys).sum(axis=(1, 2))

    def solve(self) -> Mapping[str, Array]:
        """Return `key-mean` (kv_heads, head_size), and `share` (), the mean over heads of its share of the squared norms."""
        mean = np.asarray(self.key_sum) / self.count
        share = np.square(mean).sum(axis=1) / np.maximum(np.asarray(self.square_sum) / self.count, 1e-30)
        return {KEY_MEAN: mean.astype(np.float32), "share": np.array(share.mean(), np.float32)}
