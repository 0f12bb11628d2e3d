"""Write evicting caches: fewer slots than tokens, in which a new token replaces the token of the lowest score.

A step of one token selects a slot, writes the token to it, and attends over the slots, which include the token itself; nothing
is copied. The slots of all layers of equal size are selected before the first layer: the newest token is never evicted, so its
own score is not needed. A slot whose token is behind the attention window of its layer counts as free. That takes about a
dozen small nodes per step, instead of about forty per layer. A step of several tokens attends over the slots from before the
step followed by its own tokens, so that each token sees all tokens before it, and evicts into separate output buffers. Both
leave the same slots as the op KVAppendEvict. On TensorRT that op, whose kernel writes in place, implements both.

Scores and positions are one state each for all layers of equal size: (batch, layers * kv_heads, slots).

With a time-dependent score, every step rescores tokens before it selects slots. Steps of one token rescore some slots each, in
turn, so that `rescore_interval` steps cover all slots at constant cost per step; a step of several tokens rescores all slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import ModelInfo
from ryzen_compile.spec.kv_cache import (
    AppendEvictWrite,
    Compaction,
    Eviction,
    LayerCacheSpec,
    ScatterWrite,
    StatisticsRef,
)
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.cache_rewriter import CacheRewriter
from ryzen_passes.kv.scoring import Scorer, ScoringContext, Statistics
from ryzen_passes.kv.slot_writes import SlotAssignment
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView
from ryzen_plugins.kv_append_evict import KV_APPEND_EVICT

_BOOL, _INT32, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
SCORE_STATE, POSITION_STATE = "score", "position"
_UNLIMITED_WINDOW = 2**30
"""An attention window that exceeds every position."""
_SCORE_AND_POSITION_BYTES = 8
"""Bytes of the score and the position of one slot of one head."""


@dataclass(frozen=True, kw_only=True)
class EvictionConfig:
    """The tokens that are kept."""

    scorer: type[Scorer]
    """The score by which tokens are kept."""
    slots: tuple[int | None, ...]
    """Slots per head of each layer; None: the layer keeps its ring buffer, which is exact."""
    sinks: int
    recent_window: int
    rescore_interval: int = 0
    """Number of single-token steps in which every slot is rescored once by a time-dependent score; 0: never."""
    statistics: Statistics | None = None
    statistics_ref: StatisticsRef | None = None
    """The file of `statistics`."""

    def policy(self, **recorded: Any) -> Eviction | Compaction:
        """Return the policy of a layer with the fields `recorded`: its slots, states, write and attended rows."""
        return Eviction(
            score=self.scorer.name,
            sinks=self.sinks,
            recent_window=self.recent_window,
            rescore_interval=self.rescore_interval if self.scorer.time_dependent else 0,
            statistics=self.statistics_ref,
            **recorded,
        )

    def saved_bytes(self, view: StaticCacheView) -> int:
        """Return the bytes by which the states of one sequence shrink, with the score and position states deducted."""
        return sum(
            layer.spec.kv_heads * (layer.row_bytes * layer.slots - (layer.row_bytes + _SCORE_AND_POSITION_BYTES) * slots)
            for layer, slots in zip(view.layers, self.slots, strict=True)
            if slots is not None
        )


def evicting_slots(layer: StaticCacheLayer, slots: int) -> int | None:
    """Return the slots per head with which `layer` evicts if it may have `slots`, at most its attention window.

    None: the layer has a ring buffer that fits, which is exact, and stays unchanged.
    """
    if layer.spec.has_exact_ring and layer.slots <= slots:
        return None
    return min(slots, layer.spec.window or slots)


def exact_ring_slots(view: StaticCacheView) -> frozenset[int]:
    """Return the slots of the ring buffers of `view` that are exact, which stay unchanged in a budget that covers them."""
    return frozenset(layer.slots for layer in view.layers if layer.spec.has_exact_ring)


def state_bytes(
    view: StaticCacheView, slots: int, *, layer_slots: Callable[[StaticCacheLayer, int], int | None] = evicting_slots
) -> int:
    """Return the bytes of the states of one sequence if every layer may have `slots` slots per head.

    `layer_slots` maps a layer and that number to the slots with which the layer evicts, as `evicting_slots` does.
    """
    total = 0
    for layer in view.layers:
        count = layer_slots(layer, slots)
        extra_bytes = 0 if count is None else _SCORE_AND_POSITION_BYTES
        total += layer.spec.kv_heads * (layer.row_bytes + extra_bytes) * (layer.slots if count is None else count)
    return total


def evict(view: StaticCacheView, model_info: ModelInfo, config: EvictionConfig, *, use_custom_op: bool) -> Change:
    """Rewrite `view` in place to keep the tokens that `config` defines.

    With `use_custom_op` steps of one token use KVAppendEvict, as steps of several tokens always do.
    """
    return EvictionRewriter(view, model_info, config, use_custom_op).run()


@dataclass
class LayerGroup:
    """Layers with the same number of slots, which share a score state and a position state."""

    layers: list[StaticCacheLayer]
    scorer: Scorer
    slots: int
    state_suffix: str
    score: ir.Value
    """(batch, layers * kv_heads, slots) float32: the score state before the step."""
    position: ir.Value
    """(batch, layers * kv_heads, slots) int32: the position state before the step, -1 for a free slot."""

    @property
    def kv_heads(self) -> list[int]:
        """The number of kv-heads of each layer."""
        return [layer.spec.kv_heads for layer in self.layers]

    @property
    def windows(self) -> list[int | None]:
        """The attention window of each head; None: unlimited."""
        return [layer.spec.window for layer in self.layers for _ in range(layer.spec.kv_heads)]


class EvictionRewriter(CacheRewriter):
    """The rewrite of one graph to evicting caches."""

    def __init__(self, view: StaticCacheView, model_info: ModelInfo, config: EvictionConfig, use_custom_op: bool) -> None:
        super().__init__(view, model_info)
        self.config = config
        self.uses_standard_ops = self.single_token and not use_custom_op

    def run(self) -> Change:
        """Rewrite the model and return the change, which is empty if no layer evicts."""
        config = self.config
        counts = [slots for slots in config.slots if slots is not None]
        kept = len(config.slots) - len(counts)
        kept_summary = f"{kept} layers keep their attention window, which the budget covers"
        if not counts:
            return Change(summary=f"no layer evicts; {kept_summary}")
        self.new_position = self._new_position()
        for group in self._layer_groups():
            group.scorer.begin()
            rescore = group.scorer.time_dependent and config.rescore_interval
            score = self._rescore(group) if rescore else group.score
            append = self._append_with_standard_ops if self.uses_standard_ops else self._append_with_custom_op
            outputs = append(group, score)
            group.scorer.end(group.layers[-1].attention)
            for name, value in zip((SCORE_STATE, POSITION_STATE), outputs, strict=True):
                self.states.set_output(f"{name}{group.state_suffix}", value)
        if not self.single_token:
            self.states.disable_in_place()
        tokens = f"{min(counts)}" if len({*counts}) == 1 else f"{min(counts)} to {max(counts)}"
        summary = f"{len(counts)} layers keep {tokens} tokens per head: {config.scorer.description}"
        if kept:
            summary += f"; {kept_summary}"
        return self.finish(
            summary,
            changed=[layer for layer, slots in zip(self.view.layers, config.slots, strict=True) if slots is not None],
            interface=msgspec.structs.replace(self.view.interface, capacity=self.view.spec.max_positions),
        )

    def _layer_groups(self) -> list[LayerGroup]:
        """Return the layers grouped by their number of slots, with the states of each group."""
        sizes = list(dict.fromkeys(slots for slots in self.config.slots if slots is not None))
        groups: list[LayerGroup] = []
        for slots in sizes:
            indices = [index for index, layer_slots in enumerate(self.config.slots) if layer_slots == slots]
            layers = [self.view.layers[index] for index in indices]
            for layer in layers:
                self.set_slots(layer, slots)
            suffix = f".{len(groups)}" if len(sizes) > 1 else ""
            shape = ir.Shape((self.view.batch, sum(layer.spec.kv_heads for layer in layers), slots))
            interval = self.config.rescore_interval
            context = ScoringContext(
                writer=self.writer,
                states=self.states,
                view=self.view,
                insertion_point=self.insertion_point,
                layers=layers,
                layer_indices=indices,
                slots=slots,
                state_suffix=suffix,
                batch=self.view.batch,
                length=self.view.length,
                new_position=self.new_position,
                token_mask=self.token_mask,
                rescored_slots=-(-slots // interval) if self.single_token and interval else slots,
                statistics=self.config.statistics,
            )
            score = self.states.add_input(f"{SCORE_STATE}{suffix}", _FLOAT, shape)
            position = self.states.add_input(f"{POSITION_STATE}{suffix}", _INT32, shape, initial_value=-1.0)
            groups.append(LayerGroup(layers, self.config.scorer(context), slots, suffix, score, position))
        return groups

    def _new_position(self) -> ir.Value:
        """Return (batch, seq) int32: the positions of the step's tokens, -1 for padding."""
        before = self.insertion_point
        position = self.cast(before, self.view.positions, _INT32)
        self.token_mask = self.bool_mask()
        masked = self.op(before, "Where", [self.token_mask, position, self.writer.scalar(-1, _INT32)], _INT32)
        masked.shape = self.view.mask.shape
        return masked

    def _rescore(self, group: LayerGroup) -> ir.Value:
        """Return the scores of a group, with some or all slots rescored for the length before the step."""
        before, context = self.insertion_point, group.scorer.context
        count, slots, position = context.rescored_slots, None, group.position
        if count < group.slots:
            start = self.op(before, "Mul", [context.length, self.writer.scalar(count, _INT64)])
            offset = self.writer.constant(np.arange(count), _INT64)
            unwrapped = self.op(before, "Add", [self.unsqueeze(before, start, 1), offset])
            wrapped = self.op(before, "Mod", [unwrapped, self.writer.scalar(group.slots, _INT64)])
            slots_of_any_head = self.unsqueeze(before, wrapped, 1)
            slots = self.expand(before, slots_of_any_head, 1, sum(group.kv_heads), 1)
            position = self.op(before, "GatherElements", [group.position, slots], axis=2)
        keys = []
        for layer in group.layers:
            key = layer.key.past
            if slots is not None:
                column = self.unsqueeze(before, slots_of_any_head, 3)
                expanded = self.expand(before, column, 1, layer.spec.kv_heads, 1, layer.spec.key.head_size)
                key = self.op(before, "GatherElements", [key, expanded], axis=2)
            keys.append(context.to_float32(before, key))
        all_keys = keys[0] if len(keys) == 1 else self.op(before, "Concat", keys, axis=1)
        rescored = context.sanitize(before, group.scorer.rescore(all_keys, position))
        old = group.score if slots is None else self.op(before, "GatherElements", [group.score, slots], axis=2)
        is_token = self.visible_positions(before, position, has_free_slots=True)
        is_rescored = self.op(before, "And", [is_token, self._has_tokens()], _BOOL)
        score = self.op(before, "Where", [is_rescored, rescored, old], _FLOAT)
        if slots is not None:
            score = self.op(before, "ScatterElements", [group.score, slots, score], axis=2)
        score.shape, score.name = group.score.shape, self.writer.names.allocate(f"{SCORE_STATE}{group.state_suffix}_rescored")
        return score

    def _has_tokens(self) -> ir.Value:
        """Return (batch, 1, 1) bool: whether a row has a token in this step; other rows stay unchanged."""
        before = self.insertion_point
        any_token = self.op(before, "ReduceMax", [self.view.mask, self.writer.int64_vector(1)], keepdims=1)
        return self.cast(before, self.unsqueeze(before, any_token, 2), _BOOL)

    # One token, in standard ops

    def _append_with_standard_ops(self, group: LayerGroup, score: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Append the token to every layer of the group and return its score and position states after the step."""
        before = self.insertion_point
        slot = self._eviction_slots(score, group.position, group.windows)
        is_token = self.unsqueeze(before, self.token_mask, 1)
        assignment = SlotAssignment(slots=slot, is_written=is_token)
        new_position = self.unsqueeze(before, self.new_position, 1)
        position_out = self.slot_writer.scatter(before, group.position, new_position, assignment)
        slots = self.writer.split(before, slot, group.kv_heads)
        masks = self._visible_by_layer(group, position_out)
        new_scores: list[ir.Value] = []
        for layer, layer_slot, mask in zip(group.layers, slots, masks, strict=True):
            new_scores.append(group.scorer.score_new_tokens(layer.attention, layer))
            layer_assignment = SlotAssignment(slots=layer_slot, is_written=is_token)
            for tensor in (layer.key, layer.value):
                cache = self.slot_writer.scatter(layer.attention, tensor.past, tensor.update, layer_assignment)
                self.replace_cache(tensor, cache)
            self.replace_mask(layer, self._expand_to_query_heads(layer.attention, mask, layer.spec))
            self._record(group, layer, layer_assignment.to_spec())
        last = group.layers[-1].attention
        new_score = group.scorer.context.sanitize(last, self._concat_heads(last, new_scores))
        return self.slot_writer.scatter(last, score, new_score, assignment), position_out

    def _eviction_slots(self, score: ir.Value, position: ir.Value, windows: Sequence[int | None]) -> ir.Value:
        """Return (batch, layers * kv_heads, 1) int64: the first free slot, else the slot of the lowest evictable score.

        `windows` are the attention windows of the heads; a slot whose token is behind the window of its head is free.
        """
        before, scalar, config = self.insertion_point, self.writer.scalar, self.config
        new_position = self.unsqueeze(before, self.new_position, 1)
        newest_evictable = self.op(before, "Sub", [new_position, scalar(config.recent_window, _INT32)])
        is_evictable = self.op(before, "LessOrEqual", [position, newest_evictable], _BOOL)
        if config.sinks:
            is_not_sink = self.op(before, "GreaterOrEqual", [position, scalar(config.sinks, _INT32)], _BOOL)
            is_evictable = self.op(before, "And", [is_evictable, is_not_sink])
        priority = self.op(before, "Where", [is_evictable, score, scalar(np.inf, _FLOAT)], _FLOAT)
        free_until = scalar(-1, _INT32)
        if any(window is not None for window in windows):
            limits = [_UNLIMITED_WINDOW if window is None else window for window in windows]
            window = (
                scalar(limits[0], _INT32)
                if len({*limits}) == 1
                else self.writer.constant(np.reshape(limits, (1, -1, 1)), _INT32)
            )
            unseen_until = self.op(before, "Sub", [new_position, window])
            free_until = self.op(before, "Max", [unseen_until, free_until])
        is_free = self.op(before, "LessOrEqual", [position, free_until], _BOOL)
        priority = self.op(before, "Where", [is_free, scalar(-np.inf, _FLOAT), priority], _FLOAT)
        return self.op(before, "ArgMin", [priority], _INT64, axis=2, keepdims=1)

    def _concat_heads(self, before: ir.Node, parts: Sequence[ir.Value]) -> ir.Value:
        return parts[0] if len(parts) == 1 else self.op(before, "Concat", parts, axis=1)

    def _visible_by_layer(self, group: LayerGroup, position: ir.Value) -> list[ir.Value]:
        """Return for each layer (batch, kv_heads, 1, slots) bool: the slots that the query sees."""
        parts: dict[int | None, list[ir.Value]] = {}
        for layer in group.layers:
            window = layer.spec.window
            if window not in parts:
                visible = self._visible_slots(self.insertion_point, position, window, sum(group.kv_heads), group.slots)
                parts[window] = self.writer.split(self.insertion_point, visible, group.kv_heads)
        return [parts[layer.spec.window][index] for index, layer in enumerate(group.layers)]

    # Any number of tokens, or TensorRT

    def _append_with_custom_op(self, group: LayerGroup, score: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Append the tokens to every layer of the group and return its score and position states after the step."""
        scores, positions = (
            self.writer.split(self.insertion_point, value, group.kv_heads) for value in (score, group.position)
        )
        new_scores: list[ir.Value] = []
        new_positions: list[ir.Value] = []
        for layer, layer_score, layer_position in zip(group.layers, scores, positions, strict=True):
            outputs, write = self._append(group, layer, layer_score, layer_position)
            keys, values, score_out, position_out = outputs[:4]
            for tensor, cache in ((layer.key, keys), (layer.value, values)):
                self.replace_cache(tensor, cache)
            if self.single_token:
                visible = self._visible_slots(
                    layer.attention, position_out, layer.spec.window, layer.spec.kv_heads, group.slots
                )
            else:
                visible = self._attend_past_and_update(group, layer, layer_position)
            self.replace_mask(layer, self._expand_to_query_heads(layer.attention, visible, layer.spec))
            self._record(group, layer, write)
            new_scores.append(score_out)
            new_positions.append(position_out)
        last = group.layers[-1].attention
        return self._concat_heads(last, new_scores), self._concat_heads(last, new_positions)

    def _append(
        self, group: LayerGroup, layer: StaticCacheLayer, score: ir.Value, position: ir.Value
    ) -> tuple[Sequence[ir.Value], AppendEvictWrite | None]:
        """Append the tokens of the step to `layer`; return its keys, values, scores and positions after it, and its write."""
        before, types = layer.attention, self.model_info.types
        new_score = group.scorer.context.sanitize(before, group.scorer.score_new_tokens(before, layer))
        key, value = layer.key, layer.value
        outputs = self.custom_op(
            before,
            KV_APPEND_EVICT,
            [key.past, value.past, score, position, key.update, value.update, new_score, self.new_position],
            [types[key.update], types[value.update], _FLOAT, _INT32, _INT64, _INT32],
            # A layer with as many slots as its window evicts no token in the window, whatever its sinks and recent tokens.
            sinks=min(self.config.sinks, group.slots - 1),
            recent=min(self.config.recent_window, max(group.slots - self.config.sinks, 1)),
            window=layer.spec.window or 0,
        )
        for output in outputs[2:4]:
            output.shape = self.cache_shape(layer, group.slots)
        return outputs, AppendEvictWrite(slots=outputs[5].name or "")

    def _record(self, group: LayerGroup, layer: StaticCacheLayer, write: ScatterWrite | AppendEvictWrite | None) -> None:
        policy = self.config.policy(
            slots=group.slots,
            score_state=f"{SCORE_STATE}{group.state_suffix}",
            position_state=f"{POSITION_STATE}{group.state_suffix}",
            write=write,
            attended="cache" if self.single_token else "past-then-update",
        )
        self.record_layer(layer, policy=policy)

    def _visible_slots(self, before: ir.Node, position: ir.Value, window: int | None, heads: int, slots: int) -> ir.Value:
        """Return (batch, heads, 1 or seq, slots) bool: the slots that the queries of the step see."""
        key, start = self.unsqueeze(before, position, 2), None
        if window is not None:
            query = self.unsqueeze(before, self.new_position, 1, 3)
            start = self.window_start(before, query, window)
        visible = self.visible_positions(before, key, start=start, has_free_slots=True)
        visible.shape = ir.Shape((self.view.batch, heads, 1 if window is None else self.view.seq, slots))
        return visible

    def _visible_new_tokens(self, before: ir.Node, window: int | None) -> ir.Value:
        """Return (batch, 1, seq, seq) bool: the tokens of the step that its queries see."""

        def make() -> ir.Value:
            key = self.unsqueeze(before, self.new_position, 1, 2)
            query = self.unsqueeze(before, self.new_position, 1, 3)
            return self.visible_positions(before, key, query=query, window=window, has_free_slots=True)

        return self.shared(("new tokens", window), make)

    def _attend_past_and_update(self, group: LayerGroup, layer: StaticCacheLayer, position: ir.Value) -> ir.Value:
        """Make attention read the slots from before the step and the step's tokens after them; return its mask."""
        before, spec = layer.attention, layer.spec
        for input_index, tensor in ((1, layer.key), (2, layer.value)):
            old = before.inputs[input_index]
            self.dead_candidates += [node] if old is not None and (node := old.producer()) is not None else []
            before.replace_input_with(input_index, self.past_and_update(layer, tensor))
        past = self._visible_slots(before, position, spec.window, spec.kv_heads, group.slots)
        new = self._visible_new_tokens(before, spec.window)
        tokens = self.op(before, "Shape", [self.new_position], _INT64, start=1, end=2)
        batch = self.op(before, "Shape", [self.new_position], _INT64, start=0, end=1)
        heads = self.writer.int64_vector(spec.kv_heads)
        past_shape = self.op(before, "Concat", [batch, heads, tokens, self.writer.int64_vector(group.slots)], axis=0)
        new_shape = self.op(before, "Concat", [batch, heads, tokens, tokens], axis=0)
        parts = [self.op(before, "Expand", [past, past_shape]), self.op(before, "Expand", [new, new_shape])]
        return self.op(before, "Concat", parts, axis=3)

    def _expand_to_query_heads(self, before: ir.Node, visible: ir.Value, spec: LayerCacheSpec) -> ir.Value:
        """Return `visible` (batch, kv_heads, seq, rows) repeated for the query heads of each kv-head."""
        queries_per_head = spec.heads // spec.kv_heads
        if queries_per_head == 1 or spec.kv_heads == 1:
            return visible
        integers = self.writer.int64_vector
        column = self.unsqueeze(before, visible, 2)
        repeated = self.expand(before, column, 1, 1, queries_per_head, 1, 1)
        dims = self.op(before, "Shape", [visible], _INT64, start=2, end=4)
        shape = self.op(before, "Concat", [integers(0, spec.heads), dims], axis=0)
        return self.op(before, "Reshape", [repeated, shape])
