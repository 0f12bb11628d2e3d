"""KVzap: how much attention a token will get, foretold from the hidden state that its key and value are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import ModelError
from ryzen_passes.kv.recognition.decoder import Decoder, Layer
from ryzen_passes.kv.scorers.estimators import Fit
from ryzen_passes.kv.scorers.hidden_state import hidden_of
from ryzen_passes.kv.scorers.scorer import FLOAT, Scoring
from ryzen_passes.kv.scorers.statistics import Statistics
from ryzen_passes.kv.static.cache_view import FixedForm, FixedLayer

Array = np.ndarray[Any, Any]

_LEAST = 1e-2
"""What is added to a share of attention before its logarithm is taken: less than that is as good as none."""
_RIDGE = 1e-3
"""The weight of the penalty, as a share of the mean square of the hidden state."""
_ROWS = 512
"""Queries whose attention is in memory at once."""


class KvZap(Scoring):
    """w.h + b, of the hidden state h.

    For each kv-head it is fitted to log(max a |v| + 0.01): the largest share of attention `a` that any later query of the
    head's group gives the token, times the norm of its value. The fit is a ridge regression.
    """

    name: ClassVar[str] = "kvzap"
    says: ClassVar[str] = "tokens that later queries are foretold to attend to are kept"
    paper: ClassVar[str] = "Jegou et al. 2026, arXiv 2601.07891, its linear form"
    is_calibrated: ClassVar[bool] = True

    @classmethod
    def problem(cls, form: FixedForm, statistics: Statistics | None) -> str | None:
        """Return that a layer's hidden state was not found, where it was not."""
        for layer in form.layers:
            if hidden_of(layer.value.new) is None:
                return (
                    f"the values of `{layer.told.attention}` are no product of a hidden state (batch, seq, width) and weights"
                )
        return None

    @classmethod
    def fits(cls, decoder: Decoder, form: FixedForm) -> Sequence[Fit]:
        """Return the regression of each layer; raises ModelError where a hidden state is not found."""
        return [_Regression.of(layer) for layer in decoder.layers]

    def new(self, before: ir.Node, layer: FixedLayer) -> ir.Value:
        """Return the scores."""
        place, statistics = self.place, self.place.statistics
        hidden = hidden_of(layer.value.new)
        assert statistics is not None
        assert hidden is not None
        number = place.numbers[place.layers.index(layer)]
        weight, bias = (place.write.constant(statistics.tensor(number, word), FLOAT) for word in ("weight", "bias"))
        product = place.op(before, "MatMul", [place.wide(before, hidden), weight], FLOAT)
        return place.op(before, "Transpose", [place.op(before, "Add", [product, bias])], perm=[0, 2, 1])


@dataclass
class _Regression:
    """The regression of one layer, with what was summed up so far."""

    names: tuple[str, ...]
    """Of the queries, keys, values and hidden states."""
    window: int | None
    scale: float | None
    width: int = 0
    squares: Array | None = None
    """(width + 1, width + 1): of the hidden states and 1."""
    products: Array | None = None
    """(width + 1, kv_heads): of those and the targets."""
    targets: Array | None = None
    """(3, kv_heads): how many there were, their sum and the sum of their squares."""

    @property
    def least(self) -> int:
        """Four times as many tokens as weights."""
        return 4 * self.width

    @classmethod
    def of(cls, layer: Layer) -> _Regression:
        """Return that of `layer`; raises ModelError where its hidden state is not found."""
        hidden = hidden_of(layer.value.new)
        query = layer.attention.inputs[0]
        if hidden is None or query is None:
            raise ModelError(
                f"the values of `{layer.attention.name}` are no product of a hidden state (batch, seq, width) and weights",
                hint="take a score without statistics: knorm, keydiff",
            )
        names = query.name or "", layer.key.new.name or "", layer.value.new.name or "", hidden.name or ""
        scale = layer.attention.attributes.get("scale")
        return cls(names, layer.sight.window, scale.as_float() if scale is not None else None)

    def add(self, found: Sequence[Array], recent: int, counted: int) -> None:
        """Add a stream: queries (1, heads, seq, size), keys, values, hidden states (1, seq, width)."""
        query, key, value, hidden = found
        most = self._most(query[0], key[0], recent)
        wanted = np.log(most * np.linalg.norm(value[0].astype(np.float64), axis=-1) + _LEAST)[:, :counted].T
        known = np.concatenate([hidden[0, :counted].astype(np.float64), np.ones((counted, 1))], axis=1)
        if self.squares is None or self.products is None or self.targets is None:
            self.width = hidden.shape[2]
            self.squares = np.zeros((self.width + 1,) * 2)
            self.products = np.zeros((self.width + 1, wanted.shape[1]))
            self.targets = np.zeros((3, wanted.shape[1]))
        self.squares += known.T @ known
        self.products += known.T @ wanted
        self.targets += np.stack([np.full(wanted.shape[1], counted), wanted.sum(0), (wanted**2).sum(0)])

    def solve(self) -> Mapping[str, Array]:
        """Return `weight` (width, kv_heads), `bias` (kv_heads,) and `share` (): of the variance, that they foretell."""
        assert self.squares is not None
        assert self.products is not None
        assert self.targets is not None
        count, total, square = self.targets
        penalty = np.eye(self.width + 1) * _RIDGE * np.trace(self.squares[:-1, :-1]) / self.width
        penalty[-1, -1] = 0.0
        found = np.linalg.solve(self.squares + penalty, self.products)
        error = square - 2 * (found * self.products).sum(0) + (found * (self.squares @ found)).sum(0)
        share = 1 - error / np.maximum(square - total**2 / count, 1e-12)
        return {
            "weight": found[:-1].astype(np.float32),
            "bias": found[-1].astype(np.float32),
            "share": np.array(share.mean(), np.float32),
        }

    def _most(self, query: Array, key: Array, recent: int) -> Array:
        """Return (kv_heads, seq): the largest share of attention that a query of the group gives each token from afar."""
        heads, seq, size = query.shape
        groups = heads // key.shape[0]
        scale = self.scale if self.scale is not None else size**-0.5
        keys, at = key.astype(np.float32), np.arange(seq)
        most = np.zeros((key.shape[0], seq))
        for head in range(heads):
            for first in range(0, seq, _ROWS):
                now = np.arange(first, min(first + _ROWS, seq))[:, None]
                score = query[head, now[:, 0]].astype(np.float32) @ keys[head // groups].T * scale
                hidden = at > now if self.window is None else (at > now) | (at <= now - self.window)
                score[hidden] = -np.inf
                share = np.exp(score - score.max(axis=1, keepdims=True))
                share /= share.sum(axis=1, keepdims=True)
                share[at > now - recent] = 0.0
                np.maximum(most[head // groups], share.max(axis=0), out=most[head // groups])
        return most
