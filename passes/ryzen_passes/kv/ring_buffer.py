"""Write ring buffers: caches of the first tokens and the latest tokens, in which a new token replaces the oldest in the window.

kv-static writes them without sinks, for layers with an attention window, and kv-window with sinks or without.

The token at position p is in slot p if it is one of the first `sinks` tokens, else in slot sinks + (p - sinks) mod window.
StreamingLLM attends with positions inside the cache. That equals attention with the original positions except for the sinks,
which move along with the window: for a query at position t they are shifted by max(t + 1 - slots, 0) positions. A step
therefore rotates the keys of the sinks and of no other token. It rotates them from a separate state that holds their original
keys, so that rotation errors do not accumulate.

Padding is not written: a sequence without a token in the step keeps its states, and free slots keep their content.

A step of one token writes in place: with TensorScatter, or with sinks with ScatterElements. A step of several tokens attends
over the slots from before the step followed by its own tokens, and writes to separate output buffers; as the shift of the
sinks differs for each query, each query has its own rotated copy of their keys. It may have more tokens than the ring has
slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import ModelInfo
from ryzen_compile.spec.kv_cache import CircularWrite, GatherWrite, RingBuffer
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.cache_rewriter import CacheRewriter
from ryzen_passes.kv.recognition.rotation import Rotation
from ryzen_passes.kv.slot_writes import SlotAssignment, SlotSources
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView, StaticKVTensor

_BOOL, _INT64 = ir.DataType.BOOL, ir.DataType.INT64


def to_ring_buffers(
    view: StaticCacheView,
    model_info: ModelInfo,
    layers: Sequence[int],
    *,
    window: int,
    sinks: int = 0,
    rotations: Sequence[Rotation] = (),
    capacity: int | None = None,
) -> Change:
    """Rewrite `view` in place so that every head of `layers` keeps the first `sinks` and the latest `window` tokens.

    Args:
        layers: The indices of the layers.
        window: The number of latest tokens that are kept.
        sinks: The number of first tokens that are kept.
        rotations: The key rotations of `layers`; with sinks only.
        capacity: The maximum number of tokens of a sequence afterwards; None: unlimited.
    """
    return _RingBufferRewriter(view, model_info, layers, rotations, sinks, window).run(capacity)


def _sink_state(layer_index: int) -> str:
    return f"sinks.{layer_index}"


class _RingBufferRewriter(CacheRewriter):
    """The rewrite of one graph to ring buffers."""

    def __init__(
        self,
        view: StaticCacheView,
        model_info: ModelInfo,
        layers: Sequence[int],
        rotations: Sequence[Rotation],
        sinks: int,
        window: int,
    ) -> None:
        super().__init__(view, model_info)
        self.layer_indices, self.rotations = layers, rotations
        self.sinks, self.window, self.slots = sinks, window, sinks + window
        self._cos_sin: dict[tuple[int, ir.DataType, str], tuple[ir.Value, ir.Value]] = {}

    def run(self, capacity: int | None) -> Change:
        if self.single_token:
            self._write_slot()
        else:
            self._write_slots()
        append = self._append_one_token if self.single_token else self._append_tokens
        layers = [self.view.layers[index] for index in self.layer_indices]
        for number, (index, layer) in enumerate(zip(self.layer_indices, layers, strict=True)):
            rotation = self.rotations[number] if self.sinks else None
            self.set_slots(layer, self.slots)
            append(index, layer, rotation, self._add_sink_state(index, layer) if self.sinks else None)
            self.record_layer(layer, policy=self._policy(index))
            if not self.single_token:
                for tensor in (layer.key, layer.value):
                    self.states.disable_in_place(tensor.spec.state or "")
        summary = f"the latest {self.window} tokens"
        return self.finish(
            f"{len(layers)} layers keep {f'the first {self.sinks} and ' if self.sinks else ''}{summary}",
            changed=layers,
            interface=msgspec.structs.replace(self.view.interface, capacity=capacity),
        )

    def _policy(self, layer_index: int) -> RingBuffer:
        write: CircularWrite | GatherWrite | None = None
        if not self.sinks:
            write = CircularWrite() if self.single_token else self.slot_sources.to_spec()
        return RingBuffer(
            sinks=self.sinks,
            window=self.window,
            sink_state=_sink_state(layer_index) if self.sinks else None,
            write=write,
            attended="cache" if self.single_token else "other" if self.sinks else "past-then-update",
        )

    def _add_sink_state(self, layer_index: int, layer: StaticCacheLayer) -> ir.Value:
        """Return the state (batch, kv_heads, sinks, head_size) of the original keys of the sinks."""
        shape = self.cache_shape(layer, self.sinks, layer.key.spec.head_size)
        return self.states.add_input(_sink_state(layer_index), self.model_info.types[layer.key.update], shape)

    def _compute_sink_shift(self, positions: ir.Value) -> ir.Value:
        """Return the number of positions by which the sinks are shifted for queries at `positions`."""
        before = self.insertion_point
        return self.op(before, "Max", [self.op(before, "Sub", [positions, self.int64(self.slots - 1)]), self.int64(0)])

    def _rotate(
        self, layer: StaticCacheLayer, rotation: Rotation | None, keys: ir.Value, cache_key: str, positions: ir.Value
    ) -> ir.Value:
        """Return `keys` rotated by `positions`; the cosines and sines are cached under `cache_key`."""
        assert rotation is not None
        dtype = self.model_info.types[keys]
        equal = next(other for other in self.rotations if other.same_as(rotation))
        key = (self.rotations.index(equal), dtype, cache_key)
        if key not in self._cos_sin:
            self._cos_sin[key] = rotation.write_cos_sin(self.writer, self.insertion_point, positions, dtype)
        return rotation.write_rotation(self.writer, layer.attention, keys, self._cos_sin[key])

    # One token

    def _write_slot(self) -> None:
        """Write the nodes that compute the slot of the token and the shift of the sinks."""
        before, position, token_mask = self.insertion_point, self.view.positions, self.bool_mask()
        self.is_token = self.unsqueeze(before, token_mask, 2)
        if not self.sinks:
            self.write_index = self.op(before, "Mod", [self.view.length, self.int64(self.window)], shape=self.view.length.shape)
            self.slot = self.unsqueeze(before, self.write_index, 1, 2)
            return
        after_sinks = self.op(before, "Sub", [position, self.int64(self.sinks)])
        ring_slot = self.op(
            before, "Add", [self.op(before, "Mod", [after_sinks, self.int64(self.window)]), self.int64(self.sinks)]
        )
        is_sink_position = self.op(before, "Less", [position, self.int64(self.sinks)], _BOOL)
        slot = self.op(before, "Where", [is_sink_position, position, ring_slot], _INT64)
        self.slot = self.unsqueeze(before, slot, 2)
        is_position = self.op(before, "Equal", [self.arange(0, self.sinks), position], _BOOL)
        is_sink = self.op(before, "And", [is_position, token_mask])
        self.is_sink = self.unsqueeze(before, is_sink, 1, 3)
        self.sink_shift = self.unsqueeze(before, self._compute_sink_shift(position), 2)

    def _append_one_token(
        self, layer_index: int, layer: StaticCacheLayer, rotation: Rotation | None, past_sinks: ir.Value | None
    ) -> None:
        before = layer.attention
        for tensor in (layer.key, layer.value):
            if past_sinks is None:
                row = self.slot_writer.merge_rows(before, tensor.past, tensor.update, self._assign_slots(layer))
                inputs = [tensor.past, row, self.write_index]
                cache = self.op(before, "TensorScatter", inputs, shape=tensor.past.shape, axis=2, mode="linear")
            elif tensor is layer.value:
                cache = self.slot_writer.scatter(before, tensor.past, tensor.update, self._assign_slots(layer))
            else:
                assignment = self._assign_slots(layer)
                row = self.slot_writer.merge_rows(before, tensor.past, tensor.update, assignment)
                dtype = self.model_info.types[tensor.update]
                sinks = self.op(before, "Where", [self.is_sink, tensor.update, past_sinks], dtype)
                self.states.set_output(_sink_state(layer_index), sinks, in_place=False)
                # The slot of a token that is itself a sink occurs twice, with equal rows: its shift is 0.
                rotated = self._rotate(layer, rotation, sinks, "step", self.sink_shift)
                rows = self.op(before, "Concat", [rotated, row], axis=2)
                indices = self._sink_and_token_indices(layer.spec.kv_heads, tensor.spec.head_size)
                cache = self.op(before, "ScatterElements", [tensor.past, indices, rows], axis=2)
            self.replace_cache(tensor, cache)
            self._attend(layer, tensor, cache)
        self.replace_mask(layer, self._visible_to_token(layer.spec.window))

    def _attend(self, layer: StaticCacheLayer, tensor: StaticKVTensor, attended: ir.Value) -> None:
        """Make the attention of `layer` read `attended` in place of `tensor`."""
        input_index = 1 if tensor is layer.key else 2
        old = layer.attention.inputs[input_index]
        if old is not None and old is not attended:
            self.dead_candidates += [producer] if (producer := old.producer()) is not None else []
            layer.attention.replace_input_with(input_index, attended)

    def _assign_slots(self, layer: StaticCacheLayer) -> SlotAssignment:
        """Return the slot of the token in `layer`."""
        return SlotAssignment(slots=self._slot_by_head(layer.spec.kv_heads), is_written=self.is_token)

    def _slot_by_head(self, heads: int) -> ir.Value:
        """Return (batch, kv_heads, 1): the slot of the token."""
        return self.shared(("slot", heads), lambda: self.expand(self.insertion_point, self.slot, 1, heads, 1))

    def _sink_and_token_indices(self, heads: int, size: int) -> ir.Value:
        """Return (batch, kv_heads, sinks + 1, head_size): the slots of the sinks, then the slot of the token."""
        return self.shared(("sinks and token", heads, size), lambda: self._write_sink_and_token_indices(heads, size))

    def _write_sink_and_token_indices(self, heads: int, size: int) -> ir.Value:
        before, integers = self.insertion_point, self.writer.int64_vector
        slot = self.unsqueeze(before, self._slot_by_head(heads), 3)
        sinks = self.writer.constant(np.arange(self.sinks).reshape(1, 1, -1, 1), _INT64)
        batch = self.op(before, "Shape", [self.view.mask], _INT64, start=0, end=1)
        shape = self.op(before, "Concat", [batch, integers(heads, self.sinks, 1)], axis=0)
        slots = self.op(before, "Concat", [self.op(before, "Expand", [sinks, shape]), slot], axis=2)
        return self.expand(before, slots, 1, 1, 1, size)

    def _visible_to_token(self, window: int | None) -> ir.Value:
        """Return (batch, 1, 1, slots) bool: the slots that the query sees."""
        if window is not None and window >= self.slots:
            window = None
        return self.shared(("mask", window), lambda: self._compute_single_token_mask(window))

    def _compute_single_token_mask(self, window: int | None) -> ir.Value:
        before, slot = self.insertion_point, self.arange(0, self.slots)
        position = self.unsqueeze(before, self.view.positions, 1, 2)
        # Slot n is occupied once a sequence has more than n tokens.
        visible = self.op(before, "LessOrEqual", [slot, position], _BOOL)
        if window is not None:
            distance = self.op(before, "Mod", [self.op(before, "Sub", [position, slot]), self.int64(self.window)])
            if self.sinks:
                shift = self.unsqueeze(before, self.sink_shift, 1)
                sink_distance = self.op(before, "Sub", [self.op(before, "Sub", [position, slot]), shift])
                is_sink = self.op(before, "Less", [slot, self.int64(self.sinks)], _BOOL)
                distance = self.op(before, "Where", [is_sink, sink_distance, distance], _INT64)
            in_window = self.op(before, "Less", [distance, self.int64(window)], _BOOL)
            visible = self.op(before, "And", [visible, in_window])
        visible.shape = ir.Shape((self.view.batch, 1, 1, self.slots))
        return visible

    # Several tokens

    def _write_slots(self) -> None:
        """Write the nodes that compute the token of each slot, and the shift of the sinks for each query and after the step."""
        before = self.insertion_point
        length = self.unsqueeze(before, self.view.length, 1)
        count = self.token_count()
        last = self.op(before, "Sub", [self.op(before, "Add", [length, count]), self.int64(1)])
        slot = self.arange(0, self.slots)
        newest = self._latest_positions(last, slot)
        if self.sinks:
            is_sink_slot = self.writer.constant(np.arange(self.slots) < self.sinks, _BOOL)
            newest = self.op(before, "Where", [is_sink_slot, slot, newest], _INT64)
        is_new = self.op(before, "And", [self._at_least(newest, length), self._at_least(last, newest)])
        is_overwritten = self.op(before, "And", [is_new, self._at_least(newest, slot)])
        token = self.op(before, "Sub", [newest, length])
        source = self.op(before, "Where", [is_overwritten, token, self.int64(0)], _INT64)
        self.slot_sources = SlotSources(token_indices=source, is_written=is_overwritten)
        ring = self.arange(self.sinks, self.slots)
        self.ring_positions = self._latest_positions(self.op(before, "Sub", [length, self.int64(1)]), ring)
        self.is_filled = self._at_least(self.ring_positions, ring)
        if self.sinks:
            is_sink = self.slice(before, is_overwritten, 0, self.sinks, axis=1)
            self.is_sink = self.unsqueeze(before, is_sink, 1, 3)
            self.sink_shift = self.unsqueeze(before, self._compute_sink_shift(last), 2)
            shift = self.unsqueeze(before, self._compute_sink_shift(self.view.positions), 2)
            repeated = self.expand(before, shift, 1, 1, self.sinks)
            self.sink_shift_by_query = self.reshape(before, repeated, 0, 1, -1)

    def _step_length(self) -> ir.Value:
        """Return (1,) int64: the number of tokens of the step, padding included."""
        before = self.insertion_point
        return self.shared("step length", lambda: self.op(before, "Shape", [self.view.mask], _INT64, start=1, end=2))

    def _at_least(self, value: ir.Value, bound: ir.Value) -> ir.Value:
        return self.op(self.insertion_point, "GreaterOrEqual", [value, bound], _BOOL)

    def _latest_positions(self, last: ir.Value, slot: ir.Value) -> ir.Value:
        """Return (batch, slots): the latest position up to `last` (batch, 1) that belongs to each slot of the ring."""
        before = self.insertion_point
        distance = self.op(before, "Mod", [self.op(before, "Sub", [last, slot]), self.int64(self.window)])
        return self.op(before, "Sub", [last, distance])

    def _append_tokens(
        self, layer_index: int, layer: StaticCacheLayer, rotation: Rotation | None, past_sinks: ir.Value | None
    ) -> None:
        before, integers = layer.attention, self.writer.int64_vector
        for tensor in (layer.key, layer.value):
            size, dtype = tensor.spec.head_size, self.model_info.types[tensor.update]
            new_rows, cache = self.slot_writer.gather(before, tensor.past, tensor.update, self.slot_sources)
            attended = [tensor.past, tensor.update]
            if past_sinks is not None:
                past_ring = self._slice_rows(before, tensor.past, self.sinks, self.slots)
                if tensor is layer.value:
                    sinks = self._slice_rows(before, cache, 0, self.sinks)
                else:
                    new_sinks = self._slice_rows(before, new_rows, 0, self.sinks)
                    sinks = self.op(before, "Where", [self.is_sink, new_sinks, past_sinks], dtype)
                    self.states.set_output(_sink_state(layer_index), sinks, in_place=False)
                    rotated = self._rotate(layer, rotation, sinks, "after step", self.sink_shift)
                    ring = self._slice_rows(before, cache, self.sinks, self.slots)
                    cache = self.op(before, "Concat", [rotated, ring], axis=2)
                column = self.unsqueeze(before, sinks, 2)
                repeats = self.op(before, "Concat", [integers(1, 1), self._step_length(), integers(1, 1)], axis=0)
                repeated = self.op(before, "Expand", [column, repeats])
                copies = self.reshape(before, repeated, 0, 0, -1, size)
                if tensor is layer.key:
                    copies = self._rotate(layer, rotation, copies, "query", self.sink_shift_by_query)
                attended = [copies, past_ring, tensor.update]
            self.replace_cache(tensor, cache)
            self._attend(layer, tensor, self.op(before, "Concat", attended, axis=2))
        self.replace_mask(layer, self._visible_to_tokens(layer.spec.window))

    def _slice_rows(self, before: ir.Node, value: ir.Value, start: int, end: int) -> ir.Value:
        return self.slice(before, value, start, end, axis=2)

    def _visible_to_tokens(self, window: int | None) -> ir.Value:
        """Return (batch, 1, seq, rows) bool: the sink copies, ring slots and tokens of the step that each query sees."""
        if window is not None and window >= self.slots:
            window = None
        return self.shared(("mask", window), lambda: self._compute_step_mask(window))

    def _compute_step_mask(self, window: int | None) -> ir.Value:
        before = self.insertion_point
        query = self.unsqueeze(before, self.view.positions, 1, 3)
        start = self.window_start(before, query, min(self.window, window or self.window))
        ring = self.unsqueeze(before, self.ring_positions, 1, 2)
        is_filled = self.unsqueeze(before, self.is_filled, 1, 2)
        in_ring = self.op(before, "And", [is_filled, self.visible_positions(before, ring, start=start)])
        key = self.unsqueeze(before, self.view.positions, 1, 2)
        is_token = self.unsqueeze(before, self.shared("token mask", self.bool_mask), 1, 2)
        is_no_sink = self.op(before, "And", [is_token, self._at_least(key, self.int64(self.sinks))])
        visible = self.visible_positions(before, key, query=query, start=start)
        parts = [in_ring, self.op(before, "And", [is_no_sink, visible])]
        if self.sinks:
            parts.insert(0, self._visible_sink_copies(query, window))
        return self.op(before, "Concat", parts, axis=3)

    def _visible_sink_copies(self, query: ir.Value, window: int | None) -> ir.Value:
        """Return (batch, 1, seq, seq * sinks) bool: each query sees its own copy of the sinks that exist."""
        before = self.insertion_point
        sink = self.arange(0, self.sinks)
        visible = self.op(before, "LessOrEqual", [sink, query], _BOOL)
        if window is not None:
            shift = self.unsqueeze(before, self._compute_sink_shift(self.view.positions), 1, 3)
            distance = self.op(before, "Sub", [self.op(before, "Sub", [query, sink]), shift])
            in_window = self.op(before, "Less", [distance, self.int64(window)], _BOOL)
            visible = self.op(before, "And", [visible, in_window])
        tokens = self.op(before, "Squeeze", [self._step_length()])
        index = self.op(before, "Range", [self.int64(0), tokens, self.int64(1)], _INT64)
        column = self.unsqueeze(before, index, 1)
        is_own = self.unsqueeze(before, self.op(before, "Equal", [column, index], _BOOL), 2)
        by_query = self.op(before, "And", [self.op(before, "Transpose", [visible], perm=(0, 2, 1, 3)), is_own])
        return self.unsqueeze(before, self.reshape(before, by_query, 0, 0, -1), 1)
