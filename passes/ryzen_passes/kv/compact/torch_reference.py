"""Compacting in plain torch: caches that keep of a prompt what its last queries attend to, as a rewritten graph does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from ryzen_compile.spec.kv_cache import KVCacheSpec, LayerCacheSpec
from ryzen_passes.kv.query_aware_cache import QueryAwareLayer, check_supported, expose_queries

_APPENDED_SCORE_OFFSET = 2
"""What an appended token scores over its position: more than attention can be."""


class CompactingLayer(QueryAwareLayer):
    """The slots of one layer that are filled, which are the first ones, and behind them the tokens of a step under way."""

    def __init__(self, spec: LayerCacheSpec, *, single_token: bool) -> None:
        """Make the empty slots of `layer`; with `in_one` a step of one token evicts before it attends."""
        super().__init__(spec)
        self._slots, self._single_token = spec.slots or 0, single_token

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make slots for keys and values of these shapes, of which none is filled."""
        super().lazy_initialization(key_states, value_states)
        self.scores = torch.empty(self.keys.shape[:3], device=key_states.device)
        """(batch, kv_heads, rows) float32"""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a step (batch, kv_heads, seq, size) and return the rows that its queries may see."""
        super().update(key_states, value_states)
        seq = key_states.shape[2]
        self.scores = torch.cat([self.scores, self.positions[:, :, -seq:].float() + _APPENDED_SCORE_OFFSET], dim=2)
        if self._single_token and seq == 1 and self.keys.shape[2] > self._slots:
            self._evict_lowest()
        return self.keys, self.values

    def visible_rows(self, queries: torch.Tensor) -> torch.Tensor:
        """As QueriedLayer says."""
        return self.causal_visibility(queries.shape[3])

    def after_attention(self, weights: torch.Tensor) -> None:
        """Keep what the window attends to, or the best of what there is where the step holds no window.

        `weights` are as QueriedLayer says.
        """
        seq = weights.shape[3]
        if self._single_token and seq == 1:
            return
        most = self._slots
        if seq >= self._spec.recent_window:
            self.scores, most = self._rescore(weights), self._slots - self._spec.append_slots
        best = self._priority().argsort(dim=2, descending=True, stable=True)[:, :, :most]
        self._keep_rows(best.gather(2, self.positions.gather(2, best).argsort(dim=2)))

    def _rescore(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the scores (batch, kv_heads, rows) of slots and step, by the attention of the last queries."""
        window, pooling, held = self._spec.recent_window, self._spec.pooling, weights.shape[4] - weights.shape[3]
        inside = self.positions >= self._seen_tokens - window
        worth = weights[:, :, :, -window:].mean(dim=(2, 3)).masked_fill(inside, 0.0)
        free = worth.new_zeros(*worth.shape[:2], self._slots - held)
        spread = torch.cat([worth[:, :, :held], free, worth[:, :, held:]], dim=2)
        pooled = torch.nn.functional.avg_pool1d(spread, pooling, stride=1, padding=pooling // 2)
        pooled = torch.cat([pooled[:, :, :held], pooled[:, :, self._slots :]], dim=2)
        return torch.where(inside, self.positions.float() + _APPENDED_SCORE_OFFSET, pooled)

    def _evict_lowest(self) -> None:
        """Let the newest token, which is worth more than any, take the slot of the one that is worth least."""
        least = self._priority().argmin(dim=2, keepdim=True)
        slots = torch.arange(self._slots, device=least.device).expand(*least.shape[:2], self._slots)
        self._keep_rows(slots.scatter(2, least, value=self._slots))

    def _priority(self) -> torch.Tensor:
        """Return the scores (batch, kv_heads, rows), of which those of sinks are infinite."""
        return self.scores.masked_fill(self.positions < self._spec.sinks, torch.inf)

    def _keep_rows(self, rows: torch.Tensor) -> None:
        """Keep `rows` (batch, kv_heads, kept), in this order."""
        self.keys, self.values = (
            whole.gather(2, rows[..., None].expand(*rows.shape, whole.shape[3])) for whole in (self.keys, self.values)
        )
        self.positions, self.scores = self.positions.gather(2, rows), self.scores.gather(2, rows)


def compacting_cache_factory(
    spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
) -> Callable[[], Cache]:
    """Return what makes empty caches that keep what `told` says of a rewritten graph.

    `singles` and `module` are as in `Pass.in_torch`. Raises ModelError for what has no form in torch, or none without `module`.
    """
    check_supported(spec, is_complete=all(layer.append_slots for layer in spec.layers))
    expose_queries(module, len(spec.layers), "what is kept depends on the queries")
    return lambda: Cache(layers=[CompactingLayer(layer, single_token=single_token) for layer in spec.layers])
