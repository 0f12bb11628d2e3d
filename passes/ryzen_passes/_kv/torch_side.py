"""The same eviction in plain torch: a cache for transformers' decoders that keeps what a rewritten graph keeps.

A rewritten graph is held to it: where the two differ the rewrite is wrong, and where this differs from a cache that keeps all,
that is what the method itself costs. It shares no code with the rewrite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ryzen_compile.errors import ModelError, did_you_mean
from ryzen_compile.graph.cache_map import CachedLayer, CacheMap

_LARGEST = torch.finfo(torch.float32).max


class Score(Protocol):
    """What tokens are worth keeping, told when they are appended; high is kept."""

    def new(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return (batch, kv_heads, seq) float32 for a step's `keys` and `values` (batch, kv_heads, seq, size).

        `positions` is (batch, seq) int64. Keys are as attention reads them: rotated, where the model rotates them.
        """


class _KeyNorm:
    """Keys of small norm are kept: -|k|."""

    def new(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return -keys.float().norm(dim=-1)


class _ValueNorm:
    """Values of large norm are kept: |v|."""

    def new(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return values.float().norm(dim=-1)


class _Position:
    """The latest are kept."""

    def new(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return positions.float()[:, None].expand(keys.shape[:3])


SCORES: dict[str, Score] = {"knorm": _KeyNorm(), "value-norm": _ValueNorm(), "position": _Position()}
"""By the names of `scores.SCORES`."""


class EvictingLayer(CacheLayerMixin):  # type: ignore[misc]
    """The slots of one layer. Rows of a batch have equal lengths and no padding.

    The slots that are filled are the first ones, as a slot is only given up to a token that takes it. They are in the order
    of the graph's, so that equal scores are settled as there.
    """

    def __init__(self, score: Score, *, slots: int, sinks: int, recent: int, in_one: bool) -> None:
        """Make empty slots; with `in_one` a step of one token evicts before it attends, as a graph of such steps does."""
        super().__init__()
        self._score, self._slots, self._sinks, self._recent, self._in_one = score, slots, sinks, recent, in_one
        self._seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make slots of the shapes of the first step, of which none is filled."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.scores = torch.empty(self.keys.shape[:3], device=key_states.device)
        """(batch, kv_heads, filled) float32"""
        self.positions = torch.empty(self.keys.shape[:3], dtype=torch.int64, device=key_states.device)
        """(batch, kv_heads, filled)"""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a step (batch, kv_heads, seq, size) and return the keys and values that its queries see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, seq, _ = key_states.shape
        positions = torch.arange(self._seen, self._seen + seq, device=key_states.device).expand(batch, seq)
        new = self._score.new(key_states, value_states, positions).nan_to_num(-_LARGEST).clamp(-_LARGEST, _LARGEST)
        keys, values = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        scores = torch.cat([self.scores, new], dim=2)
        places = torch.cat([self.positions, positions[:, None].expand(batch, heads, seq)], dim=2)
        self._seen += seq
        kept = self._kept(scores, places, seq)
        self.keys, self.values = (_take(whole, kept) for whole in (keys, values))
        self.scores, self.positions = scores.gather(2, kept), places.gather(2, kept)
        return (self.keys, self.values) if self._in_one and seq == 1 else (keys, values)

    def _kept(self, scores: torch.Tensor, positions: torch.Tensor, seq: int) -> torch.Tensor:
        """Return (batch, kv_heads, kept): which of the slots, and of the step's tokens behind them, each slot holds next."""
        batch, heads, count = scores.shape
        here = torch.arange(count, device=scores.device).expand(batch, heads, count)
        surplus, held = count - self._slots, count - seq
        if surplus <= 0:
            return here
        may_go = (positions >= self._sinks) & (positions < self._seen - self._recent)
        worth = scores.masked_fill(~may_go, torch.inf)
        goes = torch.zeros_like(may_go).scatter(2, worth.argsort(dim=2, stable=True)[:, :, :surplus], value=True)
        staying = held + goes[:, :, held:].int().argsort(dim=2, stable=True)
        slots = torch.arange(self._slots, device=scores.device).expand(batch, heads, self._slots)
        is_free = torch.ones_like(slots, dtype=torch.bool)
        is_free[:, :, :held] = goes[:, :, :held]
        nth = (is_free.cumsum(dim=2) - 1).clamp(min=0, max=seq - 1)
        return torch.where(is_free, staying.gather(2, nth), slots)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a step of `query_length` sees, and the position that a causal mask takes the first to have."""
        held = self._held()
        seen = held + query_length
        return (min(seen, self._slots) if self._in_one and query_length == 1 else seen), self._seen - held

    def get_seq_length(self) -> int:
        """Return how many tokens it has seen."""
        return self._seen

    def get_max_length(self) -> int:
        """Return -1: sequences may be of any length."""
        return -1

    def reset(self) -> None:
        """Begin anew."""
        self.is_initialized, self._seen = False, 0

    def _held(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0


def evicting(
    told: CacheMap, *, singles: bool, score_of: Callable[[int, CachedLayer], Score] | None = None
) -> Callable[[], Cache]:
    """Return what makes empty caches that keep what `told` says of a rewritten graph.

    `singles` is as in `Pass.in_torch`. `score_of` gives the score of a layer by its place and itself (default: by its method,
    from SCORES). Raises ModelError for what has no form in torch yet.
    """
    for at, layer in enumerate(told.layers):
        if layer.window is not None:
            raise ModelError(
                f"layer {at} sees a window of {layer.window} tokens: transformers makes its mask, and knows nothing of slots",
                hint="hold it to the PyTorch module without eviction",
            )
    if len({layer.slots for layer in told.layers}) > 1:
        raise ModelError(
            "layers keep different numbers of tokens: transformers makes one mask for all of them",
            hint="hold it to the PyTorch module without eviction",
        )
    scores = [(score_of or _by_method)(at, layer) for at, layer in enumerate(told.layers)]

    def make() -> Cache:
        return Cache(
            layers=[
                EvictingLayer(score, slots=layer.slots or 0, sinks=layer.sinks, recent=layer.recent, in_one=singles)
                for score, layer in zip(scores, told.layers, strict=True)
            ]
        )

    return make


def _by_method(at: int, layer: CachedLayer) -> Score:
    if layer.method not in SCORES:
        raise ModelError(
            f"layer {at} evicts by `{layer.method}`, which has no form in torch", hint=did_you_mean(layer.method, [*SCORES])
        )
    return SCORES[layer.method]


def _take(whole: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the rows `kept` (batch, kv_heads, kept) of `whole` (batch, kv_heads, rows, size)."""
    return whole.gather(2, kept[..., None].expand(*kept.shape, whole.shape[3]))
