"""kvzap: a linear prediction, from the hidden state, of the attention that the token will receive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.analysis.constants import float_attribute
from ryzen_passes.kv.recognition.recognized_decoder import AttentionLayer, RecognizedDecoder
from ryzen_passes.kv.scoring import Estimator, Scorer, StaticCacheLayer, StaticCacheView, Statistics, TorchScorer
from ryzen_passes.kv.scoring.hidden_state import find_hidden_state
from ryzen_passes.kv.scoring.scorer import FLOAT, OTHER_SCORE_HINT

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

_LOG_EPSILON = 1e-2
"""Added to the weighted attention before the logarithm; attention below it counts as none."""
_RIDGE_PENALTY = 1e-3
"""Ridge penalty, relative to the mean square of the hidden state."""
_QUERY_CHUNK = 512
"""Number of queries whose attention is computed together, to bound memory."""


class _TorchKvZap(TorchScorer):
    needs_hidden_state = True

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_state = self.take_hidden_state()
        weight, bias = (self.statistics[name].to(hidden_state.device) for name in ("weight", "bias"))
        return (hidden_state.float() @ weight + bias).transpose(1, 2)


class KvZapScorer(Scorer):
    """Score w.h + b: h (width,) is the hidden state, the input of attention; w (width,) and b are calibrated for each head.

    They are fitted to log(a |v| + 0.01) by ridge regression: a is the largest attention weight that a later query of the head's
    group assigns to the token, and |v| the norm of its value.

    KVzap: Fast, Adaptive, and Faithful KV Cache Pruning, arXiv 2601.07891. In the paper the model is fitted to KVzip+, which
    normalizes by the hidden state and applies the output projection; the linear variant is the one here.
    """

    name: ClassVar[str] = "kvzap"
    description: ClassVar[str] = "keeps tokens that later queries are predicted to attend to"
    paper: ClassVar[str] = "Jegou et al. 2026, arXiv 2601.07891, linear variant"
    torch_form: ClassVar[type[TorchScorer]] = _TorchKvZap
    statistics_names: ClassVar[tuple[str, ...]] = ("weight", "bias")

    @classmethod
    def problem(cls, view: StaticCacheView, statistics: Statistics | None) -> str | None:
        """Return a message if the hidden state of a layer cannot be found, else None."""
        for layer in view.layers:
            if find_hidden_state(layer.value.update) is None:
                return _hidden_state_message(layer.spec.attention_node)
        return None

    @classmethod
    def estimators(cls, decoder: RecognizedDecoder, view: StaticCacheView) -> Sequence[Estimator]:
        """Return the regression of each layer; raises ModelError if a hidden state cannot be found."""
        return [_RidgeRegression.from_layer(layer) for layer in decoder.layers]

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores of the step's tokens, computed from their hidden state."""
        context, statistics = self.context, self.context.statistics
        hidden = find_hidden_state(layer.value.update)
        assert statistics is not None
        assert hidden is not None
        layer_index = context.layer_indices[context.layers.index(layer)]
        weight, bias = (context.writer.constant(statistics.tensor(layer_index, name), FLOAT) for name in ("weight", "bias"))
        product = context.op(before, "MatMul", [context.to_float32(before, hidden), weight], FLOAT)
        return context.op(before, "Transpose", [context.op(before, "Add", [product, bias])], perm=[0, 2, 1])


def _hidden_state_message(attention_node: str) -> str:
    return f"the values of `{attention_node}` are not a product of a hidden state (batch, seq, width) and constant weights"


@dataclass
class _RidgeRegression:
    """Ridge regression of one layer, with the sums accumulated so far."""

    tensor_names: tuple[str, ...]
    """Names of the queries, keys, values and hidden states."""
    window: int | None
    scale: float | None
    hidden_size: int = 0
    gram_matrix: Array | None = None
    """(width + 1, width + 1): sum of products of the features, which are the hidden state and 1."""
    target_products: Array | None = None
    """(width + 1, kv_heads): sum of products of the features and the targets."""
    target_moments: Array | None = None
    """(3, kv_heads): number of targets, their sum and the sum of their squares."""

    @property
    def min_tokens(self) -> int:
        """Minimum number of tokens: four times the number of weights."""
        return 4 * self.hidden_size

    @classmethod
    def from_layer(cls, layer: AttentionLayer) -> _RidgeRegression:
        """Return the empty regression of `layer`; raises ModelError if its hidden state cannot be found."""
        hidden = find_hidden_state(layer.value.update)
        query = layer.attention.inputs[0]
        if hidden is None or query is None:
            raise ModelError(
                _hidden_state_message(layer.attention.name or ""),
                hint=OTHER_SCORE_HINT,
            )
        names = query.name or "", layer.key.update.name or "", layer.value.update.name or "", hidden.name or ""
        return cls(names, layer.visibility.window, float_attribute(layer.attention, "scale", None))

    def add(self, tensors: Sequence[Array], recent_window: int, token_count: int) -> None:
        """Add a document: queries, keys, values (1, heads, seq, head_size) and hidden states (1, seq, width)."""
        query, key, value, hidden = tensors
        max_attention = self._max_attention(query[0], key[0], recent_window)
        targets = np.log(max_attention * np.linalg.norm(value[0].astype(np.float64), axis=-1) + _LOG_EPSILON)[:, :token_count].T
        features = np.concatenate([hidden[0, :token_count].astype(np.float64), np.ones((token_count, 1))], axis=1)
        if self.gram_matrix is None or self.target_products is None or self.target_moments is None:
            self.hidden_size = hidden.shape[2]
            self.gram_matrix = np.zeros((self.hidden_size + 1,) * 2)
            self.target_products = np.zeros((self.hidden_size + 1, targets.shape[1]))
            self.target_moments = np.zeros((3, targets.shape[1]))
        self.gram_matrix += features.T @ features
        self.target_products += features.T @ targets
        self.target_moments += np.stack([np.full(targets.shape[1], token_count), targets.sum(0), (targets**2).sum(0)])

    def solve(self) -> Mapping[str, Array]:
        """Return `weight` (width, kv_heads), `bias` (kv_heads,) and `share` (), the mean explained variance."""
        assert self.gram_matrix is not None
        assert self.target_products is not None
        assert self.target_moments is not None
        count, total, square = self.target_moments
        penalty = np.eye(self.hidden_size + 1) * _RIDGE_PENALTY * np.trace(self.gram_matrix[:-1, :-1]) / self.hidden_size
        penalty[-1, -1] = 0.0
        solution = np.linalg.solve(self.gram_matrix + penalty, self.target_products)
        error = square - 2 * (solution * self.target_products).sum(0) + (solution * (self.gram_matrix @ solution)).sum(0)
        share = 1 - error / np.maximum(square - total**2 / count, 1e-12)
        return {
            "weight": solution[:-1].astype(np.float32),
            "bias": solution[-1].astype(np.float32),
            "share": np.array(share.mean(), np.float32),
        }

    def _max_attention(self, query: Array, key: Array, recent_window: int) -> Array:
        """Return (kv_heads, seq): the largest attention weight that a query of the group assigns to each token.

        Only queries at least `recent_window` tokens after the token count.
        """
        heads, seq, size = query.shape
        group_size = heads // key.shape[0]
        scale = self.scale if self.scale is not None else size**-0.5
        keys, key_position = key.astype(np.float32), np.arange(seq)
        max_attention = np.zeros((key.shape[0], seq))
        for head in range(heads):
            for start in range(0, seq, _QUERY_CHUNK):
                query_position = np.arange(start, min(start + _QUERY_CHUNK, seq))[:, None]
                logits = query[head, query_position[:, 0]].astype(np.float32) @ keys[head // group_size].T * scale
                masked = (
                    key_position > query_position
                    if self.window is None
                    else (key_position > query_position) | (key_position <= query_position - self.window)
                )
                logits[masked] = -np.inf
                weights = np.exp(logits - logits.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                weights[key_position > query_position - recent_window] = 0.0
                np.maximum(max_attention[head // group_size], weights.max(axis=0), out=max_attention[head // group_size])
        return max_attention
