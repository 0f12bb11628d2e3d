"""Rings in plain torch: caches for transformers' decoders whose sinks follow the window, as those of a rewritten graph do.

No key is turned here. A sink that stands further on is made anew: the module's own attention is given what went into it when
the sink came, and the positions that it gave to the token at that place, which has come before. Nothing is known of how
positions enter, and no code is shared with the rewrite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ryzen_compile.errors import ModelError
from ryzen_compile.spec.kv_cache import KVCacheSpec, LayerCacheSpec
from ryzen_passes.kv.evict.torch_reference import attention_modules, cache_layer_for

KeyProjection = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]
"""What makes keys (batch, kv_heads, rows, size) of what goes into attention (batch, rows, width) and of their positions."""

_POSITION_ARGUMENTS = ("position_embeddings", "position_ids")
"""The arguments by which transformers' attentions are told positions: tensors (batch or 1, seq, ...), or tuples of them."""
_HINT = "hold it to the PyTorch module without eviction"


class StreamingLayer(CacheLayerMixin):  # type: ignore[misc]
    """The first tokens of one layer and its latest ones. Rows of a batch have equal lengths and no padding.

    What a token attends to does not depend on how tokens are cut into steps. The query at position t has the sinks at
    t + 1 - slots further on, once that is above 0, and every other token where it is. So each query has its own copies of
    the sinks: attention reads the copies for the first query of the step, for the second, and so on, and behind them the
    other tokens in the order of their positions.
    """

    def __init__(self, spec: LayerCacheSpec) -> None:
        """Keep what `layer` says."""
        super().__init__()
        self._sinks, self._window, self._attention_window = spec.sinks, spec.recent_window, spec.window
        self._slots, self._seen_tokens = spec.sinks + spec.recent_window, 0
        self._is_prepared = False
        """Whether the step under way is known."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Hold nothing, of the shapes of the first step."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        """(batch, kv_heads, tokens, size): what is in the window and no sink."""
        self.sink_values = self.values
        """(batch, kv_heads, sinks that have come, size): the values of sinks."""
        self.is_initialized = True

    def prepare_step(
        self, hidden_states: torch.Tensor, position_arguments: dict[str, Any], make_keys: KeyProjection
    ) -> torch.Tensor:
        """Take in `hidden` (batch, seq, width) of a step and its `places`; return the mask that its attention is given.

        That is (batch, 1, seq, rows) for what `update` returns then: 0 where a query sees, the least number elsewhere. Raises
        ModelError where positions are told in another form.
        """
        (batch, seq, _), device = hidden_states.shape, hidden_states.device
        end = self._seen_tokens + seq
        query = torch.arange(self._seen_tokens, end, device=device)
        shift = (query + 1 - self._slots).clamp(min=0)
        self._is_prepared = True
        if self._sinks:
            self._store_sink_inputs(hidden_states, position_arguments)
            self._recomputed_keys = self._recompute_sink_keys(hidden_states, shift, make_keys)
        sink = torch.arange(min(self._sinks, end), device=device)
        other = torch.arange(min(max(self._sinks, self._seen_tokens - self._window), end), end, device=device)
        own = torch.eye(seq, dtype=torch.bool, device=device)
        copies = own[:, :, None] & self._is_visible((query - shift)[:, None] - sink)[:, None]
        behind = query[:, None] - other
        seen = torch.cat([copies.flatten(1), self._is_visible(behind) & (behind < self._window)], dim=1)
        mask = torch.full(seen.shape, torch.finfo(hidden_states.dtype).min, dtype=hidden_states.dtype, device=device)
        return mask.masked_fill(seen, 0).expand(batch, 1, *seen.shape)

    def _is_visible(self, distance: torch.Tensor) -> torch.Tensor:
        """Return whether a query sees a token that stands `behind` places before it."""
        return (distance >= 0) & (distance < self._attention_window) if self._attention_window is not None else distance >= 0

    def _store_sink_inputs(self, hidden_states: torch.Tensor, position_arguments: dict[str, Any]) -> None:
        """Take in what sinks are made anew of: what goes into attention with them, and the places of the latest tokens."""
        batch, seq, _ = hidden_states.shape
        new = {name: _map_tensors(_first_row_selector(name, batch, seq), one) for name, one in position_arguments.items()}
        if not self._seen_tokens:
            self._sink_hidden_states, self._position_arguments, self._oldest_position = hidden_states[:, : self._sinks], new, 0
            return
        self._sink_hidden_states = torch.cat(
            [self._sink_hidden_states, hidden_states[:, : self._sinks - self._sink_hidden_states.shape[1]]], dim=1
        )
        stale = max(0, self._seen_tokens + 1 - self._slots) - self._oldest_position
        self._position_arguments = {
            name: _append_positions(one, new[name], stale) for name, one in self._position_arguments.items()
        }
        self._oldest_position += stale

    def _recompute_sink_keys(self, hidden_states: torch.Tensor, shift: torch.Tensor, make_keys: KeyProjection) -> torch.Tensor:
        """Return the sinks' keys, each made as far on as `shift` (seq,) says, and that of the last token where it is."""
        batch, seq, _ = hidden_states.shape
        copies = shift[:, None] + torch.arange(self._sink_hidden_states.shape[1], device=hidden_states.device)
        at = torch.cat([copies.flatten(), shift.new_tensor([self._seen_tokens + seq - 1])]) - self._oldest_position

        def placed(one: torch.Tensor) -> torch.Tensor:
            return one.index_select(1, at).expand(batch, *[-1] * (one.ndim - 1))

        came = torch.cat([self._sink_hidden_states.repeat(1, seq, 1), hidden_states[:, -1:]], dim=1)
        return make_keys(came, {name: _map_tensors(placed, one) for name, one in self._position_arguments.items()})

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a step (batch, kv_heads, seq, size) and return the keys and values that its queries see.

        Raises ModelError where `look` was not told of the step, or where keys that are made anew are others.
        """
        if not self._is_prepared:
            raise ModelError("nothing told what goes into attention", hint="run the module that `in_torch` was given")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seq, more = key_states.shape[2], max(0, self._sinks - self._seen_tokens)
        keys = torch.cat([self.keys, key_states[:, :, more:]], dim=2)
        values = torch.cat([self.values, value_states[:, :, more:]], dim=2)
        self.keys, self.values = (whole[:, :, -self._window :] for whole in (keys, values))
        self._seen_tokens, self._is_prepared = self._seen_tokens + seq, False
        if not self._sinks:
            return keys, values
        self.sink_values = torch.cat([self.sink_values, value_states[:, :, :more]], dim=2)
        copies = self._checked_sink_copies(key_states[:, :, -1:])
        return torch.cat([copies, keys], dim=2), torch.cat([self.sink_values.repeat(1, 1, seq, 1), values], dim=2)

    def _checked_sink_copies(self, last_key: torch.Tensor) -> torch.Tensor:
        """Return the copies of the sinks, (batch, kv_heads, seq * sinks, size); `last` is the key of the step's last token."""
        copies, again = self._recomputed_keys[:, :, :-1], self._recomputed_keys[:, :, -1:]
        if (
            again.shape != last_key.shape
            or (again - last_key).abs().max() > torch.finfo(last_key.dtype).eps ** 0.5 * last_key.abs().max()
        ):
            raise ModelError("attention makes another key of the same token at the same position", hint=_HINT)
        return copies

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return what a mask over the step's own tokens takes: attention is given that of `look` in its place."""
        return query_length, self._seen_tokens

    def get_seq_length(self) -> int:
        """Return how many tokens it has seen."""
        return self._seen_tokens

    def get_max_length(self) -> int:
        """Return -1: sequences may be of any length."""
        return -1

    def reset(self) -> None:
        """Begin anew."""
        self.is_initialized, self._seen_tokens, self._is_prepared = False, 0, False


def streaming_cache_factory(spec: KVCacheSpec, *, module: torch.nn.Module | None) -> Callable[[], Cache]:
    """Return what makes empty caches that keep what `told` says of a graph whose caches are rings.

    `module` is as in `Pass.in_torch`. Raises ModelError without it, or where its attentions are not told positions.
    """
    if module is None:
        raise ModelError(
            "each query sees the sinks elsewhere, of which a cache alone is not told", hint="give the module that runs with it"
        )
    found = attention_modules(module, len(spec.layers))
    for one in found:
        if not {*_POSITION_ARGUMENTS} & {*_parameters(one)}:
            raise ModelError(f"{type(one).__name__} is not told positions, by which keys could be made anew", hint=_HINT)
    for one in found:
        if _attention_hook not in one._forward_pre_hooks.values():
            one.register_forward_pre_hook(_attention_hook, with_kwargs=True)
    return lambda: Cache(layers=[StreamingLayer(layer) for layer in spec.layers])


def _parameters(attention: torch.nn.Module) -> list[str]:
    return [*inspect.signature(attention.forward).parameters]


def _attention_hook(attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Show what `attention` is given to a StreamingLayer, and give it the mask of that; a hook before its forward."""
    layer = cache_layer_for(attention, args, kwargs)
    if not isinstance(layer, StreamingLayer):
        return None
    named = _parameters(attention)
    given = {**dict(zip(named, args, strict=False)), **kwargs}
    holder = next(name for name, one in given.items() if isinstance(one, Cache))
    mine = {name: one for name, one in given.items() if name in named}

    def make(hidden: torch.Tensor, places: dict[str, Any]) -> torch.Tensor:
        return _capture_keys(
            attention, {**mine, **places, named[0]: hidden, holder: _KeyCapturingCache(), "attention_mask": None}
        )

    places = {name: mine[name] for name in _POSITION_ARGUMENTS if mine.get(name) is not None}
    return (), {**given, "attention_mask": layer.prepare_step(given[named[0]], places, make)}


class _KeysCaptured(Exception):
    """Keys are made, and the rest of an attention is not needed."""

    def __init__(self, keys: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys


class _KeyCapturingCache(Cache):  # type: ignore[misc]
    """An empty cache that leaves the attention which appends to it."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Leave with `key_states`."""
        raise _KeysCaptured(key_states)


def _capture_keys(attention: torch.nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """Return the keys (batch, kv_heads, rows, size) that `attention` makes of what it is `given`."""
    try:
        attention.forward(**arguments)
    except _KeysCaptured as made:
        return made.keys
    raise ModelError(f"{type(attention).__name__} appends no keys to its cache", hint=_HINT)


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tensors: Any) -> Any:
    """Return `places`, a tensor or a tuple of them, with each tensor as `do` makes it."""
    return tuple(_map_tensors(function, one) for one in tensors) if isinstance(tensors, (tuple, list)) else function(tensors)


def _append_positions(old: Any, new: Any, dropped: int) -> Any:
    """Return places (1, tokens, ...): those of `old` but the first `stale` tokens, and behind them those of `new`."""
    if isinstance(old, tuple):
        return tuple(_append_positions(*both, dropped) for both in zip(old, new, strict=True))
    return torch.cat([old[:, dropped:], new], dim=1)


def _first_row_selector(name: str, batch: int, seq: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what takes the places of one row, (1, seq, ...), of the argument `name`: all rows have the same."""

    def take(one: torch.Tensor) -> torch.Tensor:
        if one.ndim < 2 or one.shape[0] not in (1, batch) or one.shape[1] != seq:
            raise ModelError(f"`{name}` of attention is {tuple(one.shape)}, not ({batch}, {seq}, ...)", hint=_HINT)
        return one[:1]

    return take
