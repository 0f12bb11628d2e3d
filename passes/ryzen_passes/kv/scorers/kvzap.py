"""KVzap: how much attention a token will get, foretold from the hidden state that its key and value are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import ModelError
from ryzen_passes.kv.recognition.recognized_decoder import AttentionLayer, RecognizedDecoder
from ryzen_passes.kv.scorers.estimators import Estimator
from ryzen_passes.kv.scorers.hidden_state import find_hidden_state
from ryzen_passes.kv.scorers.scorer import FLOAT, Scorer
from ryzen_passes.kv.scorers.statistics import Statistics
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView

Array = np.ndarray[Any, Any]

_LOG_EPSILON = 1e-2
"""What is added to a share of attention before its logarithm is taken: less than that is as good as none."""
_RIDGE_PENALTY = 1e-3
"""The weight of the penalty, as a share of the mean square of the hidden state."""
_QUERY_CHUNK = 512
"""Queries whose attention is in memory at once."""


class KvZapScorer(Scorer):
    """w.h + b, of the hidden state h.

    For each kv-head it is fitted to log(max a |v| + 0.01): the largest share of attention `a` that any later query of the
    head's group gives the token, times the norm of its value. The fit is a ridge regression.
    """

    name: ClassVar[str] = "kvzap"
    description: ClassVar[str] = "tokens that later queries are foretold to attend to are kept"
    paper: ClassVar[str] = "Jegou et al. 2026, arXiv 2601.07891, its linear form"
    is_calibrated: ClassVar[bool] = True

    @classmethod
    def problem(cls, view: StaticCacheView, statistics: Statistics | None) -> str | None:
        """Return that a layer's hidden state was not found, where it was not."""
        for layer in view.layers:
            if find_hidden_state(layer.value.update) is None:
                return f"the values of `{layer.spec.attention_node}` are no product of a hidden state (batch, seq, width) and weights"
        return None

    @classmethod
    def estimators(cls, decoder: RecognizedDecoder, view: StaticCacheView) -> Sequence[Estimator]:
        """Return the regression of each layer; raises ModelError where a hidden state is not found."""
        return [_RidgeRegression.from_layer(layer) for layer in decoder.layers]

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores."""
        place, statistics = self.context, self.context.statistics
        hidden = find_hidden_state(layer.value.update)
        assert statistics is not None
        assert hidden is not None
        number = place.layer_indices[place.layers.index(layer)]
        weight, bias = (place.writer.constant(statistics.tensor(number, word), FLOAT) for word in ("weight", "bias"))
        product = place.op(before, "MatMul", [place.to_float32(before, hidden), weight], FLOAT)
        return place.op(before, "Transpose", [place.op(before, "Add", [product, bias])], perm=[0, 2, 1])


@dataclass
class _RidgeRegression:
    """The regression of one layer, with what was summed up so far."""

    tensor_names: tuple[str, ...]
    """Of the queries, keys, values and hidden states."""
    window: int | None
    scale: float | None
    hidden_size: int = 0
    gram_matrix: Array | None = None
    """(width + 1, width + 1): of the hidden states and 1."""
    target_products: Array | None = None
    """(width + 1, kv_heads): of those and the targets."""
    target_moments: Array | None = None
    """(3, kv_heads): how many there were, their sum and the sum of their squares."""

    @property
    def min_tokens(self) -> int:
        """Four times as many tokens as weights."""
        return 4 * self.hidden_size

    @classmethod
    def from_layer(cls, layer: AttentionLayer) -> _RidgeRegression:
        """Return that of `layer`; raises ModelError where its hidden state is not found."""
        hidden = find_hidden_state(layer.value.update)
        query = layer.attention.inputs[0]
        if hidden is None or query is None:
            raise ModelError(
                f"the values of `{layer.attention.name}` are no product of a hidden state (batch, seq, width) and weights",
                hint="take a score without statistics: knorm, keydiff",
            )
        names = query.name or "", layer.key.update.name or "", layer.value.update.name or "", hidden.name or ""
        scale = layer.attention.attributes.get("scale")
        return cls(names, layer.visibility.window, scale.as_float() if scale is not None else None)

    def add(self, tensors: Sequence[Array], recent_window: int, token_count: int) -> None:
        """Add a stream: queries (1, heads, seq, size), keys, values, hidden states (1, seq, width)."""
        query, key, value, hidden = tensors
        most = self._max_attention(query[0], key[0], recent_window)
        wanted = np.log(most * np.linalg.norm(value[0].astype(np.float64), axis=-1) + _LOG_EPSILON)[:, :token_count].T
        known = np.concatenate([hidden[0, :token_count].astype(np.float64), np.ones((token_count, 1))], axis=1)
        if self.gram_matrix is None or self.target_products is None or self.target_moments is None:
            self.hidden_size = hidden.shape[2]
            self.gram_matrix = np.zeros((self.hidden_size + 1,) * 2)
            self.target_products = np.zeros((self.hidden_size + 1, wanted.shape[1]))
            self.target_moments = np.zeros((3, wanted.shape[1]))
        self.gram_matrix += known.T @ known
        self.target_products += known.T @ wanted
        self.target_moments += np.stack([np.full(wanted.shape[1], token_count), wanted.sum(0), (wanted**2).sum(0)])

    def solve(self) -> Mapping[str, Array]:
        """Return `weight` (width, kv_heads), `bias` (kv_heads,) and `share` (): of the variance, that they foretell."""
        assert self.gram_matrix is not None
        assert self.target_products is not None
        assert self.target_moments is not None
        count, total, square = self.target_moments
        penalty = np.eye(self.hidden_size + 1) * _RIDGE_PENALTY * np.trace(self.gram_matrix[:-1, :-1]) / self.hidden_size
        penalty[-1, -1] = 0.0
        found = np.linalg.solve(self.gram_matrix + penalty, self.target_products)
        error = square - 2 * (found * self.target_products).sum(0) + (found * (self.gram_matrix @ found)).sum(0)
        share = 1 - error / np.maximum(square - total**2 / count, 1e-12)
        return {
            "weight": found[:-1].astype(np.float32),
            "bias": found[-1].astype(np.float32),
            "share": np.array(share.mean(), np.float32),
        }

    def _max_attention(self, query: Array, key: Array, recent_window: int) -> Array:
        """Return (kv_heads, seq): the largest share of attention that a query of the group gives each token from afar."""
        heads, seq, size = query.shape
        groups = heads // key.shape[0]
        scale = self.scale if self.scale is not None else size**-0.5
        keys, at = key.astype(np.float32), np.arange(seq)
        most = np.zeros((key.shape[0], seq))
        for head in range(heads):
            for first in range(0, seq, _QUERY_CHUNK):
                now = np.arange(first, min(first + _QUERY_CHUNK, seq))[:, None]
                score = query[head, now[:, 0]].astype(np.float32) @ keys[head // groups].T * scale
                hidden = at > now if self.window is None else (at > now) | (at <= now - self.window)
                score[hidden] = -np.inf
                share = np.exp(score - score.max(axis=1, keepdims=True))
                share /= share.sum(axis=1, keepdims=True)
                share[at > now - recent_window] = 0.0
                np.maximum(most[head // groups], share.max(axis=0), out=most[head // groups])
        return most
