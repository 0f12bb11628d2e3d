"""PyTorch reference of kv-window: a Transformers cache whose sinks move with the window, as in the rewritten graph.

No key is rotated here. The key of a sink at a new position is recomputed: the attention module of the decoder is run on the
stored hidden state of the sink with the stored position arguments of the token that had the new position. This needs no
knowledge of the position encoding and shares no code with the rewrite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ryzen_compile.errors import ModelError
from ryzen_compile.spec.kv_cache import KVCacheSpec, LayerCacheSpec, RingBuffer
from ryzen_passes.kv.torch_caches import FULL_CACHE_HINT, attention_modules, cache_layer_for

KeyProjection = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]
"""Function from hidden states (batch, rows, width) and position arguments to keys (batch, kv_heads, rows, head_size)."""

_POSITION_ARGUMENTS = ("position_embeddings", "position_ids")
"""Position arguments of attention modules in Transformers: tensors (batch or 1, seq, ...), or tuples of them."""


class StreamingLayer(CacheLayerMixin):  # type: ignore[misc]
    """Cache layer that holds the sinks and the latest tokens; the sequences of a batch have equal lengths and no padding.

    The result does not depend on how tokens are divided into steps. For the query at position t, the positions of the sinks are
    shifted by max(0, t + 1 - slots); all other tokens keep their positions. Each query therefore has its own copies of the
    sinks. The keys for attention are the copies for the first query of the step, for the second, and so on, followed by the
    other tokens in the order of their positions.
    """

    def __init__(self, spec: LayerCacheSpec, policy: RingBuffer) -> None:
        """Create an empty layer that follows `policy`."""
        super().__init__()
        self._sinks, self._window, self._attention_window = policy.sinks, policy.window, spec.window
        self._slots, self._seen_tokens = policy.slots, 0
        self._is_prepared = False
        """Whether `prepare_step` has been called for the current step."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Create empty tensors that match the given keys and values in all dims but seq."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        """(batch, kv_heads, tokens, head_size): keys and values of the window, without sinks."""
        self.sink_values = self.values
        """(batch, kv_heads, sinks seen so far, head_size): values of the sinks."""
        self.is_initialized = True

    def prepare_step(
        self, hidden_states: torch.Tensor, position_arguments: dict[str, Any], make_keys: KeyProjection
    ) -> torch.Tensor:
        """Process the hidden states (batch, seq, width) and position arguments of a step; return its attention mask.

        The additive mask (batch, 1, seq, rows) applies to the rows that `update` returns next: 0 for visible rows, the lowest
        number of the type for others. Raises ModelError if the position arguments have an unsupported shape.
        """
        (batch, seq, _), device = hidden_states.shape, hidden_states.device
        end = self._seen_tokens + seq
        query = torch.arange(self._seen_tokens, end, device=device)
        shift = (query + 1 - self._slots).clamp(min=0)
        self._is_prepared = True
        if self._sinks:
            self._store_sink_inputs(hidden_states, position_arguments)
            self._recomputed_keys = self._recompute_sink_keys(hidden_states, shift, make_keys)
        sink_positions = torch.arange(min(self._sinks, end), device=device)
        other_positions = torch.arange(min(max(self._sinks, self._seen_tokens - self._window), end), end, device=device)
        own_copy = torch.eye(seq, dtype=torch.bool, device=device)
        copies = own_copy[:, :, None] & self._is_visible((query - shift)[:, None] - sink_positions)[:, None]
        distance = query[:, None] - other_positions
        visible = torch.cat([copies.flatten(1), self._is_visible(distance) & (distance < self._window)], dim=1)
        mask = torch.full(visible.shape, torch.finfo(hidden_states.dtype).min, dtype=hidden_states.dtype, device=device)
        return mask.masked_fill(visible, 0).expand(batch, 1, *visible.shape)

    def _is_visible(self, distance: torch.Tensor) -> torch.Tensor:
        """Return whether a query attends to a token `distance` positions before it."""
        return (distance >= 0) & (distance < self._attention_window) if self._attention_window is not None else distance >= 0

    def _store_sink_inputs(self, hidden_states: torch.Tensor, position_arguments: dict[str, Any]) -> None:
        """Store the inputs for the recomputation of sinks: their hidden states and the position arguments of recent tokens."""
        batch, seq, _ = hidden_states.shape
        new = {
            name: _map_tensors(_first_row_selector(name, batch, seq), argument) for name, argument in position_arguments.items()
        }
        if not self._seen_tokens:
            self._sink_hidden_states, self._position_arguments, self._oldest_position = hidden_states[:, : self._sinks], new, 0
            return
        self._sink_hidden_states = torch.cat(
            [self._sink_hidden_states, hidden_states[:, : self._sinks - self._sink_hidden_states.shape[1]]], dim=1
        )
        stale = max(0, self._seen_tokens + 1 - self._slots) - self._oldest_position
        self._position_arguments = {
            name: _append_positions(argument, new[name], stale) for name, argument in self._position_arguments.items()
        }
        self._oldest_position += stale

    def _recompute_sink_keys(self, hidden_states: torch.Tensor, shift: torch.Tensor, make_keys: KeyProjection) -> torch.Tensor:
        """Return the keys of the sinks shifted by `shift` (seq,), followed by the unshifted key of the step's last token."""
        batch, seq, _ = hidden_states.shape
        positions = shift[:, None] + torch.arange(self._sink_hidden_states.shape[1], device=hidden_states.device)
        indices = torch.cat([positions.flatten(), shift.new_tensor([self._seen_tokens + seq - 1])]) - self._oldest_position

        def select(argument: torch.Tensor) -> torch.Tensor:
            return argument.index_select(1, indices).expand(batch, *[-1] * (argument.ndim - 1))

        inputs = torch.cat([self._sink_hidden_states.repeat(1, seq, 1), hidden_states[:, -1:]], dim=1)
        return make_keys(inputs, {name: _map_tensors(select, argument) for name, argument in self._position_arguments.items()})

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values (batch, kv_heads, seq, head_size) of a step; return those that its queries attend to.

        Raises ModelError if `prepare_step` was not called for the step, or the recomputed key of the last token differs.
        """
        if not self._is_prepared:
            raise ModelError(
                "the input of attention is unknown to the cache layer",
                hint="run the module that is passed to `torch_cache_factory`",
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seq, new_sinks = key_states.shape[2], max(0, self._sinks - self._seen_tokens)
        keys = torch.cat([self.keys, key_states[:, :, new_sinks:]], dim=2)
        values = torch.cat([self.values, value_states[:, :, new_sinks:]], dim=2)
        self.keys, self.values = (tensor[:, :, -self._window :] for tensor in (keys, values))
        self._seen_tokens, self._is_prepared = self._seen_tokens + seq, False
        if not self._sinks:
            return keys, values
        self.sink_values = torch.cat([self.sink_values, value_states[:, :, :new_sinks]], dim=2)
        copies = self._checked_sink_copies(key_states[:, :, -1:])
        return torch.cat([copies, keys], dim=2), torch.cat([self.sink_values.repeat(1, 1, seq, 1), values], dim=2)

    def _checked_sink_copies(self, last_key: torch.Tensor) -> torch.Tensor:
        """Return the sink copies (batch, kv_heads, seq * sinks, head_size); the recomputed `last_key` must match."""
        copies, recomputed = self._recomputed_keys[:, :, :-1], self._recomputed_keys[:, :, -1:]
        if (
            recomputed.shape != last_key.shape
            or (recomputed - last_key).abs().max() > torch.finfo(last_key.dtype).eps ** 0.5 * last_key.abs().max()
        ):
            raise ModelError("attention computes a different key for the same token at the same position", hint=FULL_CACHE_HINT)
        return copies

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of a mask over the step's own tokens; the mask of `prepare_step` replaces it."""
        return query_length, self._seen_tokens

    def get_seq_length(self) -> int:
        """Return the number of tokens seen so far."""
        return self._seen_tokens

    def get_max_length(self) -> int:
        """Return -1: the sequence length is unlimited."""
        return -1

    def reset(self) -> None:
        """Remove all tokens."""
        self.is_initialized, self._seen_tokens, self._is_prepared = False, 0, False


def streaming_cache_factory(spec: KVCacheSpec, *, module: torch.nn.Module | None) -> Callable[[], Cache]:
    """Return a factory for empty Transformers caches that follow the window policy in `spec`.

    `module` is as in `KVCacheReference`. Raises ModelError if it is None, or its attention modules take no position
    arguments.
    """
    if module is None:
        raise ModelError(
            "the keys of sinks depend on the query position, which requires hooks on the module",
            hint="pass the decoder as `module`",
        )
    attentions = attention_modules(module, len(spec.layers))
    for attention in attentions:
        if not {*_POSITION_ARGUMENTS} & {*_parameters(attention)}:
            raise ModelError(
                f"{type(attention).__name__} takes no position argument, so the keys of sinks cannot be recomputed",
                hint=FULL_CACHE_HINT,
            )
    for attention in attentions:
        if _attention_hook not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(_attention_hook, with_kwargs=True)
    policies = [(layer, layer.policy) for layer in spec.layers if isinstance(layer.policy, RingBuffer)]
    return lambda: Cache(layers=[StreamingLayer(layer, policy) for layer, policy in policies])


def _parameters(attention: torch.nn.Module) -> list[str]:
    return [*inspect.signature(attention.forward).parameters]


def _attention_hook(attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook: pass the inputs of `attention` to a StreamingLayer and replace the mask by that of the layer."""
    layer = cache_layer_for(attention, args, kwargs)
    if not isinstance(layer, StreamingLayer):
        return None
    parameters = _parameters(attention)
    arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
    cache_name = next(name for name, argument in arguments.items() if isinstance(argument, Cache))
    own_arguments = {name: argument for name, argument in arguments.items() if name in parameters}

    def make_keys(hidden_states: torch.Tensor, position_arguments: dict[str, Any]) -> torch.Tensor:
        return _capture_keys(
            attention,
            {
                **own_arguments,
                **position_arguments,
                parameters[0]: hidden_states,
                cache_name: _KeyCapturingCache(),
                "attention_mask": None,
            },
        )

    position_arguments = {name: own_arguments[name] for name in _POSITION_ARGUMENTS if own_arguments.get(name) is not None}
    return (), {**arguments, "attention_mask": layer.prepare_step(arguments[parameters[0]], position_arguments, make_keys)}


class _KeysCaptured(Exception):
    """Carries the keys out of an attention module; the rest of its forward is skipped."""

    def __init__(self, keys: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys


class _KeyCapturingCache(Cache):  # type: ignore[misc]
    """Empty cache that raises _KeysCaptured when attention appends to it."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Raise _KeysCaptured with `key_states`."""
        raise _KeysCaptured(key_states)


def _capture_keys(attention: torch.nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """Return the keys (batch, kv_heads, rows, head_size) that `attention` computes from `arguments`."""
    try:
        attention.forward(**arguments)
    except _KeysCaptured as captured:
        return captured.keys
    raise ModelError(f"{type(attention).__name__} appends no keys to its cache", hint=FULL_CACHE_HINT)


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tensors: Any) -> Any:
    """Return `tensors`, a tensor or a nested tuple of tensors, with `function` applied to each tensor."""
    return tuple(_map_tensors(function, item) for item in tensors) if isinstance(tensors, (tuple, list)) else function(tensors)


def _append_positions(old: Any, new: Any, dropped: int) -> Any:
    """Return the positions (1, tokens, ...) of `old` without the first `dropped` tokens, followed by those of `new`."""
    if isinstance(old, tuple):
        return tuple(_append_positions(*both, dropped) for both in zip(old, new, strict=True))
    return torch.cat([old[:, dropped:], new], dim=1)


def _first_row_selector(name: str, batch: int, seq: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that selects row 0, (1, seq, ...), of the position argument `name`, as all rows are equal."""

    def select_row(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim < 2 or tensor.shape[0] not in (1, batch) or tensor.shape[1] != seq:
            raise ModelError(
                f"`{name}` of attention has the shape {tuple(tensor.shape)}, expected ({batch}, {seq}, ...)",
                hint=FULL_CACHE_HINT,
            )
        return tensor[:1]

    return select_row
