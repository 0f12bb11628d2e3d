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

from ryzen_compile.ir.edit.builder import Known, Writer, remove_dead, take_over
from ryzen_compile.spec.kv_cache import CachedLayer
from ryzen_compile.spec.kv_cache import attach as attach_map
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.recognition.rotation import Rotation
from ryzen_passes.kv.states import States
from ryzen_passes.kv.static.cache_view import FixedForm, FixedLayer
from ryzen_passes.kv.static.positions import LENGTH, STEM

METHOD = "window"
"""What the map of the caches calls it."""

_BOOL, _INT64 = ir.DataType.BOOL, ir.DataType.INT64


def to_ring(form: FixedForm, known: Known, rotations: Sequence[Rotation], *, sinks: int, window: int) -> Change:
    """Rewrite `form` in place so that every head keeps the `sinks` first tokens and the `window` latest.

    `rotations` are those of the keys of the layers.
    """
    return _Ring(form, known, rotations, sinks, window).run()


class _Ring:
    def __init__(self, form: FixedForm, known: Known, rotations: Sequence[Rotation], sinks: int, window: int) -> None:
        self.form, self.known, self.rotations = form, known, rotations
        self.sinks, self.window, self.slots = sinks, window, sinks + window
        self.graph = form.model.graph
        self.write = Writer(self.graph, known)
        self.states = States(self.write, form.interface)
        self.going: list[ir.Node] = []
        self.layers: list[CachedLayer] = []
        self._angles: dict[tuple[int, ir.DataType, str], tuple[ir.Value, ir.Value]] = {}
        self._shared: dict[object, ir.Value] = {}

    def run(self) -> Change:
        form = self.form
        self.first = form.behind_positions()
        self.real = self._op(self.first, "Cast", [form.mask], _BOOL, to=int(_BOOL))
        one = form.seq == 1
        if one:
            self._tell_slot()
        else:
            self._tell_slots()
        for at, (layer, rotation) in enumerate(zip(form.layers, self.rotations, strict=True)):
            made = [side.whole.producer() for side in (layer.key, layer.value)]
            for side in (layer.key, layer.value):
                side.past.shape = ir.Shape((form.batch, layer.told.kv_heads, self.slots, side.told.size))
            sinks_in = self._begin_sinks(at, layer) if self.sinks else None
            (self._one_token if one else self._tokens)(at, layer, rotation, sinks_in)
            self.going += [node for node in made if node is not None]
        if not one:
            self.states.keep_apart()
        removed = remove_dead([node for node in self.going if node.graph is not None])
        self._attach()
        return Change(
            inserted=tuple(self.write.written),
            removed=tuple(removed),
            changed=tuple(layer.attention.name or "" for layer in form.layers),
            says=f"{len(form.layers)} layers keep the {self.sinks} first tokens and the {self.window} latest",
        )

    def _op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        return self.write.op(before, op, inputs, attributes, dtype=dtype, stem=STEM)

    def _number(self, number: int) -> ir.Value:
        return self.write.number(number, _INT64)

    def _count(self, start: int, end: int) -> ir.Value:
        """Return (end - start,): the numbers from `start` on."""
        return self.write.constant(np.arange(start, end), _INT64)

    def _begin_sinks(self, at: int, layer: FixedLayer) -> ir.Value:
        """Return the keys of the sinks as they were made, (batch, kv_heads, sinks, size): a state."""
        shape = ir.Shape((self.form.batch, layer.told.kv_heads, self.sinks, layer.key.told.size))
        return self.states.begin(f"sinks.{at}", self.known.types[layer.key.new], shape)

    def _shift(self, at: ir.Value) -> ir.Value:
        """Return how much further on sinks are for queries at the positions `at`."""
        before = self.first
        return self._op(before, "Max", [self._op(before, "Sub", [at, self._number(self.slots - 1)]), self._number(0)])

    def _turned(self, layer: FixedLayer, rotation: Rotation, keys: ir.Value, word: str, by: ir.Value) -> ir.Value:
        """Return `keys` turned by the positions `by`, which `word` stands for."""
        dtype = self.known.types[keys]
        alike = next(other for other in self.rotations if other.same_as(rotation))
        key = (self.rotations.index(alike), dtype, word)
        if key not in self._angles:
            self._angles[key] = rotation.angles(self.write, self.first, by, dtype)
        return rotation.turn(self.write, layer.attention, keys, self._angles[key])

    # One token

    def _tell_slot(self) -> None:
        """Tell where the token goes, what is seen, and how far sinks are turned."""
        before, at, integers = self.first, self.form.positions, self.write.integers
        beyond = self._op(before, "Sub", [at, self._number(self.sinks)])
        in_ring = self._op(
            before, "Add", [self._op(before, "Mod", [beyond, self._number(self.window)]), self._number(self.sinks)]
        )
        early = self._op(before, "Less", [at, self._number(self.sinks)], _BOOL)
        # Spelled as kv-evict spells it: that is how kv-quant knows the slot.
        self.slot = self._op(before, "Unsqueeze", [self._op(before, "Where", [early, at, in_ring], _INT64), integers(2)])
        self.is_real = self._op(before, "Unsqueeze", [self._op(before, "Unsqueeze", [self.real, integers(2)]), integers(3)])
        if self.sinks:
            here = self._op(before, "Equal", [self._count(0, self.sinks), at], _BOOL)
            self.is_sink = self._op(before, "Unsqueeze", [self._op(before, "And", [here, self.real]), integers(1, 3)])
            self.by = self._op(before, "Unsqueeze", [self._shift(at), integers(2)])

    def _one_token(self, at: int, layer: FixedLayer, rotation: Rotation, sinks_in: ir.Value | None) -> None:
        before, wholes = layer.attention, []
        for side in (layer.key, layer.value):
            index = self._indices(layer.told.kv_heads, side.told.size)
            kept = self._op(before, "GatherElements", [side.past, index], axis=2)
            row = self._op(before, "Where", [self.is_real, side.new, kept], self.known.types[side.new])
            if side is layer.key and sinks_in is not None:
                sinks = self._op(before, "Where", [self.is_sink, side.new, sinks_in], self.known.types[side.new])
                self.states.end(f"sinks.{at}", sinks, in_place=False)
                # The slot of a token that is a sink is written twice, with the same: it is turned by nothing yet.
                row = self._op(before, "Concat", [self._turned(layer, rotation, sinks, "now", self.by), row], axis=2)
                index = self._indices(layer.told.kv_heads, side.told.size, sinks=True)
            whole = self._op(before, "ScatterElements", [side.past, index, row], axis=2)
            take_over(side.whole, whole)
            whole.shape = side.past.shape
            wholes.append(whole)
        before.replace_input_with(3, self._seen_by_one(layer.told.window))
        self._tell(layer, wholes)

    def _indices(self, heads: int, size: int, *, sinks: bool = False) -> ir.Value:
        """Return (batch, heads, 1, size): the slot that is written; with `sinks` those of the sinks before it."""
        key = ("index", heads, size, sinks)
        if key not in self._shared:
            before, integers = self.first, self.write.integers
            each = self._op(before, "Expand", [self.slot, integers(1, heads, 1)])
            at = self._op(before, "Unsqueeze", [each, integers(3)])
            if sinks:
                first = self.write.constant(np.arange(self.sinks).reshape(1, 1, -1, 1), _INT64)
                batch = self._op(before, "Shape", [self.form.mask], _INT64, start=0, end=1)
                rows = self._op(before, "Concat", [batch, integers(heads, self.sinks, 1)], axis=0)
                at = self._op(before, "Concat", [self._op(before, "Expand", [first, rows]), at], axis=2)
            self._shared[key] = self._op(before, "Expand", [at, integers(1, 1, 1, size)])
        return self._shared[key]

    def _seen_by_one(self, window: int | None) -> ir.Value:
        """Return (batch, 1, 1, slots) bool: which slots the query sees."""
        if window is not None and window >= self.slots:
            window = None
        if ("seen", window) not in self._shared:
            before, slot = self.first, self._count(0, self.slots)
            at = self._op(before, "Unsqueeze", [self.form.positions, self.write.integers(1, 2)])
            seen = self._op(before, "LessOrEqual", [slot, at], _BOOL)
            if window is not None:
                ago = self._op(before, "Mod", [self._op(before, "Sub", [at, slot]), self._number(self.window)])
                if self.sinks:
                    shift = self._op(before, "Unsqueeze", [self.by, self.write.integers(1)])
                    of_sink = self._op(before, "Sub", [self._op(before, "Sub", [at, slot]), shift])
                    is_sink = self._op(before, "Less", [slot, self._number(self.sinks)], _BOOL)
                    ago = self._op(before, "Where", [is_sink, of_sink, ago], _INT64)
                seen = self._op(before, "And", [seen, self._op(before, "Less", [ago, self._number(window)], _BOOL)])
            seen.shape = ir.Shape((self.form.batch, 1, 1, self.slots))
            self._shared["seen", window] = seen
        return self._shared["seen", window]

    # Several tokens

    def _tell_slots(self) -> None:
        """Tell which token of the step each slot takes, and how far sinks are turned, for each query and after the step."""
        before, integers = self.first, self.write.integers
        past = next(value for value in self.graph.inputs if value.name == self.states[LENGTH].input)
        length = self._op(before, "Unsqueeze", [past, integers(1)])
        count = self._op(before, "ReduceSum", [self.form.mask, integers(1)], keepdims=1)
        end = self._op(before, "Sub", [self._op(before, "Add", [length, count]), self._number(1)])
        slot = self._count(0, self.slots)
        newest = self._latest(end, slot)
        if self.sinks:
            newest = self._op(
                before, "Where", [self.write.constant(np.arange(self.slots) < self.sinks, _BOOL), slot, newest], _INT64
            )
        fresh = self._op(before, "And", [self._at_least(newest, length), self._at_least(end, newest)])
        taken = self._op(before, "And", [fresh, self._at_least(newest, slot)])
        since = self._op(before, "Sub", [newest, length])
        self.source = self._op(
            before, "Unsqueeze", [self._op(before, "Where", [taken, since, self._number(0)], _INT64), integers(1, 3)]
        )
        self.taken = self._op(before, "Unsqueeze", [taken, integers(1, 3)])
        ring = self._count(self.sinks, self.slots)
        self.held = self._latest(self._op(before, "Sub", [length, self._number(1)]), ring)
        self.is_held = self._at_least(self.held, ring)
        self.tokens = self._op(before, "Shape", [self.form.mask], _INT64, start=1, end=2)
        if self.sinks:
            at = self.form.positions
            self.is_sink = self._rows(before, self.taken, 0, self.sinks)
            self.by = self._op(before, "Unsqueeze", [self._shift(end), integers(2)])
            apart = self._op(before, "Unsqueeze", [self._shift(at), integers(2)])
            many = self._op(before, "Expand", [apart, integers(1, 1, self.sinks)])
            self.by_query = self._op(before, "Reshape", [many, integers(0, 1, -1)])

    def _at_least(self, one: ir.Value, two: ir.Value) -> ir.Value:
        return self._op(self.first, "GreaterOrEqual", [one, two], _BOOL)

    def _latest(self, end: ir.Value, slot: ir.Value) -> ir.Value:
        """Return (batch, slots): the latest position up to `end` (batch, 1) that lies in each slot of the ring."""
        before = self.first
        ago = self._op(before, "Mod", [self._op(before, "Sub", [end, slot]), self._number(self.window)])
        return self._op(before, "Sub", [end, ago])

    def _tokens(self, at: int, layer: FixedLayer, rotation: Rotation, sinks_in: ir.Value | None) -> None:
        before, integers, wholes = layer.attention, self.write.integers, []
        for place, side in ((1, layer.key), (2, layer.value)):
            size, dtype = side.told.size, self.known.types[side.new]
            source = self._sources(layer.told.kv_heads, size)
            fresh = self._op(before, "GatherElements", [side.new, source], axis=2)
            whole = self._op(before, "Where", [self.taken, fresh, side.past], dtype)
            parts = [side.new]
            if sinks_in is not None:
                ring = [self._rows(before, value, self.sinks, self.slots) for value in (side.past, whole)]
                sinks = self._rows(before, whole, 0, self.sinks)
                if side is layer.key:
                    sinks = self._op(before, "Where", [self.is_sink, self._rows(before, fresh, 0, self.sinks), sinks_in], dtype)
                    self.states.end(f"sinks.{at}", sinks, in_place=False)
                    whole = self._op(
                        before, "Concat", [self._turned(layer, rotation, sinks, "after", self.by), ring[1]], axis=2
                    )
                apart = self._op(before, "Unsqueeze", [sinks, integers(2)])
                times = self._op(before, "Concat", [integers(1, 1), self.tokens, integers(1, 1)], axis=0)
                copies = self._op(before, "Reshape", [self._op(before, "Expand", [apart, times]), integers(0, 0, -1, size)])
                if side is layer.key:
                    copies = self._turned(layer, rotation, copies, "query", self.by_query)
                parts = [copies, ring[0], *parts]
            else:
                parts = [side.past, *parts]
            before.replace_input_with(place, self._op(before, "Concat", parts, axis=2))
            take_over(side.whole, whole)
            whole.shape = side.past.shape
            wholes.append(whole)
        before.replace_input_with(3, self._seen_by_many(layer.told.window))
        self._tell(layer, wholes)

    def _sources(self, heads: int, size: int) -> ir.Value:
        """Return (batch, heads, slots, size): which token of the step a slot would take."""
        key = ("source", heads, size)
        if key not in self._shared:
            self._shared[key] = self._op(self.first, "Expand", [self.source, self.write.integers(1, heads, 1, size)])
        return self._shared[key]

    def _rows(self, before: ir.Node, value: ir.Value, start: int, end: int) -> ir.Value:
        integers = self.write.integers
        return self._op(before, "Slice", [value, integers(start), integers(end), integers(2)])

    def _seen_by_many(self, window: int | None) -> ir.Value:
        """Return (batch, 1, seq, rows) bool: which copies of sinks, slots of the ring, and tokens of the step queries see."""
        if window is not None and window >= self.slots:
            window = None
        if ("seen", window) not in self._shared:
            before, integers = self.first, self.write.integers
            far = self._number(min(self.window, window or self.window))
            query = self._op(before, "Unsqueeze", [self.form.positions, integers(1, 3)])
            since = self._op(before, "Sub", [query, far])
            held = self._op(before, "Unsqueeze", [self.held, integers(1, 2)])
            is_held = self._op(before, "Unsqueeze", [self.is_held, integers(1, 2)])
            ring = self._op(before, "And", [is_held, self._op(before, "Greater", [held, since], _BOOL)])
            key = self._op(before, "Unsqueeze", [self.form.positions, integers(1, 2)])
            real = self._op(before, "Unsqueeze", [self.real, integers(1, 2)])
            later = self._op(before, "And", [real, self._at_least(key, self._number(self.sinks))])
            near = self._op(before, "And", [self._at_least(query, key), self._op(before, "Greater", [key, since], _BOOL)])
            parts = [ring, self._op(before, "And", [later, near])]
            if self.sinks:
                parts.insert(0, self._seen_copies(query, window))
            self._shared["seen", window] = self._op(before, "Concat", parts, axis=3)
        return self._shared["seen", window]

    def _seen_copies(self, query: ir.Value, window: int | None) -> ir.Value:
        """Return (batch, 1, seq, seq * sinks) bool: each query its own copy of the sinks that have come."""
        before, integers = self.first, self.write.integers
        sink = self._count(0, self.sinks)
        seen = self._op(before, "LessOrEqual", [sink, query], _BOOL)
        if window is not None:
            shift = self._op(before, "Unsqueeze", [self._shift(self.form.positions), integers(1, 3)])
            ago = self._op(before, "Sub", [self._op(before, "Sub", [query, sink]), shift])
            seen = self._op(before, "And", [seen, self._op(before, "Less", [ago, self._number(window)], _BOOL)])
        tokens = self._op(before, "Squeeze", [self.tokens])
        number = self._op(before, "Range", [self._number(0), tokens, self._number(1)], _INT64)
        rows = self._op(before, "Unsqueeze", [number, integers(1)])
        own = self._op(before, "Unsqueeze", [self._op(before, "Equal", [rows, number], _BOOL), integers(2)])
        both = self._op(before, "And", [self._op(before, "Transpose", [seen], perm=(0, 2, 1, 3)), own])
        return self._op(before, "Unsqueeze", [self._op(before, "Reshape", [both, integers(0, 0, -1)]), integers(1)])

    # What is told

    def _tell(self, layer: FixedLayer, wholes: Sequence[ir.Value]) -> None:
        told = layer.told
        self.layers.append(
            msgspec.structs.replace(
                told,
                slots=self.slots,
                method=METHOD,
                sinks=self.sinks,
                recent=self.window,
                key=msgspec.structs.replace(told.key, whole=wholes[0].name or ""),
                value=msgspec.structs.replace(told.value, whole=wholes[1].name or ""),
            )
        )

    def _attach(self) -> None:
        bounds = [
            one for one in (self.form.told.longest, *(rotation.longest for rotation in self.rotations)) if one is not None
        ]
        interface = msgspec.structs.replace(self.form.interface, capacity=min(bounds, default=None))
        self.states.attach(self.form.model, interface)
        attach_map(self.form.model, msgspec.structs.replace(self.form.told, layers=tuple(self.layers)))
