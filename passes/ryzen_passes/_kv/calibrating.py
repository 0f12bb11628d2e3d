"""Fitting KVzap: from the hidden state of a token to the logarithm of what later queries make of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import ModelError, ShapeError
from ryzen_compile.interface import InputSpec
from ryzen_compile.plan.observe import tap
from ryzen_passes._kv.decoder import Decoder, Layer, Unrecognised
from ryzen_passes._kv.hidden import hidden_of
from ryzen_passes._kv.recognise import recognise
from ryzen_passes._kv.statistics import Statistics, Told, fingerprint

Array = np.ndarray[Any, Any]

_LEAST = 1e-4
"""What is added to a share of attention before its logarithm is taken: less than that is as good as none."""
_RIDGE = 1e-3
"""The weight of the penalty, as a share of the mean square of the hidden state."""
_ROWS = 512
"""Queries whose attention is in memory at once."""


def calibrate(model: ir.Model, streams: Iterable[Array], path: str | os.PathLike[str], recent: int) -> str:
    """Fit to `model`, as it was exported, on `streams` of ids, and write the statistics to `path`.

    The target of a token is, for each kv-head, log(max a |v| + 1e-4): the largest share of attention `a` that any query of the
    head's group gives it from `recent` tokens behind it on, times the norm of its value. The fit is a ridge regression. The
    last eighth of each stream tells too little of its later queries and is left out.

    Raises ModelError for what is no decoder, or one whose values come of no hidden state that was found; ShapeError where the
    streams are too few or too short.
    """
    try:
        decoder = recognise(model)
    except Unrecognised as why:
        raise ModelError(f"`{why.where}`: {why.says}", hint=why.hint) from None
    fits = [_Fit.of(layer) for layer in decoder.layers]
    run = tap(decoder.model, list(dict.fromkeys(name for fit in fits for name in fit.names)))
    tokens = 0
    for stream in streams:
        ids = np.asarray(stream, np.int64).reshape(1, -1)
        counted = ids.shape[1] - max(recent, ids.shape[1] // 8)
        if counted < 1:
            continue
        tokens += counted
        found = run(_feed(decoder, ids))
        for fit in fits:
            fit.add([found[name] for name in fit.names], recent, counted)
    widest = max(fit.width for fit in fits)
    if tokens < 4 * widest:
        raise ShapeError(
            f"{tokens} tokens with later ones behind them are too few to fit {widest} weights",
            hint=f"give streams of over {recent} tokens, {4 * widest} in all",
        )
    tensors, shares = {}, []
    for number, fit in enumerate(fits):
        tensors[f"{number}.weight"], tensors[f"{number}.bias"], share = fit.solve()
        shares.append(share)
    told = Told(score="kvzap", model=fingerprint(decoder.model), layers=len(fits), tokens=tokens, recent=recent)
    Statistics(told, tensors).write(path)
    per_layer = ", ".join(f"{share:.2f}" for share in shares)
    return f"fitted to {tokens} tokens; share of the variance that it foretells, by layer: {per_layer}"


def _feed(decoder: Decoder, ids: Array) -> dict[str, Array]:
    """Return what the decoder takes for a first step of `ids` (1, seq)."""
    feed: dict[str, Array] = {}
    for spec in decoder.interface.inputs:
        feed[spec.name] = _given(decoder, spec, ids)
    return feed


def _given(decoder: Decoder, spec: InputSpec, ids: Array) -> Array:
    if spec.name == decoder.ids.name:
        return ids.astype(spec.dtype)
    if spec.role == "mask":
        return np.ones(ids.shape, spec.dtype)
    if spec.role == "positions":
        return np.arange(ids.shape[1])[None].astype(spec.dtype)
    state = next((state for state in decoder.interface.states if state.input == spec.name), None)
    if state is None or state.grows is None or spec.dims is None:
        raise ModelError(f"`{spec.name}` is neither ids, a mask, positions nor a cache that grows", hint="export it anew")
    dims = [0 if axis == state.grows else dim for axis, dim in enumerate(spec.dims)]
    return np.zeros([1 if isinstance(dim, str) else dim for dim in dims], spec.dtype)


@dataclass
class _Fit:
    """The regression of one layer, with what was summed up so far."""

    names: tuple[str, str, str, str]
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

    @classmethod
    def of(cls, layer: Layer) -> _Fit:
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

    def solve(self) -> tuple[Array, Array, float]:
        """Return weights (width, kv_heads), biases (kv_heads,), and the share of the variance that they foretell."""
        assert self.squares is not None
        assert self.products is not None
        assert self.targets is not None
        count, total, square = self.targets
        penalty = np.eye(self.width + 1) * _RIDGE * np.trace(self.squares[:-1, :-1]) / self.width
        penalty[-1, -1] = 0.0
        found = np.linalg.solve(self.squares + penalty, self.products)
        error = square - 2 * (found * self.products).sum(0) + (found * (self.squares @ found)).sum(0)
        share = 1 - error / np.maximum(square - total**2 / count, 1e-12)
        return found[:-1].astype(np.float32), found[-1].astype(np.float32), float(share.mean())

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
