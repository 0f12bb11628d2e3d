"""Caches of transformers that see the queries: what these see, and what is kept, is theirs to say.

The attentions of transformers ask a table of functions for the one that their configuration names. For the length of a call
with such a cache that is `_attend`, which shows its layer the queries and attends to what it lets them see.
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
from ryzen_compile.spec.kv_cache import KVCacheSpec, LayerCacheSpec
from ryzen_passes.kv.evict.torch_reference import attention_modules, cache_layer_for

_ATTENTION_NAME = "ryzen-queries"
"""What `_attend` is called in the table of transformers."""
_UNSUPPORTED_ARGUMENTS = ("position_bias", "s_aux")
"""What some attentions give theirs beside queries, keys and values, that changes what they attend to."""
_HINT = "hold it to the PyTorch module that keeps and reads all"


class QueryAwareLayer(CacheLayerMixin, abc.ABC):  # type: ignore[misc]
    """The rows of one layer, in the order in which they are in memory; those of a batch have equal lengths and no padding."""

    def __init__(self, spec: LayerCacheSpec) -> None:
        super().__init__()
        self._spec = spec
        self._seen_tokens = 0

    @abc.abstractmethod
    def visible_rows(self, queries: torch.Tensor) -> torch.Tensor:
        """Return which rows that `update` returned the step's `queries` (batch, kv_heads, group, seq, size) see.

        It is (batch, kv_heads, seq, rows) bool.
        """

    def after_attention(self, weights: torch.Tensor) -> None:
        """Take in how much queries attend to rows, (batch, kv_heads, group, seq, rows) float32: the step is over."""
        return

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for keys and values of these shapes, of which there is none yet."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.positions = torch.empty(self.keys.shape[:3], dtype=torch.int64, device=key_states.device)
        """(batch, kv_heads, rows)"""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a step (batch, kv_heads, seq, size) and return the rows that its queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = torch.arange(self._seen_tokens, self._seen_tokens + key_states.shape[2], device=key_states.device)
        self.keys, self.values = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        self.positions = torch.cat([self.positions, new.expand(key_states.shape[:3])], dim=2)
        self._seen_tokens += len(new)
        return self.keys, self.values

    def causal_visibility(self, seq: int) -> torch.Tensor:
        """Return (batch, kv_heads, seq, rows) bool: which rows the last `seq` tokens see by position and window alone."""
        queries = torch.arange(self._seen_tokens - seq, self._seen_tokens, device=self.positions.device)
        behind = queries[:, None] - self.positions[:, :, None]
        seen = behind >= 0
        return seen if self._spec.window is None else seen & (behind < self._spec.window)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of a mask that nobody reads: how many rows there are, and the position of the first."""
        held = self.keys.shape[2] if self.is_initialized else 0
        return held + query_length, self._seen_tokens - held

    def get_seq_length(self) -> int:
        """Return how many tokens it has seen."""
        return self._seen_tokens

    def get_max_length(self) -> int:
        """Return -1: nothing here bounds a sequence."""
        return -1

    def reset(self) -> None:
        """Begin anew."""
        self.is_initialized, self._seen_tokens = False, 0


def check_supported(spec: KVCacheSpec, *, is_complete: bool) -> None:
    """Raise ModelError where a graph `is_whole` not told of, as older ones are, or its keys and values are codes."""
    if not is_complete:
        raise ModelError(f"the graph does not tell all of its method `{spec.layers[0].method}`", hint="rewrite it anew")
    if not spec.is_unquantized:
        raise ModelError(f"codes behind `{spec.layers[0].method}` have no form in torch", hint=_HINT)


def expose_queries(module: torch.nn.Module | None, layer_count: int, reason: str) -> None:
    """Let layers of caches that are a QueriedLayer see the queries of `module`; those of other caches are left alone.

    Raises ModelError, which begins with `why` it matters, where there is no module, or none that can show them.
    """
    if module is None:
        raise ModelError(f"{reason}, of which a cache alone is not told", hint="give the module that runs with it")
    found = attention_modules(module, layer_count)
    if not any(isinstance(one, PreTrainedModel) and one.is_backend_compatible() for one in module.modules()):
        raise ModelError(f"{reason}, which {type(found[0]).__name__} shows to nobody", hint=_HINT)
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION_NAME, _attend)
    for one in found:
        if _before_attention not in one._forward_pre_hooks.values():
            one.register_forward_pre_hook(_before_attention, with_kwargs=True)
            one.register_forward_hook(_after_attention, always_call=True)


@dataclass
class _AttentionCall:
    """A call of an attention with a layer that is shown the queries."""

    layer: QueryAwareLayer
    implementation: Any
    """The function that the configuration named before."""
    queries_exposed: bool = False


_ACTIVE_CALLS: dict[torch.nn.Module, _AttentionCall] = {}
"""The calls that have begun and not ended, by their attention."""


def _before_attention(attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let `attention` call `_attend` where its layer of the cache is to see the queries; a hook before its forward."""
    layer, config = cache_layer_for(attention, args, kwargs), _config_of(attention)
    if isinstance(layer, QueryAwareLayer):
        _ACTIVE_CALLS[attention] = _AttentionCall(layer, config._attn_implementation)
        config._attn_implementation = _ATTENTION_NAME


def _after_attention(attention: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Let `attention` call what it called before; a hook behind its forward, whose `output` is None where it failed."""
    call = _ACTIVE_CALLS.pop(attention, None)
    if call is None:
        return
    _config_of(attention)._attn_implementation = call.implementation
    if output is not None and not call.queries_exposed:
        raise ModelError(f"{type(attention).__name__} attends by itself and shows its queries to nobody", hint=_HINT)


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
    """Return (batch, seq, heads, size): what `query` (batch, heads, seq, size) reads of the rows that its layer lets it see.

    `key` and `value` are (batch, kv_heads, rows, size), as the layer returned them. What the module would mask is its concern
    no longer.
    """
    call = _ACTIVE_CALLS[attention]
    if added := [name for name in _UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]:
        raise ModelError(f"{type(attention).__name__} attends with a `{added[0]}`, which is not known here", hint=_HINT)
    queries = query.unflatten(1, (key.shape[1], -1))
    hidden = ~call.layer.visible_rows(queries)[:, :, None]
    logits = queries @ key[:, :, None].transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    weights = logits.float().masked_fill(hidden, -torch.inf).softmax(dim=-1)
    call.layer.after_attention(weights)
    call.queries_exposed = True
    return (weights.to(value.dtype) @ value[:, :, None]).flatten(1, 2).transpose(1, 2), None
