"""Compacting: evicting caches that a step of many tokens leaves with a budget of them, and the rest of the slots free.

A step attends over the slots as they were and its own tokens behind them. Where a row of it holds at least `window` tokens,
slots and tokens are then scored anew, a head for itself:

    p      = softmax over slots and tokens of the last `window` queries of the row, masked as attention is
    a      = mean of p over these queries and the query heads that share the kv-head; 0 for the tokens of the window
    score  = mean of a over `pooling` neighbours, in the order in which slots and tokens lie, zeros beyond either end;
             position + 2 for the tokens of the window

KVSelect names the best, the first `sinks` tokens among them, and KVCompact moves them together in the order of positions. A row
of fewer tokens is appended: slots keep their scores, its tokens score position + 2, and none goes before the slots are full.
The first slots that a compaction leaves are in the order of positions, and what is appended follows in it until the slots are
full; from then on a new token lies where another was, and neighbours are those in memory.

To KVSelect both rows look alike: behind the tokens stand as many fillers as a head has slots over its budget. Where a row is
compacted they are worth more than every token and take that many places at the end; elsewhere they are free slots.

No weights of attention but window * heads * (slots + seq) a row are in memory, for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import ModelInfo
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.evict.rewrite import EvictionConfig, EvictionRewriter, LayerGroup
from ryzen_passes.kv.scorers.snapkv import APPENDED_SCORE_OFFSET, SnapKvScorer
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView
from ryzen_plugins.kv_compact import KV_COMPACT
from ryzen_plugins.kv_select import KV_SELECT

_BOOL, _INT32, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
_FILLER_POSITION = 2**30
"""The position of fillers: behind every token."""
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class CompactionConfig(EvictionConfig):
    """What is kept; `slots` are budget and room, `recent` is the window."""

    score: str = SnapKvScorer.name
    append_slots: int
    """How many slots a compaction leaves free: from 1."""
    pooling: int
    """Over how many neighbours a score is the mean: odd."""


def compact(view: StaticCacheView, model_info: ModelInfo, config: CompactionConfig, *, use_custom_op: bool) -> Change:
    """Rewrite `form` in place so that its heads keep what `method` says; with `as_op` KVAppendEvict does steps of one token."""
    return _CompactionRewriter(view, model_info, config, use_custom_op).run()


@dataclass(frozen=True)
class _Window:
    """The last queries of each row."""

    token_indices: ir.Value
    """(batch, window) int64: which tokens of the step; the first one again where there are too few."""
    position: ir.Value
    """(batch, 1, window, 1) int32."""
    first_position: ir.Value
    """(batch, 1, 1) int32: where the window begins."""
    is_full: ir.Value
    """(batch, 1, 1) bool: whether the row has so many, and is compacted."""


class _CompactionRewriter(EvictionRewriter):
    def __init__(self, view: StaticCacheView, model_info: ModelInfo, config: CompactionConfig, use_custom_op: bool) -> None:
        super().__init__(view, model_info, config, use_custom_op)
        self.compaction = config
        self._window: _Window | None = None

    def _append(self, group: LayerGroup, layer: StaticCacheLayer, score: ir.Value, position: ir.Value) -> Sequence[ir.Value]:
        if self.single_token:
            return super()._append(group, layer, score, position)
        before, heads, types = layer.attention, layer.spec.kv_heads, self.model_info.types
        for side in (layer.key, layer.value):
            side.past.shape = self._shape(layer.spec, group.slots, side.spec.head_size)
        keys, values = (self._concat_update(before, side) for side in (layer.key, layer.value))
        apart = self._op(before, "Unsqueeze", [self.new_position, self.writer.int64_vector(1)])
        new = self._op(before, "Expand", [apart, self.writer.int64_vector(1, heads, 1)])
        at = self._op(before, "Concat", [position, new], axis=2)
        told = self._op(before, "Concat", [score, group.scorer.score_new_tokens(before, layer)], axis=2)
        worth = group.scorer.context.sanitize(before, self._priority(layer, keys, at, told))
        fillers = self._fillers(heads)
        both = [self._op(before, "Concat", [one, more], axis=2) for one, more in zip((worth, at), fillers, strict=True)]
        index, _ = self._custom_op(
            before, KV_SELECT, both, [_INT32, _INT64], keep=group.slots, sinks=self.config.sinks, recent=0
        )
        dtypes = [types[keys], types[values], _FLOAT, _INT32]
        outputs = self._custom_op(before, KV_COMPACT, [keys, values, worth, at, index], dtypes)
        for value in outputs[2:]:
            value.shape = self._shape(layer.spec, group.slots)
        return outputs

    def _record_layer(self, group: LayerGroup, layer: StaticCacheLayer, keys: ir.Value, values: ir.Value) -> None:
        super()._record_layer(group, layer, keys, values)
        name, compaction = layer.spec.attention_node, self.compaction
        self.layer_specs[name] = msgspec.structs.replace(
            self.layer_specs[name], append_slots=compaction.append_slots, pooling=compaction.pooling
        )

    def _priority(self, layer: StaticCacheLayer, keys: ir.Value, positions: ir.Value, scores: ir.Value) -> ir.Value:
        """Return (batch, kv_heads, slots + seq) float32: attention and window where a row is compacted, `told` elsewhere."""
        before, window, pooling = layer.attention, self._last_queries(), self.compaction.pooling
        inside = self._op(before, "GreaterOrEqual", [positions, window.first_position], _BOOL)
        worth = self._op(
            before, "Where", [inside, self.writer.scalar(0.0, _FLOAT), self._window_attention(layer, keys, positions)], _FLOAT
        )
        if pooling > 1:
            pads = [pooling // 2, pooling // 2]
            worth = self._op(before, "AveragePool", [worth], kernel_shape=[pooling], pads=pads, count_include_pad=1)
        number = self._op(before, "Cast", [positions], _FLOAT, to=int(_FLOAT))
        above = self._op(before, "Add", [number, self.writer.scalar(APPENDED_SCORE_OFFSET, _FLOAT)])
        worth = self._op(before, "Where", [inside, above, worth], _FLOAT)
        return self._op(before, "Where", [window.is_full, worth, scores], _FLOAT)

    def _window_attention(self, layer: StaticCacheLayer, keys: ir.Value, positions: ir.Value) -> ir.Value:
        """Return (batch, kv_heads, slots + seq) float32: the mean attention of the window's queries."""
        node, integers, number, window = layer.attention, self.writer.int64_vector, self.writer.scalar, self._last_queries()
        told, query = layer.spec, node.inputs[0]
        assert query is not None
        dtype, size, many = self.model_info.types[query], told.key.head_size, self.config.recent_window
        times = told.heads // told.kv_heads
        apart = self._op(node, "Unsqueeze", [window.token_indices, integers(1, 3)])
        rows = self._op(node, "Expand", [apart, integers(1, told.heads, 1, size)])
        latest = self._op(node, "GatherElements", [query, rows], dtype, axis=2)
        latest = self._op(node, "Reshape", [latest, integers(0, told.kv_heads, times * many, size)])
        scale = node.attributes.get_float("scale", 1 / float(np.sqrt(size)))
        latest = self._op(node, "Mul", [latest, number(scale, dtype)])
        product = self._op(node, "MatMul", [latest, self._op(node, "Transpose", [keys], perm=[0, 1, 3, 2])])
        if softcap := node.attributes.get_float("softcap", 0.0):
            tamed = self._op(node, "Tanh", [self._op(node, "Div", [product, number(softcap, dtype)])])
            product = self._op(node, "Mul", [tamed, number(softcap, dtype)])
        product = self._op(node, "Reshape", [product, integers(0, told.kv_heads, times, many, -1)])
        seen = self._op(node, "Unsqueeze", [self._visible_to_window(layer, positions), integers(2)])
        masked = self._op(node, "Where", [seen, product, number(-np.inf, dtype)], dtype)
        weights = self._op(node, "Softmax", [masked], axis=-1)
        wide = weights if dtype == _FLOAT else self._op(node, "Cast", [weights], _FLOAT, to=int(_FLOAT))
        return self._op(node, "ReduceMean", [wide, integers(2, 3)], _FLOAT, keepdims=0)

    def _visible_to_window(self, layer: StaticCacheLayer, positions: ir.Value) -> ir.Value:
        """Return (batch, kv_heads, window, slots + seq) bool: which slots and tokens the window's queries see."""
        node, number, query = layer.attention, self.writer.scalar, self._last_queries().position
        key = self._op(node, "Unsqueeze", [positions, self.writer.int64_vector(2)])
        held = self._op(node, "GreaterOrEqual", [key, number(0, _INT32)], _BOOL)
        seen = self._op(node, "And", [held, self._op(node, "LessOrEqual", [key, query], _BOOL)])
        if layer.spec.window is None:
            return seen
        since = self._op(node, "Sub", [query, number(layer.spec.window, _INT32)])
        return self._op(node, "And", [seen, self._op(node, "Greater", [key, since], _BOOL)])

    def _last_queries(self) -> _Window:
        """Return the last queries of each row."""
        if self._window is None:
            first, integers, number, many = (
                self.insertion_point,
                self.writer.int64_vector,
                self.writer.scalar,
                self.config.recent_window,
            )
            count = self._op(first, "ReduceSum", [self.view.mask, integers(1)], keepdims=1)
            back = self.writer.constant(np.arange(many) - many, _INT64)
            at = self._op(first, "Max", [self._op(first, "Add", [count, back]), number(0, _INT64)])
            position = self._op(first, "GatherElements", [self.new_position, at], axis=1)
            start = self._op(first, "Slice", [position, integers(0), integers(1), integers(1)])
            whole = self._op(first, "GreaterOrEqual", [count, number(many, _INT64)], _BOOL)
            self._window = _Window(
                token_indices=at,
                position=self._op(first, "Unsqueeze", [position, integers(1, 3)]),
                first_position=self._op(first, "Unsqueeze", [start, integers(2)]),
                is_full=self._op(first, "Unsqueeze", [whole, integers(2)]),
            )
        return self._window

    def _fillers(self, heads: int) -> tuple[ir.Value, ir.Value]:
        """Return (batch, kv_heads, room) float32 and int32: the scores and positions of what stands for slots left free."""
        first, number, window, shape = (
            self.insertion_point,
            self.writer.scalar,
            self._last_queries(),
            (1, heads, self.compaction.append_slots),
        )
        made: list[ir.Value] = []
        for word, there, elsewhere, dtype in (("worth", _FLOAT32_MAX, 0.0, _FLOAT), ("at", _FILLER_POSITION, -1, _INT32)):
            key = (word, heads)
            if key not in self._shared:
                one = self._op(first, "Where", [window.is_full, number(there, dtype), number(elsewhere, dtype)], dtype)
                self._shared[key] = self._op(first, "Expand", [one, self.writer.int64_vector(*shape)])
            made.append(self._shared[key])
        return made[0], made[1]
