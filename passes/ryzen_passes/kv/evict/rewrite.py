"""Evicting caches: fixed ones of fewer slots than tokens, in which a new token takes the slot of the one least worth keeping.

A step of one token chooses a slot, appends, and attends over the slots, in which the token itself lies: nothing is copied. The
slots of all layers that keep the same number of tokens are chosen at once, before the first: the newest token is never evicted,
so that its own score has no say. A step of several attends over the slots as they were and its own tokens behind them, so that
each sees all that came before, and evicts into a second memory. Both leave what KVAppendEvict leaves, and TensorRT gets that
op, whose kernel writes in place, for either.

Scores and positions are one state each for all layers of as many slots: (batch, layers * kv_heads, slots).

Where scores age a step tells some of them again before it chooses: `every` steps of one token go once round the slots, at the
same cost in each; a step of several tells all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import Known, Writer, remove_dead, take_over
from ryzen_compile.spec.kv_cache import CachedLayer, Fitted
from ryzen_compile.spec.kv_cache import attach as attach_map
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.scorers import SCORES, Place, Scoring
from ryzen_passes.kv.scorers.statistics import Statistics
from ryzen_passes.kv.states import States
from ryzen_passes.kv.static.cache_view import FixedForm, FixedLayer, FixedSide
from ryzen_passes.kv.static.positions import LENGTH, STEM
from ryzen_passes.opset import standard_opset
from ryzen_plugins.kv_append_evict import KV_APPEND_EVICT

_BOOL, _INT32, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
SCORE, POSITION = "score", "position"
_SCORED_BYTES = 8
"""The bytes of the score and the position of a token that a head keeps."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is kept."""

    score: str
    """A name of SCORES."""
    slots: tuple[int, ...]
    """How many tokens a head of each layer keeps."""
    sinks: int
    recent: int
    every: int = 0
    """Within how many steps of one token every score that ages is told again; 0: never."""
    statistics: Statistics | None = None
    fitted: Fitted | None = None
    """The file that `statistics` were read from."""

    def saves(self, form: FixedForm) -> int:
        """Return the bytes of one sequence's states that are saved, scores and positions paid for."""
        return sum(
            layer.told.kv_heads * (layer.row_bytes * (layer.told.slots or 0) - (layer.row_bytes + _SCORED_BYTES) * slots)
            for layer, slots in zip(form.layers, self.slots, strict=True)
        )


def token_bytes(form: FixedForm) -> int:
    """Return the bytes of a token that every head of every layer keeps, its scores and positions among them."""
    return sum(layer.told.kv_heads * (layer.row_bytes + _SCORED_BYTES) for layer in form.layers)


def evict(form: FixedForm, known: Known, method: Method, *, as_op: bool) -> Change:
    """Rewrite `form` in place so that its heads keep what `method` says; with `as_op` KVAppendEvict does every step."""
    return Evicter(form, known, method, as_op).run()


@dataclass
class Group:
    """Layers that keep the same number of tokens."""

    layers: list[FixedLayer]
    scoring: Scoring
    slots: int
    suffix: str
    score: ir.Value
    """(batch, layers * kv_heads, slots) float32: what the step finds."""
    position: ir.Value
    """(batch, layers * kv_heads, slots) int32: what the step finds, -1 where a slot is free."""

    @property
    def heads(self) -> list[int]:
        """The number of kv-heads of each layer."""
        return [layer.told.kv_heads for layer in self.layers]


class Evicter:
    """The rewrite at work on one graph."""

    def __init__(self, form: FixedForm, known: Known, method: Method, as_op: bool) -> None:
        self.form, self.known, self.method = form, known, method
        self.graph = form.model.graph
        self.write = Writer(self.graph, known)
        self.one = form.seq == 1
        self.plain = self.one and not as_op
        self.going: list[ir.Node] = []
        self.states = States(self.write, form.interface)
        self.layers: dict[str, CachedLayer] = {}
        self.used: list[Op] = []
        self._shared: dict[object, ir.Value] = {}

    def run(self) -> Change:
        """Rewrite the model and return what changed."""
        form, method = self.form, self.method
        self.first = form.behind_positions()
        self.new_position = self._new_position()
        for group in self._groups():
            group.scoring.begin()
            found = self._told_again(group) if group.scoring.ages and method.every else group.score
            written = self._in_plain_ops(group, found) if self.plain else self._by_op(group, found)
            group.scoring.end(group.layers[-1].attention)
            for name, value in zip((SCORE, POSITION), written, strict=True):
                self.states.end(f"{name}{group.suffix}", value)
        if not self.one:
            self.states.keep_apart()
        for op in self.used:
            op.add_to(form.model)
            form.model.functions[op.function().identifier()].opset_imports[""] = standard_opset(form.model)
        removed = remove_dead([node for node in self.going if node.graph is not None])
        self._attach()
        least, most = min(method.slots), max(method.slots)
        return Change(
            inserted=tuple(self.write.written),
            removed=tuple(removed),
            changed=tuple(layer.attention.name or "" for layer in form.layers),
            says=f"{len(form.layers)} layers keep {least if least == most else f'{least} to {most}'} tokens a head: "
            + SCORES[method.score].says,
        )

    def _groups(self) -> list[Group]:
        """Return the layers by how many tokens they keep, with their states."""
        length = next(value for value in self.graph.inputs if value.name == self.states[LENGTH].input)
        sizes = list(dict.fromkeys(self.method.slots))
        groups: list[Group] = []
        for slots in sizes:
            numbers = [at for at, own in enumerate(self.method.slots) if own == slots]
            layers = [self.form.layers[at] for at in numbers]
            suffix = f".{len(groups)}" if len(sizes) > 1 else ""
            shape = ir.Shape((self.form.batch, sum(layer.told.kv_heads for layer in layers), slots))
            again = -(-slots // self.method.every) if self.one and self.method.every else slots
            place = Place(
                write=self.write,
                states=self.states,
                form=self.form,
                first=self.first,
                layers=layers,
                numbers=numbers,
                slots=slots,
                suffix=suffix,
                batch=self.form.batch,
                length=length,
                new_position=self.new_position,
                real=self.real,
                again=again,
                statistics=self.method.statistics,
            )
            score = self.states.begin(f"{SCORE}{suffix}", _FLOAT, shape)
            position = self.states.begin(f"{POSITION}{suffix}", _INT32, shape, initial=-1.0)
            groups.append(Group(layers, SCORES[self.method.score](place), slots, suffix, score, position))
        return groups

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

    def _told_again(self, group: Group) -> ir.Value:
        """Return the scores of a group, of which some, or all, are told again as the sequence stands before the step."""
        first, integers, place = self.first, self.write.integers, group.scoring.place
        rows = place.again
        if rows == group.slots:
            at, position = None, group.position
        else:
            turn = self._op(first, "Mul", [place.length, self.write.number(rows, _INT64)])
            count = self.write.constant(np.arange(rows), _INT64)
            over = self._op(first, "Add", [self._op(first, "Unsqueeze", [turn, integers(1)]), count])
            around = self._op(first, "Mod", [over, self.write.number(group.slots, _INT64)])
            apart = self._op(first, "Unsqueeze", [around, integers(1)])
            at = self._op(first, "Expand", [apart, integers(1, sum(group.heads), 1)])
            position = self._op(first, "GatherElements", [group.position, at], axis=2)
        keys = []
        for layer in group.layers:
            key = layer.key.past
            key.shape = self._shape(layer.told, group.slots, layer.told.key.size)
            if at is not None:
                deep = self._op(first, "Unsqueeze", [apart, integers(3)])
                wide = self._op(first, "Expand", [deep, integers(1, layer.told.kv_heads, 1, layer.told.key.size)])
                key = self._op(first, "GatherElements", [key, wide], axis=2)
            keys.append(place.wide(first, key))
        whole = keys[0] if len(keys) == 1 else self._op(first, "Concat", keys, axis=1)
        told = place.sound(first, group.scoring.told_again(whole, position))
        old = group.score if at is None else self._op(first, "GatherElements", [group.score, at], axis=2)
        held = self._op(first, "GreaterOrEqual", [position, self.write.number(0, _INT32)], _BOOL)
        counts = self._op(first, "And", [held, self._any_real()], _BOOL)
        new = self._op(first, "Where", [counts, told, old], _FLOAT)
        if at is not None:
            new = self._op(first, "ScatterElements", [group.score, at, new], axis=2)
        new.shape, new.name = group.score.shape, self.write.names.new(f"{SCORE}{group.suffix}_again")
        return new

    def _any_real(self) -> ir.Value:
        """Return (batch, 1, 1) bool: whether a row has any token in this step; what has none is left as it is."""
        first, integers = self.first, self.write.integers
        most = self._op(first, "ReduceMax", [self.form.mask, integers(1)], keepdims=1)
        return self._op(first, "Cast", [self._op(first, "Unsqueeze", [most, integers(2)])], _BOOL, to=int(_BOOL))

    # One token, in standard ops

    def _in_plain_ops(self, group: Group, score_in: ir.Value) -> tuple[ir.Value, ir.Value]:
        first, integers, place = self.first, self.write.integers, group.scoring.place
        slot = self._victims(score_in, group.position)
        real = self._op(first, "Unsqueeze", [self.real, integers(1)])
        here = self._op(first, "Unsqueeze", [self.new_position, integers(1)])
        there = self._op(first, "GatherElements", [group.position, slot], axis=2)
        stamp = self._op(first, "Where", [real, here, there], _INT32)
        position_out = self._op(first, "ScatterElements", [group.position, slot, stamp], axis=2)
        slots = self.write.split(first, slot, group.heads)
        deep_real = self._op(first, "Unsqueeze", [real, integers(3)])
        seen = self._seen_by_layer(group, position_out)
        fresh: list[ir.Value] = []
        for layer, at, visible in zip(group.layers, slots, seen, strict=True):
            fresh.append(group.scoring.new(layer.attention, layer))
            before, whole = layer.attention, []
            rows = {}
            for side in (layer.key, layer.value):
                size = side.told.size
                if size not in rows:
                    deep = self._op(before, "Unsqueeze", [at, integers(3)])
                    rows[size] = self._op(before, "Expand", [deep, integers(1, 1, 1, size)])
                side.past.shape = self._shape(layer.told, group.slots, size)
                kept = self._op(before, "GatherElements", [side.past, rows[size]], axis=2)
                row = self._op(before, "Where", [deep_real, side.new, kept], self.known.types[side.new])
                made, value = side.whole.producer(), self._op(before, "ScatterElements", [side.past, rows[size], row], axis=2)
                take_over(side.whole, value)
                value.shape = side.past.shape
                whole.append(value)
                self.going += [made] if made is not None else []
            self._mask(layer, visible)
            self._tell(group, layer, *whole)
        last = group.layers[-1].attention
        score = place.sound(last, self._joined(last, fresh))
        kept = self._op(last, "GatherElements", [score_in, slot], axis=2)
        row = self._op(last, "Where", [real, score, kept], _FLOAT)
        return self._op(last, "ScatterElements", [score_in, slot, row], axis=2), position_out

    def _victims(self, score: ir.Value, position: ir.Value) -> ir.Value:
        """Return (batch, layers * kv_heads, 1) int64: the first free slot, else that of the lowest score that may go."""
        first, number, method = self.first, self.write.number, self.method
        now = self._op(first, "Unsqueeze", [self.new_position, self.write.integers(1)])
        since = self._op(first, "Sub", [now, number(method.recent, _INT32)])
        candidate = self._op(first, "LessOrEqual", [position, since], _BOOL)
        if method.sinks:
            late = self._op(first, "GreaterOrEqual", [position, number(method.sinks, _INT32)], _BOOL)
            candidate = self._op(first, "And", [candidate, late])
        worth = self._op(first, "Where", [candidate, score, number(np.inf, _FLOAT)], _FLOAT)
        free = self._op(first, "Less", [position, number(0, _INT32)], _BOOL)
        worth = self._op(first, "Where", [free, number(-np.inf, _FLOAT), worth], _FLOAT)
        return self._op(first, "ArgMin", [worth], _INT64, axis=2, keepdims=1)

    def _joined(self, before: ir.Node, parts: Sequence[ir.Value]) -> ir.Value:
        return parts[0] if len(parts) == 1 else self._op(before, "Concat", parts, axis=1)

    def _seen_by_layer(self, group: Group, position: ir.Value) -> list[ir.Value]:
        """Return for each layer (batch, kv_heads, 1, slots) bool: which slots a query sees."""
        parts: dict[int | None, list[ir.Value]] = {}
        for layer in group.layers:
            window = layer.told.window
            if window not in parts:
                seen = self._of_slots(self.first, position, window, sum(group.heads), group.slots)
                parts[window] = self.write.split(self.first, seen, group.heads)
        return [parts[layer.told.window][at] for at, layer in enumerate(group.layers)]

    # Any number of tokens, or TensorRT

    def _by_op(self, group: Group, score_in: ir.Value) -> tuple[ir.Value, ir.Value]:
        scores, positions = (self.write.split(self.first, value, group.heads) for value in (score_in, group.position))
        outs: list[tuple[ir.Value, ir.Value]] = []
        for layer, score, position in zip(group.layers, scores, positions, strict=True):
            made = [side.whole.producer() for side in (layer.key, layer.value)]
            outputs = self._append(group, layer, score, position)
            for side, value in zip((layer.key, layer.value), outputs, strict=False):
                take_over(side.whole, value)
                value.shape = side.past.shape
            if self.one:
                seen = self._of_slots(layer.attention, outputs[3], layer.told.window, layer.told.kv_heads, group.slots)
            else:
                seen = self._join(group, layer, position)
            self._mask(layer, seen)
            self._tell(group, layer, outputs[0], outputs[1])
            outs.append((outputs[2], outputs[3]))
            self.going += [node for node in made if node is not None]
        last = group.layers[-1].attention
        return self._joined(last, [score for score, _ in outs]), self._joined(last, [position for _, position in outs])

    def _append(self, group: Group, layer: FixedLayer, score: ir.Value, position: ir.Value) -> Sequence[ir.Value]:
        before, types = layer.attention, self.known.types
        for side in (layer.key, layer.value):
            side.past.shape = self._shape(layer.told, group.slots, side.told.size)
        new_score = group.scoring.place.sound(before, group.scoring.new(before, layer))
        outputs = self._custom(
            before,
            KV_APPEND_EVICT,
            [layer.key.past, layer.value.past, score, position, layer.key.new, layer.value.new, new_score, self.new_position],
            [types[layer.key.new], types[layer.value.new], _FLOAT, _INT32, _INT64, _INT32],
            sinks=self.method.sinks,
            recent=self.method.recent,
        )
        for value in outputs[2:4]:
            value.shape = self._shape(layer.told, group.slots)
        return outputs

    def _custom(
        self, before: ir.Node, op: Op, inputs: Sequence[ir.Value], dtypes: Sequence[ir.DataType], **attributes: int
    ) -> Sequence[ir.Value]:
        """Write a node of a custom op in front of `before` and return its outputs, of the types `dtypes`."""
        if op not in self.used:
            self.used.append(op)
        name = self.write.names.new(f"{STEM}_{op.name.lower()}")
        told = op.node_attributes(attributes)
        node = ir.node(op.name, inputs, told, domain=op.domain, num_outputs=len(dtypes), name=name)
        return self.write.place(before, node, dtypes)

    def _mask(self, layer: FixedLayer, seen: ir.Value) -> None:
        """Let attention see what `seen` (batch, kv_heads, seq, rows) says."""
        old = layer.attention.inputs[3]
        layer.attention.replace_input_with(3, self._for_heads(layer.attention, seen, layer.told))
        if old is not None and (made := old.producer()) is not None:
            self.going.append(made)

    def _tell(self, group: Group, layer: FixedLayer, keys: ir.Value, values: ir.Value) -> None:
        told = layer.told
        self.layers[told.attention] = msgspec.structs.replace(
            told,
            slots=group.slots,
            method=self.method.score,
            sinks=self.method.sinks,
            recent=self.method.recent,
            every=self.method.every if group.scoring.ages else 0,
            statistics=self.method.fitted,
            score=f"{SCORE}{group.suffix}",
            position=f"{POSITION}{group.suffix}",
            key=msgspec.structs.replace(told.key, whole=keys.name or ""),
            value=msgspec.structs.replace(told.value, whole=values.name or ""),
        )

    def _shape(self, told: CachedLayer, *rest: int) -> ir.Shape:
        return ir.Shape((self.form.batch, told.kv_heads, *rest))

    def _of_slots(self, before: ir.Node, position: ir.Value, window: int | None, heads: int, slots: int) -> ir.Value:
        """Return (batch, heads, 1 or seq, slots) bool: which slots the queries of a step see."""
        at = self._op(before, "Unsqueeze", [position, self.write.integers(2)])
        seen = self._op(before, "GreaterOrEqual", [at, self.write.number(0, _INT32)], _BOOL)
        if window is not None:
            query = self._op(before, "Unsqueeze", [self.new_position, self.write.integers(1, 3)])
            since = self._op(before, "Sub", [query, self.write.number(window, _INT32)])
            seen = self._op(before, "And", [seen, self._op(before, "Greater", [at, since], _BOOL)])
        seen.shape = ir.Shape((self.form.batch, heads, 1 if window is None else self.form.seq, slots))
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

    def _join(self, group: Group, layer: FixedLayer, position_in: ir.Value) -> ir.Value:
        """Let attention read the slots as they were and the step's tokens behind them; return which of them it sees."""
        before, told = layer.attention, layer.told
        for at, side in ((1, layer.key), (2, layer.value)):
            before.replace_input_with(at, self._with_new(before, side))
        old = self._of_slots(before, position_in, told.window, told.kv_heads, group.slots)
        new = self._among_new(before, told.window)
        tokens = self._op(before, "Shape", [self.new_position], _INT64, start=1, end=2)
        batch = self._op(before, "Shape", [self.new_position], _INT64, start=0, end=1)
        heads = self.write.integers(told.kv_heads)
        to_old = self._op(before, "Concat", [batch, heads, tokens, self.write.integers(group.slots)], axis=0)
        to_new = self._op(before, "Concat", [batch, heads, tokens, tokens], axis=0)
        both = [self._op(before, "Expand", [old, to_old]), self._op(before, "Expand", [new, to_new])]
        return self._op(before, "Concat", both, axis=3)

    def _with_new(self, before: ir.Node, side: FixedSide) -> ir.Value:
        """Return (batch, kv_heads, slots + seq, size): the slots as they were, and the step's tokens behind them."""
        if side.past not in self._shared:
            self._shared[side.past] = self._op(before, "Concat", [side.past, side.new], axis=2)
        return self._shared[side.past]

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
        self.states.attach(self.form.model, msgspec.structs.replace(self.form.interface, capacity=self.form.told.longest))
        layers = tuple(self.layers[layer.told.attention] for layer in self.form.layers)
        attach_map(self.form.model, msgspec.structs.replace(self.form.told, layers=layers))
