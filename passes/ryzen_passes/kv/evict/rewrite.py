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

from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.spec.kv_cache import LayerCacheSpec, StatisticsRef, write_kv_cache_spec
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.scorers import SCORERS, Scorer, ScoringContext
from ryzen_passes.kv.scorers.statistics import Statistics
from ryzen_passes.kv.state_editor import StateEditor
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView, StaticKVTensor
from ryzen_passes.kv.static.step_positions import LENGTH_STATE, NODE_NAME_PREFIX
from ryzen_passes.opset import standard_opset
from ryzen_plugins.kv_append_evict import KV_APPEND_EVICT

_BOOL, _INT32, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
SCORE_STATE, POSITION_STATE = "score", "position"
_SCORE_AND_POSITION_BYTES = 8
"""The bytes of the score and the position of a token that a head keeps."""


@dataclass(frozen=True, kw_only=True)
class EvictionConfig:
    """What is kept."""

    score: str
    """A name of SCORES."""
    slots: tuple[int, ...]
    """How many tokens a head of each layer keeps."""
    sinks: int
    recent_window: int
    rescore_interval: int = 0
    """Within how many steps of one token every score that ages is told again; 0: never."""
    statistics: Statistics | None = None
    statistics_ref: StatisticsRef | None = None
    """The file that `statistics` were read from."""

    def saved_bytes(self, view: StaticCacheView) -> int:
        """Return the bytes of one sequence's states that are saved, scores and positions paid for."""
        return sum(
            layer.spec.kv_heads
            * (layer.row_bytes * (layer.spec.slots or 0) - (layer.row_bytes + _SCORE_AND_POSITION_BYTES) * slots)
            for layer, slots in zip(view.layers, self.slots, strict=True)
        )


def token_bytes(view: StaticCacheView) -> int:
    """Return the bytes of a token that every head of every layer keeps, its scores and positions among them."""
    return sum(layer.spec.kv_heads * (layer.row_bytes + _SCORE_AND_POSITION_BYTES) for layer in view.layers)


def evict(view: StaticCacheView, model_info: ModelInfo, config: EvictionConfig, *, use_custom_op: bool) -> Change:
    """Rewrite `form` in place so that its heads keep what `method` says; with `as_op` KVAppendEvict does every step."""
    return EvictionRewriter(view, model_info, config, use_custom_op).run()


@dataclass
class LayerGroup:
    """Layers that keep the same number of tokens."""

    layers: list[StaticCacheLayer]
    scorer: Scorer
    slots: int
    state_suffix: str
    score: ir.Value
    """(batch, layers * kv_heads, slots) float32: what the step finds."""
    position: ir.Value
    """(batch, layers * kv_heads, slots) int32: what the step finds, -1 where a slot is free."""

    @property
    def kv_heads(self) -> list[int]:
        """The number of kv-heads of each layer."""
        return [layer.spec.kv_heads for layer in self.layers]


class EvictionRewriter:
    """The rewrite at work on one graph."""

    def __init__(self, view: StaticCacheView, model_info: ModelInfo, config: EvictionConfig, use_custom_op: bool) -> None:
        self.view, self.model_info, self.config = view, model_info, config
        self.graph = view.model.graph
        self.writer = NodeBuilder(self.graph, model_info)
        self.single_token = view.seq == 1
        self.uses_standard_ops = self.single_token and not use_custom_op
        self.dead_candidates: list[ir.Node] = []
        self.states = StateEditor(self.writer, view.interface)
        self.layer_specs: dict[str, LayerCacheSpec] = {}
        self.custom_ops: list[Op] = []
        self._shared: dict[object, ir.Value] = {}

    def run(self) -> Change:
        """Rewrite the model and return what changed."""
        form, method = self.view, self.config
        self.insertion_point = form.first_node_after_positions()
        self.new_position = self._new_position()
        for group in self._layer_groups():
            group.scorer.begin()
            found = self._rescore(group) if group.scorer.time_dependent and method.rescore_interval else group.score
            written = (
                self._append_with_standard_ops(group, found)
                if self.uses_standard_ops
                else self._append_with_custom_op(group, found)
            )
            group.scorer.end(group.layers[-1].attention)
            for name, value in zip((SCORE_STATE, POSITION_STATE), written, strict=True):
                self.states.set_output(f"{name}{group.state_suffix}", value)
        if not self.single_token:
            self.states.disable_in_place()
        for op in self.custom_ops:
            op.add_to(form.model)
            form.model.functions[op.ir_function().identifier()].opset_imports[""] = standard_opset(form.model)
        removed = remove_dead_nodes([node for node in self.dead_candidates if node.graph is not None])
        self._write_metadata()
        least, most = min(method.slots), max(method.slots)
        return Change(
            inserted=tuple(self.writer.inserted),
            removed=tuple(removed),
            changed=tuple(layer.attention.name or "" for layer in form.layers),
            summary=f"{len(form.layers)} layers keep {least if least == most else f'{least} to {most}'} tokens a head: "
            + SCORERS[method.score].description,
        )

    def _layer_groups(self) -> list[LayerGroup]:
        """Return the layers by how many tokens they keep, with their states."""
        length = next(value for value in self.graph.inputs if value.name == self.states[LENGTH_STATE].input)
        sizes = list(dict.fromkeys(self.config.slots))
        groups: list[LayerGroup] = []
        for slots in sizes:
            numbers = [at for at, own in enumerate(self.config.slots) if own == slots]
            layers = [self.view.layers[at] for at in numbers]
            suffix = f".{len(groups)}" if len(sizes) > 1 else ""
            shape = ir.Shape((self.view.batch, sum(layer.spec.kv_heads for layer in layers), slots))
            again = -(-slots // self.config.rescore_interval) if self.single_token and self.config.rescore_interval else slots
            place = ScoringContext(
                writer=self.writer,
                states=self.states,
                view=self.view,
                insertion_point=self.insertion_point,
                layers=layers,
                layer_indices=numbers,
                slots=slots,
                state_suffix=suffix,
                batch=self.view.batch,
                length=length,
                new_position=self.new_position,
                token_mask=self.token_mask,
                rescored_slots=again,
                statistics=self.config.statistics,
            )
            score = self.states.add_input(f"{SCORE_STATE}{suffix}", _FLOAT, shape)
            position = self.states.add_input(f"{POSITION_STATE}{suffix}", _INT32, shape, initial_value=-1.0)
            groups.append(LayerGroup(layers, SCORERS[self.config.score](place), slots, suffix, score, position))
        return groups

    def _op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        return self.writer.op(before, op, inputs, attributes, dtype=dtype, name_prefix=NODE_NAME_PREFIX)

    def _new_position(self) -> ir.Value:
        """Return (batch, seq) int32: the positions of the step's tokens, -1 for padding."""
        here = self._op(self.insertion_point, "Cast", [self.view.positions], _INT32, to=int(_INT32))
        real = self._op(self.insertion_point, "Cast", [self.view.mask], _BOOL, to=int(_BOOL))
        value = self._op(self.insertion_point, "Where", [real, here, self.writer.scalar(-1, _INT32)], _INT32)
        value.shape = self.view.mask.shape
        self.token_mask = real
        return value

    def _rescore(self, group: LayerGroup) -> ir.Value:
        """Return the scores of a group, of which some, or all, are told again as the sequence stands before the step."""
        first, integers, place = self.insertion_point, self.writer.int64_vector, group.scorer.context
        rows = place.rescored_slots
        if rows == group.slots:
            at, position = None, group.position
        else:
            turn = self._op(first, "Mul", [place.length, self.writer.scalar(rows, _INT64)])
            count = self.writer.constant(np.arange(rows), _INT64)
            over = self._op(first, "Add", [self._op(first, "Unsqueeze", [turn, integers(1)]), count])
            around = self._op(first, "Mod", [over, self.writer.scalar(group.slots, _INT64)])
            apart = self._op(first, "Unsqueeze", [around, integers(1)])
            at = self._op(first, "Expand", [apart, integers(1, sum(group.kv_heads), 1)])
            position = self._op(first, "GatherElements", [group.position, at], axis=2)
        keys = []
        for layer in group.layers:
            key = layer.key.past
            key.shape = self._shape(layer.spec, group.slots, layer.spec.key.head_size)
            if at is not None:
                deep = self._op(first, "Unsqueeze", [apart, integers(3)])
                wide = self._op(first, "Expand", [deep, integers(1, layer.spec.kv_heads, 1, layer.spec.key.head_size)])
                key = self._op(first, "GatherElements", [key, wide], axis=2)
            keys.append(place.to_float32(first, key))
        whole = keys[0] if len(keys) == 1 else self._op(first, "Concat", keys, axis=1)
        told = place.sanitize(first, group.scorer.rescore(whole, position))
        old = group.score if at is None else self._op(first, "GatherElements", [group.score, at], axis=2)
        held = self._op(first, "GreaterOrEqual", [position, self.writer.scalar(0, _INT32)], _BOOL)
        counts = self._op(first, "And", [held, self._has_tokens()], _BOOL)
        new = self._op(first, "Where", [counts, told, old], _FLOAT)
        if at is not None:
            new = self._op(first, "ScatterElements", [group.score, at, new], axis=2)
        new.shape, new.name = group.score.shape, self.writer.names.allocate(f"{SCORE_STATE}{group.state_suffix}_again")
        return new

    def _has_tokens(self) -> ir.Value:
        """Return (batch, 1, 1) bool: whether a row has any token in this step; what has none is left as it is."""
        first, integers = self.insertion_point, self.writer.int64_vector
        most = self._op(first, "ReduceMax", [self.view.mask, integers(1)], keepdims=1)
        return self._op(first, "Cast", [self._op(first, "Unsqueeze", [most, integers(2)])], _BOOL, to=int(_BOOL))

    # One token, in standard ops

    def _append_with_standard_ops(self, group: LayerGroup, score_in: ir.Value) -> tuple[ir.Value, ir.Value]:
        first, integers, place = self.insertion_point, self.writer.int64_vector, group.scorer.context
        slot = self._eviction_slots(score_in, group.position)
        real = self._op(first, "Unsqueeze", [self.token_mask, integers(1)])
        here = self._op(first, "Unsqueeze", [self.new_position, integers(1)])
        there = self._op(first, "GatherElements", [group.position, slot], axis=2)
        stamp = self._op(first, "Where", [real, here, there], _INT32)
        position_out = self._op(first, "ScatterElements", [group.position, slot, stamp], axis=2)
        slots = self.writer.split(first, slot, group.kv_heads)
        deep_real = self._op(first, "Unsqueeze", [real, integers(3)])
        seen = self._visible_by_layer(group, position_out)
        fresh: list[ir.Value] = []
        for layer, at, visible in zip(group.layers, slots, seen, strict=True):
            fresh.append(group.scorer.score_new_tokens(layer.attention, layer))
            before, whole = layer.attention, []
            rows = {}
            for side in (layer.key, layer.value):
                size = side.spec.head_size
                if size not in rows:
                    deep = self._op(before, "Unsqueeze", [at, integers(3)])
                    rows[size] = self._op(before, "Expand", [deep, integers(1, 1, 1, size)])
                side.past.shape = self._shape(layer.spec, group.slots, size)
                kept = self._op(before, "GatherElements", [side.past, rows[size]], axis=2)
                row = self._op(before, "Where", [deep_real, side.update, kept], self.model_info.types[side.update])
                made, value = side.cache.producer(), self._op(before, "ScatterElements", [side.past, rows[size], row], axis=2)
                replace_value(side.cache, value)
                value.shape = side.past.shape
                whole.append(value)
                self.dead_candidates += [made] if made is not None else []
            self._replace_mask(layer, visible)
            self._record_layer(group, layer, *whole)
        last = group.layers[-1].attention
        score = place.sanitize(last, self._concat_heads(last, fresh))
        kept = self._op(last, "GatherElements", [score_in, slot], axis=2)
        row = self._op(last, "Where", [real, score, kept], _FLOAT)
        return self._op(last, "ScatterElements", [score_in, slot, row], axis=2), position_out

    def _eviction_slots(self, score: ir.Value, position: ir.Value) -> ir.Value:
        """Return (batch, layers * kv_heads, 1) int64: the first free slot, else that of the lowest score that may go."""
        first, number, method = self.insertion_point, self.writer.scalar, self.config
        now = self._op(first, "Unsqueeze", [self.new_position, self.writer.int64_vector(1)])
        since = self._op(first, "Sub", [now, number(method.recent_window, _INT32)])
        candidate = self._op(first, "LessOrEqual", [position, since], _BOOL)
        if method.sinks:
            late = self._op(first, "GreaterOrEqual", [position, number(method.sinks, _INT32)], _BOOL)
            candidate = self._op(first, "And", [candidate, late])
        worth = self._op(first, "Where", [candidate, score, number(np.inf, _FLOAT)], _FLOAT)
        free = self._op(first, "Less", [position, number(0, _INT32)], _BOOL)
        worth = self._op(first, "Where", [free, number(-np.inf, _FLOAT), worth], _FLOAT)
        return self._op(first, "ArgMin", [worth], _INT64, axis=2, keepdims=1)

    def _concat_heads(self, before: ir.Node, parts: Sequence[ir.Value]) -> ir.Value:
        return parts[0] if len(parts) == 1 else self._op(before, "Concat", parts, axis=1)

    def _visible_by_layer(self, group: LayerGroup, position: ir.Value) -> list[ir.Value]:
        """Return for each layer (batch, kv_heads, 1, slots) bool: which slots a query sees."""
        parts: dict[int | None, list[ir.Value]] = {}
        for layer in group.layers:
            window = layer.spec.window
            if window not in parts:
                seen = self._visible_slots(self.insertion_point, position, window, sum(group.kv_heads), group.slots)
                parts[window] = self.writer.split(self.insertion_point, seen, group.kv_heads)
        return [parts[layer.spec.window][at] for at, layer in enumerate(group.layers)]

    # Any number of tokens, or TensorRT

    def _append_with_custom_op(self, group: LayerGroup, score_in: ir.Value) -> tuple[ir.Value, ir.Value]:
        scores, positions = (
            self.writer.split(self.insertion_point, value, group.kv_heads) for value in (score_in, group.position)
        )
        outs: list[tuple[ir.Value, ir.Value]] = []
        for layer, score, position in zip(group.layers, scores, positions, strict=True):
            made = [side.cache.producer() for side in (layer.key, layer.value)]
            outputs = self._append(group, layer, score, position)
            for side, value in zip((layer.key, layer.value), outputs, strict=False):
                replace_value(side.cache, value)
                value.shape = side.past.shape
            if self.single_token:
                seen = self._visible_slots(layer.attention, outputs[3], layer.spec.window, layer.spec.kv_heads, group.slots)
            else:
                seen = self._attend_past_and_update(group, layer, position)
            self._replace_mask(layer, seen)
            self._record_layer(group, layer, outputs[0], outputs[1])
            outs.append((outputs[2], outputs[3]))
            self.dead_candidates += [node for node in made if node is not None]
        last = group.layers[-1].attention
        return self._concat_heads(last, [score for score, _ in outs]), self._concat_heads(
            last, [position for _, position in outs]
        )

    def _append(self, group: LayerGroup, layer: StaticCacheLayer, score: ir.Value, position: ir.Value) -> Sequence[ir.Value]:
        before, types = layer.attention, self.model_info.types
        for side in (layer.key, layer.value):
            side.past.shape = self._shape(layer.spec, group.slots, side.spec.head_size)
        new_score = group.scorer.context.sanitize(before, group.scorer.score_new_tokens(before, layer))
        outputs = self._custom_op(
            before,
            KV_APPEND_EVICT,
            [
                layer.key.past,
                layer.value.past,
                score,
                position,
                layer.key.update,
                layer.value.update,
                new_score,
                self.new_position,
            ],
            [types[layer.key.update], types[layer.value.update], _FLOAT, _INT32, _INT64, _INT32],
            sinks=self.config.sinks,
            recent=self.config.recent_window,
        )
        for value in outputs[2:4]:
            value.shape = self._shape(layer.spec, group.slots)
        return outputs

    def _custom_op(
        self, before: ir.Node, op: Op, inputs: Sequence[ir.Value], dtypes: Sequence[ir.DataType], **attributes: int
    ) -> Sequence[ir.Value]:
        """Write a node of a custom op in front of `before` and return its outputs, of the types `dtypes`."""
        if op not in self.custom_ops:
            self.custom_ops.append(op)
        name = self.writer.names.allocate(f"{NODE_NAME_PREFIX}_{op.name.lower()}")
        told = op.node_attributes(attributes)
        node = ir.node(op.name, inputs, told, domain=op.domain, num_outputs=len(dtypes), name=name)
        return self.writer.insert_node(before, node, dtypes)

    def _replace_mask(self, layer: StaticCacheLayer, visible: ir.Value) -> None:
        """Let attention see what `seen` (batch, kv_heads, seq, rows) says."""
        old = layer.attention.inputs[3]
        layer.attention.replace_input_with(3, self._expand_to_query_heads(layer.attention, visible, layer.spec))
        if old is not None and (made := old.producer()) is not None:
            self.dead_candidates.append(made)

    def _record_layer(self, group: LayerGroup, layer: StaticCacheLayer, keys: ir.Value, values: ir.Value) -> None:
        told = layer.spec
        self.layer_specs[told.attention_node] = msgspec.structs.replace(
            told,
            slots=group.slots,
            method=self.config.score,
            sinks=self.config.sinks,
            recent_window=self.config.recent_window,
            rescore_interval=self.config.rescore_interval if group.scorer.time_dependent else 0,
            statistics=self.config.statistics_ref,
            score_state=f"{SCORE_STATE}{group.state_suffix}",
            position_state=f"{POSITION_STATE}{group.state_suffix}",
            key=msgspec.structs.replace(told.key, cache=keys.name or ""),
            value=msgspec.structs.replace(told.value, cache=values.name or ""),
        )

    def _shape(self, spec: LayerCacheSpec, *rest: int) -> ir.Shape:
        return ir.Shape((self.view.batch, spec.kv_heads, *rest))

    def _visible_slots(self, before: ir.Node, position: ir.Value, window: int | None, heads: int, slots: int) -> ir.Value:
        """Return (batch, heads, 1 or seq, slots) bool: which slots the queries of a step see."""
        at = self._op(before, "Unsqueeze", [position, self.writer.int64_vector(2)])
        seen = self._op(before, "GreaterOrEqual", [at, self.writer.scalar(0, _INT32)], _BOOL)
        if window is not None:
            query = self._op(before, "Unsqueeze", [self.new_position, self.writer.int64_vector(1, 3)])
            since = self._op(before, "Sub", [query, self.writer.scalar(window, _INT32)])
            seen = self._op(before, "And", [seen, self._op(before, "Greater", [at, since], _BOOL)])
        seen.shape = ir.Shape((self.view.batch, heads, 1 if window is None else self.view.seq, slots))
        return seen

    def _visible_new_tokens(self, before: ir.Node, window: int | None) -> ir.Value:
        """Return (batch, 1, seq, seq) bool: which tokens of the step its queries see."""
        if window not in self._shared:
            zero = self.writer.scalar(0, _INT32)
            key = self._op(before, "Unsqueeze", [self.new_position, self.writer.int64_vector(1, 2)])
            query = self._op(before, "Unsqueeze", [self.new_position, self.writer.int64_vector(1, 3)])
            real = self._op(before, "GreaterOrEqual", [key, zero], _BOOL)
            seen = self._op(before, "And", [real, self._op(before, "LessOrEqual", [key, query], _BOOL)])
            if window is not None:
                since = self._op(before, "Sub", [query, self.writer.scalar(window, _INT32)])
                seen = self._op(before, "And", [seen, self._op(before, "Greater", [key, since], _BOOL)])
            self._shared[window] = seen
        return self._shared[window]

    def _attend_past_and_update(self, group: LayerGroup, layer: StaticCacheLayer, position_in: ir.Value) -> ir.Value:
        """Let attention read the slots as they were and the step's tokens behind them; return which of them it sees."""
        before, told = layer.attention, layer.spec
        for at, side in ((1, layer.key), (2, layer.value)):
            before.replace_input_with(at, self._concat_update(before, side))
        old = self._visible_slots(before, position_in, told.window, told.kv_heads, group.slots)
        new = self._visible_new_tokens(before, told.window)
        tokens = self._op(before, "Shape", [self.new_position], _INT64, start=1, end=2)
        batch = self._op(before, "Shape", [self.new_position], _INT64, start=0, end=1)
        heads = self.writer.int64_vector(told.kv_heads)
        to_old = self._op(before, "Concat", [batch, heads, tokens, self.writer.int64_vector(group.slots)], axis=0)
        to_new = self._op(before, "Concat", [batch, heads, tokens, tokens], axis=0)
        both = [self._op(before, "Expand", [old, to_old]), self._op(before, "Expand", [new, to_new])]
        return self._op(before, "Concat", both, axis=3)

    def _concat_update(self, before: ir.Node, tensor: StaticKVTensor) -> ir.Value:
        """Return (batch, kv_heads, slots + seq, size): the slots as they were, and the step's tokens behind them."""
        if tensor.past not in self._shared:
            self._shared[tensor.past] = self._op(before, "Concat", [tensor.past, tensor.update], axis=2)
        return self._shared[tensor.past]

    def _expand_to_query_heads(self, before: ir.Node, visible: ir.Value, spec: LayerCacheSpec) -> ir.Value:
        """Return `seen` (batch, kv_heads, seq, rows) for the heads of the queries."""
        times = spec.heads // spec.kv_heads
        if times == 1 or spec.kv_heads == 1:
            return visible
        integers = self.writer.int64_vector
        apart = self._op(before, "Unsqueeze", [visible, integers(2)])
        many = self._op(before, "Expand", [apart, integers(1, 1, times, 1, 1)])
        shape = self._op(before, "Shape", [visible], _INT64, start=2, end=4)
        target = self._op(before, "Concat", [integers(0, spec.heads), shape], axis=0)
        return self._op(before, "Reshape", [many, target])

    def _write_metadata(self) -> None:
        self.states.write_interface(
            self.view.model, msgspec.structs.replace(self.view.interface, capacity=self.view.spec.max_positions)
        )
        layers = tuple(self.layer_specs[layer.spec.attention_node] for layer in self.view.layers)
        write_kv_cache_spec(self.view.model, msgspec.structs.replace(self.view.spec, layers=layers))
