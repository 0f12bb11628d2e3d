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
from ryzen_compile.spec.kv_cache import CachedLayer, CacheMap
from ryzen_passes.kv.evict.torch_reference import attentions, cached_layer

Make = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]
"""What makes keys (batch, kv_heads, rows, size) of what goes into attention (batch, rows, width) and of their positions."""

_PLACES = ("position_embeddings", "position_ids")
"""The arguments by which transformers' attentions are told positions: tensors (batch or 1, seq, ...), or tuples of them."""
_HINT = "hold it to the PyTorch module without eviction"


class StreamingLayer(CacheLayerMixin):  # type: ignore[misc]
    """The first tokens of one layer and its latest ones. Rows of a batch have equal lengths and no padding.

    What a token attends to does not depend on how tokens are cut into steps. The query at position t has the sinks at
    t + 1 - slots further on, once that is above 0, and every other token where it is. So each query has its own copies of
    the sinks: attention reads the copies for the first query of the step, for the second, and so on, and behind them the
    other tokens in the order of their positions.
    """

    def __init__(self, layer: CachedLayer) -> None:
        """Keep what `layer` says."""
        super().__init__()
        self._sinks, self._window, self._sight = layer.sinks, layer.recent, layer.window
        self._slots, self._seen = layer.sinks + layer.recent, 0
        self._looked = False
        """Whether the step under way is known."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Hold nothing, of the shapes of the first step."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        """(batch, kv_heads, tokens, size): what is in the window and no sink."""
        self.firsts = self.values
        """(batch, kv_heads, sinks that have come, size): the values of sinks."""
        self.is_initialized = True

    def look(self, hidden: torch.Tensor, places: dict[str, Any], make: Make) -> torch.Tensor:
        """Take in `hidden` (batch, seq, width) of a step and its `places`; return the mask that its attention is given.

        That is (batch, 1, seq, rows) for what `update` returns then: 0 where a query sees, the least number elsewhere. Raises
        ModelError where positions are told in another form.
        """
        (batch, seq, _), device = hidden.shape, hidden.device
        end = self._seen + seq
        query = torch.arange(self._seen, end, device=device)
        shift = (query + 1 - self._slots).clamp(min=0)
        self._looked = True
        if self._sinks:
            self._remember(hidden, places)
            self._made = self._anew(hidden, shift, make)
        sink = torch.arange(min(self._sinks, end), device=device)
        other = torch.arange(min(max(self._sinks, self._seen - self._window), end), end, device=device)
        own = torch.eye(seq, dtype=torch.bool, device=device)
        copies = own[:, :, None] & self._sees((query - shift)[:, None] - sink)[:, None]
        behind = query[:, None] - other
        seen = torch.cat([copies.flatten(1), self._sees(behind) & (behind < self._window)], dim=1)
        mask = torch.full(seen.shape, torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=device)
        return mask.masked_fill(seen, 0).expand(batch, 1, *seen.shape)

    def _sees(self, behind: torch.Tensor) -> torch.Tensor:
        """Return whether a query sees a token that stands `behind` places before it."""
        return (behind >= 0) & (behind < self._sight) if self._sight is not None else behind >= 0

    def _remember(self, hidden: torch.Tensor, places: dict[str, Any]) -> None:
        """Take in what sinks are made anew of: what goes into attention with them, and the places of the latest tokens."""
        batch, seq, _ = hidden.shape
        new = {name: _each(_row(name, batch, seq), one) for name, one in places.items()}
        if not self._seen:
            self._came, self._places, self._oldest = hidden[:, : self._sinks], new, 0
            return
        self._came = torch.cat([self._came, hidden[:, : self._sinks - self._came.shape[1]]], dim=1)
        stale = max(0, self._seen + 1 - self._slots) - self._oldest
        self._places = {name: _joined(one, new[name], stale) for name, one in self._places.items()}
        self._oldest += stale

    def _anew(self, hidden: torch.Tensor, shift: torch.Tensor, make: Make) -> torch.Tensor:
        """Return the sinks' keys, each made as far on as `shift` (seq,) says, and that of the last token where it is."""
        batch, seq, _ = hidden.shape
        copies = shift[:, None] + torch.arange(self._came.shape[1], device=hidden.device)
        at = torch.cat([copies.flatten(), shift.new_tensor([self._seen + seq - 1])]) - self._oldest

        def placed(one: torch.Tensor) -> torch.Tensor:
            return one.index_select(1, at).expand(batch, *[-1] * (one.ndim - 1))

        came = torch.cat([self._came.repeat(1, seq, 1), hidden[:, -1:]], dim=1)
        return make(came, {name: _each(placed, one) for name, one in self._places.items()})

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a step (batch, kv_heads, seq, size) and return the keys and values that its queries see.

        Raises ModelError where `look` was not told of the step, or where keys that are made anew are others.
        """
        if not self._looked:
            raise ModelError("nothing told what goes into attention", hint="run the module that `in_torch` was given")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seq, more = key_states.shape[2], max(0, self._sinks - self._seen)
        keys = torch.cat([self.keys, key_states[:, :, more:]], dim=2)
        values = torch.cat([self.values, value_states[:, :, more:]], dim=2)
        self.keys, self.values = (whole[:, :, -self._window :] for whole in (keys, values))
        self._seen, self._looked = self._seen + seq, False
        if not self._sinks:
            return keys, values
        self.firsts = torch.cat([self.firsts, value_states[:, :, :more]], dim=2)
        copies = self._copies(key_states[:, :, -1:])
        return torch.cat([copies, keys], dim=2), torch.cat([self.firsts.repeat(1, 1, seq, 1), values], dim=2)

    def _copies(self, last: torch.Tensor) -> torch.Tensor:
        """Return the copies of the sinks, (batch, kv_heads, seq * sinks, size); `last` is the key of the step's last token."""
        copies, again = self._made[:, :, :-1], self._made[:, :, -1:]
        if again.shape != last.shape or (again - last).abs().max() > torch.finfo(last.dtype).eps ** 0.5 * last.abs().max():
            raise ModelError("attention makes another key of the same token at the same position", hint=_HINT)
        return copies

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return what a mask over the step's own tokens takes: attention is given that of `look` in its place."""
        return query_length, self._seen

    def get_seq_length(self) -> int:
        """Return how many tokens it has seen."""
        return self._seen

    def get_max_length(self) -> int:
        """Return -1: sequences may be of any length."""
        return -1

    def reset(self) -> None:
        """Begin anew."""
        self.is_initialized, self._seen, self._looked = False, 0, False


def streaming(told: CacheMap, *, module: torch.nn.Module | None) -> Callable[[], Cache]:
    """Return what makes empty caches that keep what `told` says of a graph whose caches are rings.

    `module` is as in `Pass.in_torch`. Raises ModelError without it, or where its attentions are not told positions.
    """
    if module is None:
        raise ModelError(
            "each query sees the sinks elsewhere, of which a cache alone is not told", hint="give the module that runs with it"
        )
    found = attentions(module, len(told.layers))
    for one in found:
        if not {*_PLACES} & {*_parameters(one)}:
            raise ModelError(f"{type(one).__name__} is not told positions, by which keys could be made anew", hint=_HINT)
    for one in found:
        if _met not in one._forward_pre_hooks.values():
            one.register_forward_pre_hook(_met, with_kwargs=True)
    return lambda: Cache(layers=[StreamingLayer(layer) for layer in told.layers])


def _parameters(attention: torch.nn.Module) -> list[str]:
    return [*inspect.signature(attention.forward).parameters]


def _met(attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Show what `attention` is given to a StreamingLayer, and give it the mask of that; a hook before its forward."""
    layer = cached_layer(attention, args, kwargs)
    if not isinstance(layer, StreamingLayer):
        return None
    named = _parameters(attention)
    given = {**dict(zip(named, args, strict=False)), **kwargs}
    holder = next(name for name, one in given.items() if isinstance(one, Cache))
    mine = {name: one for name, one in given.items() if name in named}

    def make(hidden: torch.Tensor, places: dict[str, Any]) -> torch.Tensor:
        return _keys(attention, {**mine, **places, named[0]: hidden, holder: _Leaving(), "attention_mask": None})

    places = {name: mine[name] for name in _PLACES if mine.get(name) is not None}
    return (), {**given, "attention_mask": layer.look(given[named[0]], places, make)}


class _Made(Exception):
    """Keys are made, and the rest of an attention is not needed."""

    def __init__(self, keys: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys


class _Leaving(Cache):  # type: ignore[misc]
    """An empty cache that leaves the attention which appends to it."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Leave with `key_states`."""
        raise _Made(key_states)


def _keys(attention: torch.nn.Module, given: dict[str, Any]) -> torch.Tensor:
    """Return the keys (batch, kv_heads, rows, size) that `attention` makes of what it is `given`."""
    try:
        attention.forward(**given)
    except _Made as made:
        return made.keys
    raise ModelError(f"{type(attention).__name__} appends no keys to its cache", hint=_HINT)


def _each(do: Callable[[torch.Tensor], torch.Tensor], places: Any) -> Any:
    """Return `places`, a tensor or a tuple of them, with each tensor as `do` makes it."""
    return tuple(_each(do, one) for one in places) if isinstance(places, (tuple, list)) else do(places)


def _joined(old: Any, new: Any, stale: int) -> Any:
    """Return places (1, tokens, ...): those of `old` but the first `stale` tokens, and behind them those of `new`."""
    if isinstance(old, tuple):
        return tuple(_joined(*both, stale) for both in zip(old, new, strict=True))
    return torch.cat([old[:, stale:], new], dim=1)


def _row(name: str, batch: int, seq: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what takes the places of one row, (1, seq, ...), of the argument `name`: all rows have the same."""

    def take(one: torch.Tensor) -> torch.Tensor:
        if one.ndim < 2 or one.shape[0] not in (1, batch) or one.shape[1] != seq:
            raise ModelError(f"`{name}` of attention is {tuple(one.shape)}, not ({batch}, {seq}, ...)", hint=_HINT)
        return one[:1]

    return take
