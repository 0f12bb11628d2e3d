"""Evicting caches: fixed ones of fewer slots than tokens, in which a new token takes the slot of the one least worth keeping.

A step of one token chooses a slot, appends, and attends over the slots, in which the token itself lies: nothing is copied. The
slots of all layers are chosen at once, before the first: the newest token is never evicted, so that its own score has no say.
A step of several attends over the slots as they were and its own tokens behind them, so that each sees all that came before,
and evicts into a second memory. Both leave what KVAppendEvict leaves, and TensorRT gets that op, whose kernel writes in
place, for either.

Scores and positions are one state each for all layers of as many slots: (batch, layers * kv_heads, slots).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from ryzen_compile.contract import Change
from ryzen_compile.graph.cache_map import CachedLayer
from ryzen_compile.graph.cache_map import attach as attach_map
from ryzen_passes._attention.write import Known, Writer, remove_dead, take_over
from ryzen_passes._kv.clock import STEM
from ryzen_passes._kv.fixed_form import FixedForm, FixedLayer
from ryzen_passes._kv.scores import SCORES, Step
from ryzen_passes._kv.states import States
from ryzen_passes._opset import standard_opset
from ryzen_plugins.kv_append_evict import KV_APPEND_EVICT

_BOOL, _INT32, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
_LARGEST = float(np.finfo(np.float32).max)
SCORE, POSITION = "score", "position"


def evict(form: FixedForm, known: Known, *, score: str, slots: int, sinks: int, recent: int, as_op: bool) -> Change:
    """Rewrite `form` in place so that every head keeps `slots` tokens; with `as_op` KVAppendEvict does every step."""
    return _Evicter(form, known, score, slots, sinks, recent, as_op).run()


class _Evicter:
    def __init__(self, form: FixedForm, known: Known, score: str, slots: int, sinks: int, recent: int, as_op: bool) -> None:
        self.form, self.known = form, known
        self.graph = form.model.graph
        self.write = Writer(self.graph, known)
        self.score, self.slots, self.sinks, self.recent = score, slots, sinks, recent
        self.one = form.seq == 1
        self.plain = self.one and not as_op
        self.heads = [layer.told.kv_heads for layer in form.layers]
        self.going: list[ir.Node] = []
        self.states = States(self.write, form.interface)
        self.layers: list[CachedLayer] = []
        self._shared: dict[object, ir.Value] = {}

    def run(self) -> Change:
        form = self.form
        self.first = self._behind_positions()
        self.new_position = self._new_position()
        shape = ir.Shape((form.batch, sum(self.heads), self.slots))
        score_in = self.states.begin(SCORE, _FLOAT, shape)
        position_in = self.states.begin(POSITION, _INT32, shape, initial=-1.0)
        written = self._in_plain_ops(score_in, position_in) if self.plain else self._by_op(score_in, position_in)
        for name, value in zip((SCORE, POSITION), written, strict=True):
            self.states.end(name, value)
        if not self.one:
            self.states.keep_apart()
        removed = remove_dead([node for node in self.going if node.graph is not None])
        self._attach()
        return Change(
            inserted=tuple(self.write.written),
            removed=tuple(removed),
            changed=tuple(layer.attention.name or "" for layer in form.layers),
            says=f"{len(form.layers)} layers keep {self.slots} tokens a head: {SCORES[self.score].says}",
        )

    def _behind_positions(self) -> ir.Node:
        """Return the node in front of which everything that needs only the positions can be written."""
        nodes = list(self.graph)
        made = self.form.positions.producer()
        return nodes[nodes.index(made) + 1] if made is not None else nodes[0]

    def _op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        return self.write.op(before, op, inputs, attributes, dtype=dtype, stem=STEM)

    def _new_position(self) -> ir.Value:
        """Return (batch, seq) int32: the positions of the step's tokens, -1 for padding."""
        here = self._op(self.first, "Cast", [self.form.positions], _INT32, to=int(_INT32))
        real = self._op(self.first, "Cast", [self.form.mask], _BOOL, to=int(_BOOL))
        value = self._op(self.first, "Where", [real, here, self.write.number(-1, _INT32)], _INT32)
        value.shape = self.form.mask.shape
        self.real = real
        return value

    def _sound(self, before: ir.Node, score: ir.Value) -> ir.Value:
        """Return `score` with the lowest number for what is none, and nothing infinite, so that an order of scores is one."""
        low, high = self.write.number(-_LARGEST, _FLOAT), self.write.number(_LARGEST, _FLOAT)
        number = self._op(before, "Where", [self._op(before, "IsNaN", [score], _BOOL), low, score], _FLOAT)
        return self._op(before, "Clip", [number, low, high], _FLOAT)

    # One token, in standard ops

    def _in_plain_ops(self, score_in: ir.Value, position_in: ir.Value) -> tuple[ir.Value, ir.Value]:
        first, integers = self.first, self.write.integers
        slot = self._victims(score_in, position_in)
        real = self._op(first, "Unsqueeze", [self.real, integers(1)])
        here = self._op(first, "Unsqueeze", [self.new_position, integers(1)])
        there = self._op(first, "GatherElements", [position_in, slot], axis=2)
        stamp = self._op(first, "Where", [real, here, there], _INT32)
        position_out = self._op(first, "ScatterElements", [position_in, slot, stamp], axis=2)
        slots = self._split(first, slot)
        real = self._op(first, "Unsqueeze", [real, integers(3)])
        seen = self._seen_by_layer(position_out)
        fresh: list[ir.Value] = []
        for layer, at, visible in zip(self.form.layers, slots, seen, strict=True):
            fresh.append(SCORES[self.score].write(Step(self.write, layer.attention, layer, self.new_position)))
            before, whole = layer.attention, []
            rows = {}
            for side in (layer.key, layer.value):
                size = side.told.size
                if size not in rows:
                    deep = self._op(before, "Unsqueeze", [at, integers(3)])
                    rows[size] = self._op(before, "Expand", [deep, integers(1, 1, 1, size)])
                side.past.shape = self._shape(layer.told, size)
                kept = self._op(before, "GatherElements", [side.past, rows[size]], axis=2)
                row = self._op(before, "Where", [real, side.new, kept], self.known.types[side.new])
                made, value = side.whole.producer(), self._op(before, "ScatterElements", [side.past, rows[size], row], axis=2)
                take_over(side.whole, value)
                value.shape = side.past.shape
                whole.append(value)
                self.going += [made] if made is not None else []
            self._mask(layer, visible)
            self._tell(layer, *whole)
        last = self.form.layers[-1].attention
        score = self._sound(last, self._op(last, "Concat", fresh, axis=1))
        real = self._op(last, "Unsqueeze", [self.real, integers(1)])
        kept = self._op(last, "GatherElements", [score_in, slot], axis=2)
        score_out = self._op(
            last, "ScatterElements", [score_in, slot, self._op(last, "Where", [real, score, kept], _FLOAT)], axis=2
        )
        return score_out, position_out

    def _victims(self, score: ir.Value, position: ir.Value) -> ir.Value:
        """Return (batch, layers * kv_heads, 1) int64: the first free slot, else that of the lowest score that may go."""
        first, number = self.first, self.write.number
        now = self._op(first, "Unsqueeze", [self.new_position, self.write.integers(1)])
        since = self._op(first, "Sub", [now, number(self.recent, _INT32)])
        candidate = self._op(first, "LessOrEqual", [position, since], _BOOL)
        if self.sinks:
            late = self._op(first, "GreaterOrEqual", [position, number(self.sinks, _INT32)], _BOOL)
            candidate = self._op(first, "And", [candidate, late])
        worth = self._op(first, "Where", [candidate, score, number(np.inf, _FLOAT)], _FLOAT)
        free = self._op(first, "Less", [position, number(0, _INT32)], _BOOL)
        worth = self._op(first, "Where", [free, number(-np.inf, _FLOAT), worth], _FLOAT)
        return self._op(first, "ArgMin", [worth], _INT64, axis=2, keepdims=1)

    def _split(self, before: ir.Node, value: ir.Value) -> list[ir.Value]:
        """Return the parts of `value` (batch, layers * kv_heads, ...) by layer."""
        if len(self.heads) == 1:
            return [value]
        node = ir.node(
            "Split",
            [value, self.write.integers(*self.heads)],
            {"axis": 1},
            num_outputs=len(self.heads),
            name=self.write.names.new(f"{STEM}_split"),
        )
        self._place(before, node, [self.known.types[value]] * len(self.heads))
        for part, heads in zip(node.outputs, self.heads, strict=True):
            if value.shape is not None:
                part.shape = ir.Shape((value.shape[0], heads, *value.shape.dims[2:]))
        return list(node.outputs)

    def _place(self, before: ir.Node, node: ir.Node, dtypes: Sequence[ir.DataType]) -> None:
        self.graph.insert_before(before, node)
        self.write.written.append(node.name or "")
        for value, dtype in zip(node.outputs, dtypes, strict=True):
            value.name = self.write.names.new(f"{node.name}_output")
            value.type = ir.TensorType(dtype)
            self.write.types[value] = dtype

    def _seen_by_layer(self, position: ir.Value) -> list[ir.Value]:
        """Return for each layer (batch, kv_heads, 1, slots) bool: which slots a query sees."""
        parts: dict[int | None, list[ir.Value]] = {}
        for layer in self.form.layers:
            window = layer.told.window
            if window not in parts:
                parts[window] = self._split(self.first, self._of_slots(self.first, position, window, sum(self.heads)))
        return [parts[layer.told.window][at] for at, layer in enumerate(self.form.layers)]

    # Any number of tokens, or TensorRT

    def _by_op(self, score_in: ir.Value, position_in: ir.Value) -> tuple[ir.Value, ir.Value]:
        pasts = zip(self._split(self.first, score_in), self._split(self.first, position_in), strict=True)
        outs: list[tuple[ir.Value, ir.Value]] = []
        for layer, (score, position) in zip(self.form.layers, pasts, strict=True):
            made = [side.whole.producer() for side in (layer.key, layer.value)]
            outputs = self._append(layer, score, position)
            for side, value in zip((layer.key, layer.value), outputs, strict=False):
                take_over(side.whole, value)
                value.shape = side.past.shape
            if self.one:
                seen = self._of_slots(layer.attention, outputs[3], layer.told.window, layer.told.kv_heads)
            else:
                seen = self._join(layer, position)
            self._mask(layer, seen)
            self._tell(layer, outputs[0], outputs[1])
            outs.append((outputs[2], outputs[3]))
            self.going += [node for node in made if node is not None]
        KV_APPEND_EVICT.add_to(self.form.model)
        function = self.form.model.functions[KV_APPEND_EVICT.function().identifier()]
        function.opset_imports[""] = standard_opset(self.form.model)
        last = self.form.layers[-1].attention
        if len(outs) == 1:
            return outs[0]
        score_out = self._op(last, "Concat", [score for score, _ in outs], axis=1)
        return score_out, self._op(last, "Concat", [position for _, position in outs], axis=1)

    def _append(self, layer: FixedLayer, score: ir.Value, position: ir.Value) -> Sequence[ir.Value]:
        before = layer.attention
        for side in (layer.key, layer.value):
            side.past.shape = self._shape(layer.told, side.told.size)
        new_score = self._sound(before, SCORES[self.score].write(Step(self.write, before, layer, self.new_position)))
        node = ir.node(
            KV_APPEND_EVICT.name,
            [layer.key.past, layer.value.past, score, position, layer.key.new, layer.value.new, new_score, self.new_position],
            KV_APPEND_EVICT.node_attributes({"sinks": self.sinks, "recent": self.recent}),
            domain=KV_APPEND_EVICT.domain,
            num_outputs=6,
            name=self.write.names.new(f"{STEM}_append_evict"),
        )
        self._place(
            before, node, [self.known.types[layer.key.new], self.known.types[layer.value.new], _FLOAT, _INT32, _INT64, _INT32]
        )
        for value in node.outputs[2:4]:
            value.shape = self._shape(layer.told)
        return node.outputs

    def _mask(self, layer: FixedLayer, seen: ir.Value) -> None:
        """Let attention see what `seen` (batch, kv_heads, seq, rows) says."""
        old = layer.attention.inputs[3]
        layer.attention.replace_input_with(3, self._for_heads(layer.attention, seen, layer.told))
        if old is not None and (made := old.producer()) is not None:
            self.going.append(made)

    def _tell(self, layer: FixedLayer, keys: ir.Value, values: ir.Value) -> None:
        told = layer.told
        self.layers.append(
            msgspec.structs.replace(
                told,
                slots=self.slots,
                method=self.score,
                sinks=self.sinks,
                recent=self.recent,
                score=SCORE,
                position=POSITION,
                key=msgspec.structs.replace(told.key, whole=keys.name or ""),
                value=msgspec.structs.replace(told.value, whole=values.name or ""),
            )
        )

    def _shape(self, told: CachedLayer, *rest: int) -> ir.Shape:
        return ir.Shape((self.form.batch, told.kv_heads, self.slots, *rest))

    def _of_slots(self, before: ir.Node, position: ir.Value, window: int | None, heads: int) -> ir.Value:
        """Return (batch, heads, 1 or seq, slots) bool: which slots the queries of a step see."""
        at = self._op(before, "Unsqueeze", [position, self.write.integers(2)])
        seen = self._op(before, "GreaterOrEqual", [at, self.write.number(0, _INT32)], _BOOL)
        if window is not None:
            query = self._op(before, "Unsqueeze", [self.new_position, self.write.integers(1, 3)])
            since = self._op(before, "Sub", [query, self.write.number(window, _INT32)])
            seen = self._op(before, "And", [seen, self._op(before, "Greater", [at, since], _BOOL)])
        seen.shape = ir.Shape((self.form.batch, heads, 1 if window is None else self.form.seq, self.slots))
        return seen

    def _among_new(self, before: ir.Node, window: int | None) -> ir.Value:
        """Return (batch, 1, seq, seq) bool: which tokens of the step its queries see."""
        if window not in self._shared:
            zero = self.write.number(0, _INT32)
            key = self._op(before, "Unsqueeze", [self.new_position, self.write.integers(1, 2)])
            query = self._op(before, "Unsqueeze", [self.new_position, self.write.integers(1, 3)])
            real = self._op(before, "GreaterOrEqual", [key, zero], _BOOL)
            seen = self._op(before, "And", [real, self._op(before, "LessOrEqual", [key, query], _BOOL)])
            if window is not None:
                since = self._op(before, "Sub", [query, self.write.number(window, _INT32)])
                seen = self._op(before, "And", [seen, self._op(before, "Greater", [key, since], _BOOL)])
            self._shared[window] = seen
        return self._shared[window]

    def _join(self, layer: FixedLayer, position_in: ir.Value) -> ir.Value:
        """Let attention read the slots as they were and the step's tokens behind them; return which of them it sees."""
        before, told = layer.attention, layer.told
        for at, side in ((1, layer.key), (2, layer.value)):
            before.replace_input_with(at, self._op(before, "Concat", [side.past, side.new], axis=2))
        old = self._of_slots(before, position_in, told.window, told.kv_heads)
        new = self._among_new(before, told.window)
        tokens = self._op(before, "Shape", [self.new_position], _INT64, start=1, end=2)
        batch = self._op(before, "Shape", [self.new_position], _INT64, start=0, end=1)
        heads = self.write.integers(told.kv_heads)
        to_old = self._op(before, "Concat", [batch, heads, tokens, self.write.integers(self.slots)], axis=0)
        to_new = self._op(before, "Concat", [batch, heads, tokens, tokens], axis=0)
        both = [self._op(before, "Expand", [old, to_old]), self._op(before, "Expand", [new, to_new])]
        return self._op(before, "Concat", both, axis=3)

    def _for_heads(self, before: ir.Node, seen: ir.Value, told: CachedLayer) -> ir.Value:
        """Return `seen` (batch, kv_heads, seq, rows) for the heads of the queries."""
        times = told.heads // told.kv_heads
        if times == 1 or told.kv_heads == 1:
            return seen
        integers = self.write.integers
        apart = self._op(before, "Unsqueeze", [seen, integers(2)])
        many = self._op(before, "Expand", [apart, integers(1, 1, times, 1, 1)])
        shape = self._op(before, "Shape", [seen], _INT64, start=2, end=4)
        target = self._op(before, "Concat", [integers(0, told.heads), shape], axis=0)
        return self._op(before, "Reshape", [many, target])

    def _attach(self) -> None:
        self.states.attach(self.form.model, msgspec.structs.replace(self.form.interface, capacity=None))
        attach_map(self.form.model, msgspec.structs.replace(self.form.told, layers=tuple(self.layers)))
