"""PyTorch reference of kv-evict: a Transformers cache that keeps the same tokens as the rewritten graph.

Rewritten graphs are compared with this reference. A difference between the two is an error of the rewrite; a difference between
this reference and a full cache is the cost of the method. Each score has a form in PyTorch, `Scorer.torch_form`, next to its
form in ONNX; the two forms, and this cache and the rewrite, share no code but the reader of statistics.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ryzen_compile.errors import ModelError, UsageError
from ryzen_compile.spec.kv_cache import AppendEvictWrite, Eviction, KVCacheSpec, LayerCacheSpec, StatisticsRef
from ryzen_passes.kv.scoring.scorer import find_scorer
from ryzen_passes.kv.scoring.statistics import Statistics, read_statistics
from ryzen_passes.kv.scoring.statistics_lookup import find_statistics
from ryzen_passes.kv.scoring.torch_scorer import TorchScorer
from ryzen_passes.kv.torch_caches import FULL_CACHE_HINT, attention_modules, cache_layer_for

_FLOAT32_MAX = torch.finfo(torch.float32).max


@runtime_checkable
class HiddenStateListener(Protocol):
    """A cache layer that receives the input of attention."""

    def on_hidden_state(self, hidden_state: torch.Tensor) -> torch.Tensor | None:
        """Process the hidden state (batch, seq, width) of a step; return a mask to replace the module's, or None to keep it.

        The mask (batch, heads, seq, rows) is added to the attention logits; `update` fills in its values.
        """


class EvictingLayer(CacheLayerMixin):  # type: ignore[misc]
    """Cache layer with a fixed number of slots; the sequences of a batch have equal lengths and no padding.

    The filled slots of a head are always the first ones, because an evicted token is replaced by another. The slots have the
    same order as in the graph, so that ties between scores are resolved in the same way. With an attention window, heads may
    differ in their number of filled slots; the layer has as many columns as steps without a window would have filled.
    """

    def __init__(
        self, scorer: TorchScorer, spec: LayerCacheSpec, policy: Eviction, *, single_token: bool, builds_mask: bool = False
    ) -> None:
        """Create an empty layer that follows `policy`.

        With `single_token` a step of one token evicts before it attends, as in a graph for single tokens. With `builds_mask`
        the layer builds its own attention mask from the positions that each head keeps.
        """
        super().__init__()
        self.scorer = scorer
        self._spec, self._policy, self._slots = spec, policy, policy.slots
        self._single_token, self._builds_mask = single_token, builds_mask
        self._mask: torch.Tensor | None = None
        self._seen_tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create empty tensors that match the given keys and values in all dims but seq."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.scores = torch.empty(self.keys.shape[:3], device=key_states.device)
        """(batch, kv_heads, filled) float32"""
        self.positions = torch.empty(self.keys.shape[:3], dtype=torch.int64, device=key_states.device)
        """(batch, kv_heads, filled); -1 for a free slot"""
        self.is_initialized = True

    def on_hidden_state(self, hidden_state: torch.Tensor) -> torch.Tensor | None:
        """Pass the hidden state to the scorer and return the mask that `update` fills, if the layer builds one."""
        batch, seq, _ = hidden_state.shape
        self.scorer.hidden_state = hidden_state
        self._mask = (
            hidden_state.new_zeros(batch, self._spec.heads, seq, self.get_mask_sizes(seq)[0]) if self._builds_mask else None
        )
        return self._mask

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values (batch, kv_heads, seq, head_size) of a step; return those that its queries attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, seq, _ = key_states.shape
        evicts_first = self._single_token and seq == 1
        positions = torch.arange(self._seen_tokens, self._seen_tokens + seq, device=key_states.device).expand(batch, seq)
        old_scores = self._rescored(evicts_first)
        new_scores = _sanitize(self.scorer.score_new_tokens(key_states, value_states, positions))
        keys, values = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        scores = torch.cat([old_scores, new_scores], dim=2)
        all_positions = torch.cat([self.positions, positions[:, None].expand(batch, heads, seq)], dim=2)
        self._seen_tokens += seq
        kept, is_filled = self._kept_indices(scores, all_positions, seq)
        self.keys, self.values = (_gather_rows(tensor, kept) for tensor in (keys, values))
        self.scores, self.positions = scores.gather(2, kept), all_positions.gather(2, kept).where(is_filled, -1)
        self._fill_mask(self.positions if evicts_first else all_positions, positions)
        return (self.keys, self.values) if evicts_first else (keys, values)

    def _rescored(self, single_token: bool) -> torch.Tensor:
        """Return the scores (batch, kv_heads, filled) before a step; some or all are recomputed for time-dependent scores.

        `rescore_interval` steps of one token rescore every slot once, in turn; any other step rescores all slots.
        """
        interval, filled = self._policy.rescore_interval, self._filled_slots()
        if not interval or not filled:
            return self.scores
        rows = -(-self._slots // interval) if single_token else self._slots
        slots = torch.arange(self._seen_tokens * rows, (self._seen_tokens + 1) * rows, device=self.keys.device) % self._slots
        filled_slots = slots[slots < filled]
        return self.scores.index_copy(
            2, filled_slots, _sanitize(self.scorer.rescore(self.keys[:, :, filled_slots], self._seen_tokens))
        )

    def _fill_mask(self, keys: torch.Tensor, queries: torch.Tensor) -> None:
        """Fill the mask of `on_hidden_state` for keys at positions (batch, kv_heads, rows) and queries at (batch, seq)."""
        if self._mask is None:
            return
        distance = queries[:, None, :, None] - keys[:, :, None]
        hidden = (distance < 0) | (keys[:, :, None] < 0)
        if self._spec.window is not None:
            hidden |= distance >= self._spec.window
        group_size = self._spec.heads // self._spec.kv_heads
        self._mask.masked_fill_(hidden.repeat_interleave(group_size, dim=1), torch.finfo(self._mask.dtype).min)
        self._mask = None

    def _kept_indices(self, scores: torch.Tensor, positions: torch.Tensor, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the index of each slot's next token among old slots and the step's tokens, and whether the slot is filled.

        Both are (batch, kv_heads, kept).
        """
        batch, heads, count = scores.shape
        filled, size = count - seq, min(count, self._slots)
        is_seen = positions >= max(0, self._seen_tokens - (self._spec.window or self._seen_tokens))
        surplus = is_seen.sum(dim=2, keepdim=True) - self._slots
        is_evictable = is_seen & (positions >= self._policy.sinks)
        is_evictable &= positions < self._seen_tokens - self._policy.recent_window
        priority = scores.masked_fill(~is_evictable, torch.inf)
        is_lowest = torch.arange(count, device=scores.device) < surplus
        is_evicted = torch.zeros_like(is_seen).scatter(
            2, priority.argsort(dim=2, stable=True), is_lowest.expand(batch, heads, count)
        )
        stays = is_seen & ~is_evicted
        arrivals = filled + (~stays[:, :, filled:]).int().argsort(dim=2, stable=True)
        slots = torch.arange(size, device=scores.device).expand(batch, heads, size)
        is_free = torch.ones_like(slots, dtype=torch.bool)
        is_free[:, :, : min(filled, size)] = ~stays[:, :, : min(filled, size)]
        nth = is_free.cumsum(dim=2) - 1
        takes_arrival = is_free & (nth < stays[:, :, filled:].sum(dim=2, keepdim=True))
        kept = torch.where(takes_arrival, arrivals.gather(2, nth.clamp(min=0, max=seq - 1)), slots)
        return kept, takes_arrival | (slots < filled)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys for a step of `query_length` tokens, and the position of the first key in a causal mask."""
        filled = self._filled_slots()
        rows = filled + query_length
        return (min(rows, self._slots) if self._single_token and query_length == 1 else rows), self._seen_tokens - filled

    def get_seq_length(self) -> int:
        """Return the number of tokens seen so far."""
        return self._seen_tokens

    def get_max_length(self) -> int:
        """Return -1: the sequence length is unlimited."""
        return -1

    def reset(self) -> None:
        """Remove all tokens."""
        self.is_initialized, self._seen_tokens, self._mask = False, 0, None
        self.scorer.reset()

    def _filled_slots(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0


def evicting_cache_factory(
    spec: KVCacheSpec,
    *,
    single_token: bool,
    module: torch.nn.Module | None = None,
    statistics: Sequence[Path] = (),
    wrap_scorer: Callable[[TorchScorer], TorchScorer] = lambda score: score,
) -> Callable[[], Cache]:
    """Return a factory for empty Transformers caches that follow the cache policy in `spec`.

    `single_token`, `module` and `statistics` are as in `KVCacheReference`. `wrap_scorer` is applied to the scorer of each
    layer. Raises ModelError if `spec` has no Transformers equivalent, or if `module` is needed and None.
    """
    read = functools.cache(lambda reference: read_statistics(find_statistics(reference, statistics)))
    policies = [_eviction_policy(index, layer) for index, layer in enumerate(spec.layers)]
    scorers = [_make_scorer(index, policy, read) for index, policy in enumerate(policies)]
    builds_mask = len({policy.slots for policy in policies}) > 1 or any(layer.window is not None for layer in spec.layers)
    if builds_mask or any(scorer.needs_hidden_state for scorer in scorers):
        if module is None:
            reason = "layers need different attention masks" if builds_mask else "scores depend on hidden states"
            raise ModelError(f"{reason}, which requires hooks on the module", hint="pass the decoder as `module`")
        _register_hidden_state_hooks(module, len(spec.layers))

    def create() -> Cache:
        return Cache(
            layers=[
                EvictingLayer(wrap_scorer(copy.copy(scorer)), layer, policy, single_token=single_token, builds_mask=builds_mask)
                for scorer, layer, policy in zip(scorers, spec.layers, policies, strict=True)
            ]
        )

    return create


def _eviction_policy(layer_index: int, spec: LayerCacheSpec) -> Eviction:
    """Return the policy of a layer. Raises ModelError if it neither evicts nor keeps exactly its attention window.

    A ring buffer of the attention window keeps the same tokens as an eviction of tokens behind the window.
    """
    if spec.has_exact_ring:
        return Eviction(
            slots=spec.policy.slots or 0,
            score="position",
            sinks=0,
            recent_window=1,
            score_state="",
            position_state="",
            write=AppendEvictWrite(slots=""),
            attended=spec.policy.attended,
        )
    if not isinstance(spec.policy, Eviction):
        raise ModelError(
            f"layer {layer_index} keeps tokens by `{spec.policy.method}`, which has no Transformers equivalent",
            hint=FULL_CACHE_HINT,
        )
    return spec.policy


def _make_scorer(layer_index: int, policy: Eviction, read: Callable[[StatisticsRef], Statistics]) -> TorchScorer:
    """Return the scorer of a layer. Raises ModelError if its score is unknown, or its statistics are not named or unusable."""
    try:
        scorer = find_scorer(policy.score)
    except UsageError as error:
        raise ModelError(
            f"layer {layer_index} evicts by `{policy.score}`, which has no Transformers equivalent", hint=error.hint
        ) from None
    if not scorer.is_calibrated():
        return scorer.torch_form()
    if policy.statistics is None:
        raise ModelError(
            f"the cache specification of the graph has no statistics for layer {layer_index}",
            hint="apply the KV passes to the exported model again",
        )
    statistics = read(policy.statistics)
    return scorer.torch_form(
        {name: torch.from_numpy(statistics.tensor(layer_index, name)).float() for name in scorer.statistics_names}
    )


def _register_hidden_state_hooks(module: torch.nn.Module, layer_count: int) -> None:
    """Register hooks that pass the inputs of attention to cache layers of type HiddenStateListener; others are unaffected."""
    for attention in attention_modules(module, layer_count):
        if _hidden_state_hook not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(_hidden_state_hook, with_kwargs=True)


def _hidden_state_hook(attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook: pass the hidden state of `attention` to its cache layer and replace the mask if the layer has one."""
    layer = cache_layer_for(attention, args, kwargs)
    if not isinstance(layer, HiddenStateListener):
        return None
    mask = layer.on_hidden_state(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
    return None if mask is None else (args, {**kwargs, "attention_mask": mask})


def _sanitize(scores: torch.Tensor) -> torch.Tensor:
    """Return `scores` with NaN replaced by the lowest float32 and infinities clipped."""
    return scores.nan_to_num(-_FLOAT32_MAX).clamp(-_FLOAT32_MAX, _FLOAT32_MAX)


def _gather_rows(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the rows at `indices` (batch, kv_heads, kept) of `tensor` (batch, kv_heads, rows, head_size)."""
    batch, heads, rows, size = tensor.shape
    offsets = torch.arange(batch * heads, device=indices.device).view(batch, heads, 1) * rows
    return tensor.reshape(-1, size).index_select(0, (offsets + indices).flatten()).view(*indices.shape, size)
