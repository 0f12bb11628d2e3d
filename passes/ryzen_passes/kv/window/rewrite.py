"""Rings: caches of the first tokens and the latest ones, in which a new token takes the slot of the one that falls out.

The token at position p lies in slot p where it is one of the `sinks` first, else in slot sinks + (p - sinks) mod window.
Attention with the positions that tokens have inside the cache, as StreamingLLM has it, is attention with every token at its
own position but the sinks, which follow the window: for a query at position t they stand t + 1 - slots further on, once that
is above 0. So a step turns the keys of the sinks and of no other token. They are kept as they were made too, and turned from
there: nothing adds up over the steps.

A step of one token writes where caches lie. A step of several attends over the slots as they were and its own tokens behind
them, and writes into a second memory; as sinks stand elsewhere for each query, each query has its own turned copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.spec.kv_cache import LayerCacheSpec, write_kv_cache_spec
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.recognition.rotation import Rotation
from ryzen_passes.kv.state_editor import StateEditor
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView
from ryzen_passes.kv.static.step_positions import LENGTH_STATE, NODE_NAME_PREFIX

METHOD = "window"
"""What the map of the caches calls it."""

_BOOL, _INT64 = ir.DataType.BOOL, ir.DataType.INT64


def to_ring_buffer(
    view: StaticCacheView, model_info: ModelInfo, rotations: Sequence[Rotation], *, sinks: int, window: int
) -> Change:
    """Rewrite `form` in place so that every head keeps the `sinks` first tokens and the `window` latest.

    `rotations` are those of the keys of the layers.
    """
    return _RingBufferRewriter(view, model_info, rotations, sinks, window).run()


class _RingBufferRewriter:
    def __init__(
        self, view: StaticCacheView, model_info: ModelInfo, rotations: Sequence[Rotation], sinks: int, window: int
    ) -> None:
        self.view, self.model_info, self.rotations = view, model_info, rotations
        self.sinks, self.window, self.slots = sinks, window, sinks + window
        self.graph = view.model.graph
        self.writer = NodeBuilder(self.graph, model_info)
        self.states = StateEditor(self.writer, view.interface)
        self.dead_candidates: list[ir.Node] = []
        self.layer_specs: list[LayerCacheSpec] = []
        self._cos_sin: dict[tuple[int, ir.DataType, str], tuple[ir.Value, ir.Value]] = {}
        self._shared: dict[object, ir.Value] = {}

    def run(self) -> Change:
        form = self.view
        self.insertion_point = form.first_node_after_positions()
        self.token_mask = self._op(self.insertion_point, "Cast", [form.mask], _BOOL, to=int(_BOOL))
        one = form.seq == 1
        if one:
            self._write_slot()
        else:
            self._write_slots()
        for at, (layer, rotation) in enumerate(zip(form.layers, self.rotations, strict=True)):
            made = [side.cache.producer() for side in (layer.key, layer.value)]
            for side in (layer.key, layer.value):
                side.past.shape = ir.Shape((form.batch, layer.spec.kv_heads, self.slots, side.spec.head_size))
            sinks_in = self._add_sink_state(at, layer) if self.sinks else None
            (self._append_one_token if one else self._append_tokens)(at, layer, rotation, sinks_in)
            self.dead_candidates += [node for node in made if node is not None]
        if not one:
            self.states.disable_in_place()
        removed = remove_dead_nodes([node for node in self.dead_candidates if node.graph is not None])
        self._write_metadata()
        return Change(
            inserted=tuple(self.writer.inserted),
            removed=tuple(removed),
            changed=tuple(layer.attention.name or "" for layer in form.layers),
            summary=f"{len(form.layers)} layers keep the {self.sinks} first tokens and the {self.window} latest",
        )

    def _op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        return self.writer.op(before, op, inputs, attributes, dtype=dtype, name_prefix=NODE_NAME_PREFIX)

    def _int64(self, number: int) -> ir.Value:
        return self.writer.scalar(number, _INT64)

    def _arange(self, start: int, end: int) -> ir.Value:
        """Return (end - start,): the numbers from `start` on."""
        return self.writer.constant(np.arange(start, end), _INT64)

    def _add_sink_state(self, layer_index: int, layer: StaticCacheLayer) -> ir.Value:
        """Return the keys of the sinks as they were made, (batch, kv_heads, sinks, size): a state."""
        shape = ir.Shape((self.view.batch, layer.spec.kv_heads, self.sinks, layer.key.spec.head_size))
        return self.states.add_input(f"sinks.{layer_index}", self.model_info.types[layer.key.update], shape)

    def _compute_sink_shift(self, positions: ir.Value) -> ir.Value:
        """Return how much further on sinks are for queries at the positions `at`."""
        before = self.insertion_point
        return self._op(before, "Max", [self._op(before, "Sub", [positions, self._int64(self.slots - 1)]), self._int64(0)])

    def _rotate(
        self, layer: StaticCacheLayer, rotation: Rotation, keys: ir.Value, cache_key: str, positions: ir.Value
    ) -> ir.Value:
        """Return `keys` turned by the positions `by`, which `word` stands for."""
        dtype = self.model_info.types[keys]
        alike = next(other for other in self.rotations if other.same_as(rotation))
        key = (self.rotations.index(alike), dtype, cache_key)
        if key not in self._cos_sin:
            self._cos_sin[key] = rotation.write_cos_sin(self.writer, self.insertion_point, positions, dtype)
        return rotation.write_rotation(self.writer, layer.attention, keys, self._cos_sin[key])

    # One token

    def _write_slot(self) -> None:
        """Tell where the token goes, what is seen, and how far sinks are turned."""
        before, at, integers = self.insertion_point, self.view.positions, self.writer.int64_vector
        beyond = self._op(before, "Sub", [at, self._int64(self.sinks)])
        in_ring = self._op(
            before, "Add", [self._op(before, "Mod", [beyond, self._int64(self.window)]), self._int64(self.sinks)]
        )
        early = self._op(before, "Less", [at, self._int64(self.sinks)], _BOOL)
        # Spelled as kv-evict spells it: that is how kv-quant knows the slot.
        self.slot = self._op(before, "Unsqueeze", [self._op(before, "Where", [early, at, in_ring], _INT64), integers(2)])
        self.row_token_mask = self._op(
            before, "Unsqueeze", [self._op(before, "Unsqueeze", [self.token_mask, integers(2)]), integers(3)]
        )
        if self.sinks:
            here = self._op(before, "Equal", [self._arange(0, self.sinks), at], _BOOL)
            self.is_sink = self._op(before, "Unsqueeze", [self._op(before, "And", [here, self.token_mask]), integers(1, 3)])
            self.sink_shift = self._op(before, "Unsqueeze", [self._compute_sink_shift(at), integers(2)])

    def _append_one_token(
        self, layer_index: int, layer: StaticCacheLayer, rotation: Rotation, sinks_in: ir.Value | None
    ) -> None:
        before, wholes = layer.attention, []
        for side in (layer.key, layer.value):
            index = self._scatter_indices(layer.spec.kv_heads, side.spec.head_size)
            kept = self._op(before, "GatherElements", [side.past, index], axis=2)
            row = self._op(before, "Where", [self.row_token_mask, side.update, kept], self.model_info.types[side.update])
            if side is layer.key and sinks_in is not None:
                sinks = self._op(before, "Where", [self.is_sink, side.update, sinks_in], self.model_info.types[side.update])
                self.states.set_output(f"sinks.{layer_index}", sinks, in_place=False)
                # The slot of a token that is a sink is written twice, with the same: it is turned by nothing yet.
                row = self._op(before, "Concat", [self._rotate(layer, rotation, sinks, "now", self.sink_shift), row], axis=2)
                index = self._scatter_indices(layer.spec.kv_heads, side.spec.head_size, sinks=True)
            whole = self._op(before, "ScatterElements", [side.past, index, row], axis=2)
            replace_value(side.cache, whole)
            whole.shape = side.past.shape
            wholes.append(whole)
        before.replace_input_with(3, self._visible_to_token(layer.spec.window))
        self._record_layer(layer, wholes)

    def _scatter_indices(self, heads: int, size: int, *, sinks: bool = False) -> ir.Value:
        """Return (batch, heads, 1, size): the slot that is written; with `sinks` those of the sinks before it."""
        key = ("index", heads, size, sinks)
        if key not in self._shared:
            before, integers = self.insertion_point, self.writer.int64_vector
            each = self._op(before, "Expand", [self.slot, integers(1, heads, 1)])
            at = self._op(before, "Unsqueeze", [each, integers(3)])
            if sinks:
                first = self.writer.constant(np.arange(self.sinks).reshape(1, 1, -1, 1), _INT64)
                batch = self._op(before, "Shape", [self.view.mask], _INT64, start=0, end=1)
                rows = self._op(before, "Concat", [batch, integers(heads, self.sinks, 1)], axis=0)
                at = self._op(before, "Concat", [self._op(before, "Expand", [first, rows]), at], axis=2)
            self._shared[key] = self._op(before, "Expand", [at, integers(1, 1, 1, size)])
        return self._shared[key]

    def _visible_to_token(self, window: int | None) -> ir.Value:
        """Return (batch, 1, 1, slots) bool: which slots the query sees."""
        if window is not None and window >= self.slots:
            window = None
        if ("seen", window) not in self._shared:
            before, slot = self.insertion_point, self._arange(0, self.slots)
            at = self._op(before, "Unsqueeze", [self.view.positions, self.writer.int64_vector(1, 2)])
            seen = self._op(before, "LessOrEqual", [slot, at], _BOOL)
            if window is not None:
                ago = self._op(before, "Mod", [self._op(before, "Sub", [at, slot]), self._int64(self.window)])
                if self.sinks:
                    shift = self._op(before, "Unsqueeze", [self.sink_shift, self.writer.int64_vector(1)])
                    of_sink = self._op(before, "Sub", [self._op(before, "Sub", [at, slot]), shift])
                    is_sink = self._op(before, "Less", [slot, self._int64(self.sinks)], _BOOL)
                    ago = self._op(before, "Where", [is_sink, of_sink, ago], _INT64)
                seen = self._op(before, "And", [seen, self._op(before, "Less", [ago, self._int64(window)], _BOOL)])
            seen.shape = ir.Shape((self.view.batch, 1, 1, self.slots))
            self._shared["seen", window] = seen
        return self._shared["seen", window]

    # Several tokens

    def _write_slots(self) -> None:
        """Tell which token of the step each slot takes, and how far sinks are turned, for each query and after the step."""
        before, integers = self.insertion_point, self.writer.int64_vector
        past = next(value for value in self.graph.inputs if value.name == self.states[LENGTH_STATE].input)
        length = self._op(before, "Unsqueeze", [past, integers(1)])
        count = self._op(before, "ReduceSum", [self.view.mask, integers(1)], keepdims=1)
        end = self._op(before, "Sub", [self._op(before, "Add", [length, count]), self._int64(1)])
        slot = self._arange(0, self.slots)
        newest = self._latest_positions(end, slot)
        if self.sinks:
            newest = self._op(
                before, "Where", [self.writer.constant(np.arange(self.slots) < self.sinks, _BOOL), slot, newest], _INT64
            )
        fresh = self._op(before, "And", [self._greater_or_equal(newest, length), self._greater_or_equal(end, newest)])
        taken = self._op(before, "And", [fresh, self._greater_or_equal(newest, slot)])
        since = self._op(before, "Sub", [newest, length])
        self.source_token = self._op(
            before, "Unsqueeze", [self._op(before, "Where", [taken, since, self._int64(0)], _INT64), integers(1, 3)]
        )
        self.is_overwritten = self._op(before, "Unsqueeze", [taken, integers(1, 3)])
        ring = self._arange(self.sinks, self.slots)
        self.ring_positions = self._latest_positions(self._op(before, "Sub", [length, self._int64(1)]), ring)
        self.is_filled = self._greater_or_equal(self.ring_positions, ring)
        self.step_length = self._op(before, "Shape", [self.view.mask], _INT64, start=1, end=2)
        if self.sinks:
            at = self.view.positions
            self.is_sink = self._slice_rows(before, self.is_overwritten, 0, self.sinks)
            self.sink_shift = self._op(before, "Unsqueeze", [self._compute_sink_shift(end), integers(2)])
            apart = self._op(before, "Unsqueeze", [self._compute_sink_shift(at), integers(2)])
            many = self._op(before, "Expand", [apart, integers(1, 1, self.sinks)])
            self.sink_shift_by_query = self._op(before, "Reshape", [many, integers(0, 1, -1)])

    def _greater_or_equal(self, one: ir.Value, two: ir.Value) -> ir.Value:
        return self._op(self.insertion_point, "GreaterOrEqual", [one, two], _BOOL)

    def _latest_positions(self, end: ir.Value, slot: ir.Value) -> ir.Value:
        """Return (batch, slots): the latest position up to `end` (batch, 1) that lies in each slot of the ring."""
        before = self.insertion_point
        ago = self._op(before, "Mod", [self._op(before, "Sub", [end, slot]), self._int64(self.window)])
        return self._op(before, "Sub", [end, ago])

    def _append_tokens(self, layer_index: int, layer: StaticCacheLayer, rotation: Rotation, sinks_in: ir.Value | None) -> None:
        before, integers, wholes = layer.attention, self.writer.int64_vector, []
        for place, side in ((1, layer.key), (2, layer.value)):
            size, dtype = side.spec.head_size, self.model_info.types[side.update]
            source = self._source_indices(layer.spec.kv_heads, size)
            fresh = self._op(before, "GatherElements", [side.update, source], axis=2)
            whole = self._op(before, "Where", [self.is_overwritten, fresh, side.past], dtype)
            parts = [side.update]
            if sinks_in is not None:
                ring = [self._slice_rows(before, value, self.sinks, self.slots) for value in (side.past, whole)]
                sinks = self._slice_rows(before, whole, 0, self.sinks)
                if side is layer.key:
                    sinks = self._op(
                        before, "Where", [self.is_sink, self._slice_rows(before, fresh, 0, self.sinks), sinks_in], dtype
                    )
                    self.states.set_output(f"sinks.{layer_index}", sinks, in_place=False)
                    whole = self._op(
                        before, "Concat", [self._rotate(layer, rotation, sinks, "after", self.sink_shift), ring[1]], axis=2
                    )
                apart = self._op(before, "Unsqueeze", [sinks, integers(2)])
                times = self._op(before, "Concat", [integers(1, 1), self.step_length, integers(1, 1)], axis=0)
                copies = self._op(before, "Reshape", [self._op(before, "Expand", [apart, times]), integers(0, 0, -1, size)])
                if side is layer.key:
                    copies = self._rotate(layer, rotation, copies, "query", self.sink_shift_by_query)
                parts = [copies, ring[0], *parts]
            else:
                parts = [side.past, *parts]
            before.replace_input_with(place, self._op(before, "Concat", parts, axis=2))
            replace_value(side.cache, whole)
            whole.shape = side.past.shape
            wholes.append(whole)
        before.replace_input_with(3, self._visible_to_tokens(layer.spec.window))
        self._record_layer(layer, wholes)

    def _source_indices(self, heads: int, size: int) -> ir.Value:
        """Return (batch, heads, slots, size): which token of the step a slot would take."""
        key = ("source", heads, size)
        if key not in self._shared:
            self._shared[key] = self._op(
                self.insertion_point, "Expand", [self.source_token, self.writer.int64_vector(1, heads, 1, size)]
            )
        return self._shared[key]

    def _slice_rows(self, before: ir.Node, value: ir.Value, start: int, end: int) -> ir.Value:
        integers = self.writer.int64_vector
        return self._op(before, "Slice", [value, integers(start), integers(end), integers(2)])

    def _visible_to_tokens(self, window: int | None) -> ir.Value:
        """Return (batch, 1, seq, rows) bool: which copies of sinks, slots of the ring, and tokens of the step queries see."""
        if window is not None and window >= self.slots:
            window = None
        if ("seen", window) not in self._shared:
            before, integers = self.insertion_point, self.writer.int64_vector
            far = self._int64(min(self.window, window or self.window))
            query = self._op(before, "Unsqueeze", [self.view.positions, integers(1, 3)])
            since = self._op(before, "Sub", [query, far])
            held = self._op(before, "Unsqueeze", [self.ring_positions, integers(1, 2)])
            is_held = self._op(before, "Unsqueeze", [self.is_filled, integers(1, 2)])
            ring = self._op(before, "And", [is_held, self._op(before, "Greater", [held, since], _BOOL)])
            key = self._op(before, "Unsqueeze", [self.view.positions, integers(1, 2)])
            real = self._op(before, "Unsqueeze", [self.token_mask, integers(1, 2)])
            later = self._op(before, "And", [real, self._greater_or_equal(key, self._int64(self.sinks))])
            near = self._op(
                before, "And", [self._greater_or_equal(query, key), self._op(before, "Greater", [key, since], _BOOL)]
            )
            parts = [ring, self._op(before, "And", [later, near])]
            if self.sinks:
                parts.insert(0, self._visible_sink_copies(query, window))
            self._shared["seen", window] = self._op(before, "Concat", parts, axis=3)
        return self._shared["seen", window]

    def _visible_sink_copies(self, query: ir.Value, window: int | None) -> ir.Value:
        """Return (batch, 1, seq, seq * sinks) bool: each query its own copy of the sinks that have come."""
        before, integers = self.insertion_point, self.writer.int64_vector
        sink = self._arange(0, self.sinks)
        seen = self._op(before, "LessOrEqual", [sink, query], _BOOL)
        if window is not None:
            shift = self._op(before, "Unsqueeze", [self._compute_sink_shift(self.view.positions), integers(1, 3)])
            ago = self._op(before, "Sub", [self._op(before, "Sub", [query, sink]), shift])
            seen = self._op(before, "And", [seen, self._op(before, "Less", [ago, self._int64(window)], _BOOL)])
        tokens = self._op(before, "Squeeze", [self.step_length])
        number = self._op(before, "Range", [self._int64(0), tokens, self._int64(1)], _INT64)
        rows = self._op(before, "Unsqueeze", [number, integers(1)])
        own = self._op(before, "Unsqueeze", [self._op(before, "Equal", [rows, number], _BOOL), integers(2)])
        both = self._op(before, "And", [self._op(before, "Transpose", [seen], perm=(0, 2, 1, 3)), own])
        return self._op(before, "Unsqueeze", [self._op(before, "Reshape", [both, integers(0, 0, -1)]), integers(1)])

    # What is told

    def _record_layer(self, layer: StaticCacheLayer, caches: Sequence[ir.Value]) -> None:
        told = layer.spec
        self.layer_specs.append(
            msgspec.structs.replace(
                told,
                slots=self.slots,
                method=METHOD,
                sinks=self.sinks,
                recent_window=self.window,
                key=msgspec.structs.replace(told.key, cache=caches[0].name or ""),
                value=msgspec.structs.replace(told.value, cache=caches[1].name or ""),
            )
        )

    def _write_metadata(self) -> None:
        bounds = [
            one
            for one in (self.view.spec.max_positions, *(rotation.max_positions for rotation in self.rotations))
            if one is not None
        ]
        interface = msgspec.structs.replace(self.view.interface, capacity=min(bounds, default=None))
        self.states.write_interface(self.view.model, interface)
        write_kv_cache_spec(self.view.model, msgspec.structs.replace(self.view.spec, layers=tuple(self.layer_specs)))
