"""Query-aware Transformers caches: cache layers that receive the queries and decide which rows each query attends to.

Attention modules of Transformers look up their attention function by the name in their configuration. During a call with a
query-aware cache that name refers to `_attend`, which passes the queries to the cache layer and attends to the rows that it
returns as visible.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ryzen_compile.errors import ModelError
from ryzen_compile.spec.kv_cache import LayerCacheSpec
from ryzen_passes.kv.torch_caches import FULL_CACHE_HINT, attention_modules, cache_layer_for

_ATTENTION_NAME = "ryzen-queries"
"""Name of `_attend` among the attention functions of Transformers."""
_UNSUPPORTED_ARGUMENTS = ("position_bias", "s_aux")
"""Arguments of attention functions that change attention weights and are not supported by `_attend`."""


class QueryAwareLayer(CacheLayerMixin, abc.ABC):  # type: ignore[misc]
    """Cache rows of one layer, in memory order; the sequences of a batch have equal lengths and no padding."""

    def __init__(self, spec: LayerCacheSpec) -> None:
        super().__init__()
        self._spec = spec
        self._seen_tokens = 0

    @abc.abstractmethod
    def visible_rows(self, queries: torch.Tensor) -> torch.Tensor:
        """Return (batch, kv_heads, seq, rows) bool: the rows returned by `update` that each query of the step attends to.

        `queries` is (batch, kv_heads, group, seq, head_size).
        """

    def after_attention(self, weights: torch.Tensor) -> None:
        """Process the attention weights (batch, kv_heads, group, seq, rows) float32 at the end of a step."""
        return

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create empty tensors that match the given keys and values in all dims but seq."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.positions = torch.empty(self.keys.shape[:3], dtype=torch.int64, device=key_states.device)
        """(batch, kv_heads, rows); -1 for a free row"""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values (batch, kv_heads, seq, head_size) of a step; return all rows that its queries may read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        positions = torch.arange(self._seen_tokens, self._seen_tokens + key_states.shape[2], device=key_states.device)
        self.keys, self.values = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        self.positions = torch.cat([self.positions, positions.expand(key_states.shape[:3])], dim=2)
        self._seen_tokens += len(positions)
        return self.keys, self.values

    def causal_visibility(self, seq: int) -> torch.Tensor:
        """Return (batch, kv_heads, seq, rows) bool: the rows visible to the last `seq` tokens by position and window."""
        queries = torch.arange(self._seen_tokens - seq, self._seen_tokens, device=self.positions.device)
        distance = queries[:, None] - self.positions[:, :, None]
        visible = (distance >= 0) & (self.positions[:, :, None] >= 0)
        return visible if self._spec.window is None else visible & (distance < self._spec.window)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the mask length and offset: the number of rows and the position of the first; the mask itself is unused."""
        rows = self.keys.shape[2] if self.is_initialized else 0
        return rows + query_length, self._seen_tokens - rows

    def get_seq_length(self) -> int:
        """Return the number of tokens seen so far."""
        return self._seen_tokens

    def get_max_length(self) -> int:
        """Return -1: the sequence length is unlimited."""
        return -1

    def reset(self) -> None:
        """Remove all tokens."""
        self.is_initialized, self._seen_tokens = False, 0


class ExactLayer(QueryAwareLayer):
    """Cache layer that holds every token, beside layers with another method."""

    def visible_rows(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the rows that each query attends to: its own and all earlier ones within the window."""
        return self.causal_visibility(queries.shape[3])


def expose_queries(module: torch.nn.Module | None, layer_count: int, reason: str) -> None:
    """Register hooks on `module` that pass its queries to cache layers of type QueryAwareLayer; other caches are unaffected.

    Raises ModelError, whose message begins with `reason`, if `module` is None or does not expose its queries.
    """
    if module is None:
        raise ModelError(f"{reason}, which requires hooks on the module", hint="pass the decoder as `module`")
    attentions = attention_modules(module, layer_count)
    if not any(isinstance(part, PreTrainedModel) and part.is_backend_compatible() for part in module.modules()):
        raise ModelError(f"{reason}, which {type(attentions[0]).__name__} does not expose", hint=FULL_CACHE_HINT)
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION_NAME, _attend)
    for attention in attentions:
        if _before_attention not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(_before_attention, with_kwargs=True)
            attention.register_forward_hook(_after_attention, always_call=True)


@dataclass
class _AttentionCall:
    """A running forward call of an attention module with a query-aware cache layer."""

    layer: QueryAwareLayer
    implementation: Any
    """The attention implementation in the configuration before the call."""
    queries_exposed: bool = False


_ACTIVE_CALLS: dict[torch.nn.Module, _AttentionCall] = {}
"""Attention module -> its running call."""


def _before_attention(attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: make `attention` call `_attend` if its cache layer is query-aware."""
    layer, config = cache_layer_for(attention, args, kwargs), _config_of(attention)
    if isinstance(layer, QueryAwareLayer):
        _ACTIVE_CALLS[attention] = _AttentionCall(layer, config._attn_implementation)
        config._attn_implementation = _ATTENTION_NAME


def _after_attention(attention: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: restore the attention implementation of `attention`; `output` is None if its forward failed."""
    call = _ACTIVE_CALLS.pop(attention, None)
    if call is None:
        return
    _config_of(attention)._attn_implementation = call.implementation
    if output is not None and not call.queries_exposed:
        raise ModelError(
            f"{type(attention).__name__} does not call the attention function of its configuration", hint=FULL_CACHE_HINT
        )


def _config_of(attention: torch.nn.Module) -> Any:
    return getattr(attention, "config", None)


def _attend(
    attention: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention output (batch, seq, heads, head_size) of `query` over the rows that its cache layer makes visible.

    `query` is (batch, heads, seq, head_size); `key` and `value` are (batch, kv_heads, rows, head_size), as the cache layer
    returns them. The mask of the module is ignored. Raises ModelError for arguments that are not supported.
    """
    call = _ACTIVE_CALLS[attention]
    if unsupported := [name for name in _UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]:
        raise ModelError(
            f"{type(attention).__name__} passes `{unsupported[0]}` to attention, which is not supported", hint=FULL_CACHE_HINT
        )
    queries = query.unflatten(1, (key.shape[1], -1))
    hidden = ~call.layer.visible_rows(queries)[:, :, None]
    logits = queries @ key[:, :, None].transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    weights = logits.float().masked_fill(hidden, -torch.inf).softmax(dim=-1)
    call.layer.after_attention(weights)
    call.queries_exposed = True
    return (weights.to(value.dtype) @ value[:, :, None]).flatten(1, 2).transpose(1, 2), None
