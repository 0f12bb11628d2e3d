"""PyTorch reference of kv-compact: a Transformers cache that compacts a prompt as the rewritten graph does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from ryzen_compile.spec.kv_cache import Compaction, KVCacheSpec, LayerCacheSpec
from ryzen_passes.kv.compact.snapkv import TorchSnapKv
from ryzen_passes.kv.query_aware_cache import ExactLayer, QueryAwareLayer, expose_queries


class CompactingLayer(QueryAwareLayer):
    """Cache layer that holds the slots, followed by the tokens of the current step.

    The filled slots of a head are the first ones, unless steps of one token have replaced tokens behind the attention window in
    some heads only; free slots have the position -1.
    """

    def __init__(self, spec: LayerCacheSpec, policy: Compaction, *, single_token: bool) -> None:
        """Create an empty layer that follows `policy`; with `single_token` a step of one token evicts before it attends."""
        super().__init__(spec)
        self._policy, self._slots, self._single_token = policy, policy.slots, single_token
        self._scorer = TorchSnapKv()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create empty tensors that match the given keys and values in all dims but seq."""
        super().lazy_initialization(key_states, value_states)
        self.scores = torch.empty(self.keys.shape[:3], device=key_states.device)
        """(batch, kv_heads, rows) float32"""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values (batch, kv_heads, seq, head_size) of a step; return all rows that its queries may read."""
        super().update(key_states, value_states)
        seq = key_states.shape[2]
        new_scores = self._scorer.score_new_tokens(key_states, value_states, self.positions[:, 0, -seq:])
        self.scores = torch.cat([self.scores, new_scores], dim=2)
        if self._single_token and seq == 1:
            self._place_newest()
        return self.keys, self.values

    def visible_rows(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the rows that each query attends to: its own and all earlier ones within the window."""
        return self.causal_visibility(queries.shape[3])

    def after_attention(self, weights: torch.Tensor) -> None:
        """Evict the rows with the lowest priority.

        A step of at least `recent_window` tokens rescores all rows by the attention of its last queries and leaves
        `append_slots` slots free. A shorter step keeps the scores and fills all slots.
        """
        seq = weights.shape[3]
        if self._single_token and seq == 1:
            return
        max_rows = self._slots
        if seq >= self._policy.recent_window:
            self.scores, max_rows = self._rescore(weights), self._slots - self._policy.append_slots
        best_rows = self._priority().argsort(dim=2, descending=True, stable=True)[:, :, :max_rows]
        order = self.positions.masked_fill(self.positions < 0, self._seen_tokens)
        self._keep_rows(best_rows.gather(2, order.gather(2, best_rows).argsort(dim=2, stable=True)))

    def _rescore(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the scores (batch, kv_heads, rows) of all rows by the attention of the last queries."""
        window, pooling, filled = self._policy.recent_window, self._policy.pooling, weights.shape[4] - weights.shape[3]
        in_window = self.positions >= self._seen_tokens - window
        mean = weights[:, :, :, -window:].mean(dim=(2, 3))
        attention, positions, in_window = (self._with_free_slots(rows, filled) for rows in (mean, self.positions, in_window))
        scores = self._scorer.score_prompt(attention, positions, in_window, pooling)
        return torch.cat([scores[:, :, :filled], scores[:, :, self._slots :]], dim=2)

    def _with_free_slots(self, rows: torch.Tensor, filled: int) -> torch.Tensor:
        """Return `rows` (batch, kv_heads, filled + seq) in the order of memory: zeros for free slots after the filled ones."""
        free = rows.new_zeros(*rows.shape[:2], self._slots - filled)
        return torch.cat([rows[:, :, :filled], free, rows[:, :, filled:]], dim=2)

    def _place_newest(self) -> None:
        """Move the newest token into the first free slot of each head, or into that of the row with the lowest priority.

        A slot whose token is behind the attention window is free.
        """
        newest = self.keys.shape[2] - 1
        count = min(newest + 1, self._slots)
        columns = torch.arange(count, device=self.keys.device).expand(*self.keys.shape[:2], count)
        first_seen = max(0, self._seen_tokens - (self._spec.window or self._seen_tokens))
        is_free = (self.positions[:, :, :count] < first_seen) | (columns == newest)
        lowest = self._priority()[:, :, :count].masked_fill(is_free, -torch.inf).argmin(dim=2, keepdim=True)
        self._keep_rows(columns.scatter(2, lowest, value=newest), is_filled=(columns != newest) | (columns == lowest))

    def _priority(self) -> torch.Tensor:
        """Return the scores (batch, kv_heads, rows), with infinity for sinks and minus infinity for free slots."""
        priority = self.scores.masked_fill(self.positions < self._policy.sinks, torch.inf)
        return priority.masked_fill(self.positions < 0, -torch.inf)

    def _keep_rows(self, rows: torch.Tensor, is_filled: torch.Tensor | None = None) -> None:
        """Keep the rows with the indices `rows` (batch, kv_heads, kept), in this order. Those that are not filled are freed."""
        positions = self.positions.gather(2, rows)
        self.positions = positions if is_filled is None else positions.where(is_filled, -1)
        is_free = self.positions < 0
        self.scores = self.scores.gather(2, rows).masked_fill(is_free, 0)
        self.keys, self.values = (
            tensor.gather(2, rows[..., None].expand(*rows.shape, tensor.shape[3])).masked_fill(is_free[..., None], 0)
            for tensor in (self.keys, self.values)
        )


def compacting_cache_factory(
    spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
) -> Callable[[], Cache]:
    """Return a factory for empty Transformers caches that follow the cache policy in `spec`.

    `single_token` and `module` are as in `KVCacheReference`. Raises ModelError if `spec` has no Transformers equivalent or
    `module` is None.
    """
    expose_queries(module, len(spec.layers), "the set of kept tokens depends on the queries")

    def create_layer(layer: LayerCacheSpec) -> QueryAwareLayer:
        if isinstance(layer.policy, Compaction):
            return CompactingLayer(layer, layer.policy, single_token=single_token)
        return ExactLayer(layer)

    return lambda: Cache(layers=[create_layer(layer) for layer in spec.layers])
