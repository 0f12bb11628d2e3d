"""Write compacting caches: evicting caches in which a step of many tokens keeps a budget of them and frees the other slots.

A step attends over the slots from before the step followed by its own tokens. If a row has at least `window` tokens in the
step, slots and tokens are then scored anew by `SnapKvScorer`, for each head independently.

KVSelect selects the best, the first `sinks` tokens among them, and KVCompact moves them to the first slots in order of
position. A row of fewer tokens is appended: slots keep their scores, its tokens score position + 2, and no token is evicted
before all slots are full. After a compaction the occupied slots are in order of position, and appended tokens continue that
order until the slots are full; after that a new token takes the slot of an evicted one, and neighbors are neighbors in memory.

KVSelect handles both kinds of rows alike, by fillers after the tokens, as many as a head has slots beyond its budget. In a
compacted row the fillers have the highest priority and take that many places at the end; in other rows they are free slots.

The attention weights in memory are window * heads * (slots + seq) per row, for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import float_attribute
from ryzen_compile.ir.edit.builder import ModelInfo
from ryzen_compile.spec.kv_cache import AppendEvictWrite, Compaction, Eviction
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.compact.snapkv import SnapKvScorer
from ryzen_passes.kv.evict.rewrite import EvictionConfig, EvictionRewriter, LayerGroup
from ryzen_passes.kv.scoring import Scorer
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView
from ryzen_passes.kv.static.step_positions import NODE_NAME_PREFIX
from ryzen_plugins.kv_compact import KV_COMPACT
from ryzen_plugins.kv_select import KV_SELECT

_BOOL, _INT32, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
_FILLER_POSITION = 2**30
"""The position of fillers, greater than that of every token."""
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class CompactionConfig(EvictionConfig):
    """The tokens that are kept; `slots` is the budget plus `append_slots`, `recent_window` the number of scoring queries."""

    scorer: type[Scorer] = SnapKvScorer
    append_slots: int
    """Number of slots that a compaction leaves free, at least 1."""
    pooling: int
    """Number of neighbors over which scores are averaged, odd."""

    def policy(self, **recorded: Any) -> Eviction | Compaction:
        """Return the policy of a layer with the fields `recorded`: its slots, states, write and attended rows."""
        sizes: dict[str, Any] = {"append_slots": self.append_slots, "pooling": self.pooling}
        return Compaction(sinks=self.sinks, recent_window=self.recent_window, **sizes, **recorded)


def compact(view: StaticCacheView, model_info: ModelInfo, config: CompactionConfig, *, use_custom_op: bool) -> Change:
    """Rewrite `view` in place to keep the tokens that `config` defines.

    With `use_custom_op` steps of one token use KVAppendEvict.
    """
    return _CompactionRewriter(view, model_info, config, use_custom_op).run()


@dataclass(frozen=True)
class _Window:
    """The last queries of each row."""

    token_indices: ir.Value
    """(batch, window) int64: the tokens of the step; token 0 is repeated if there are fewer than `window`."""
    position: ir.Value
    """(batch, 1, window, 1) int32."""
    first_position: ir.Value
    """(batch, 1, 1) int32: the position of the first token of the window."""
    is_full: ir.Value
    """(batch, 1, 1) bool: whether the row has at least `window` tokens and is compacted."""


class _CompactionRewriter(EvictionRewriter):
    """The rewrite of one graph to compacting caches."""

    def __init__(self, view: StaticCacheView, model_info: ModelInfo, config: CompactionConfig, use_custom_op: bool) -> None:
        super().__init__(view, model_info, config, use_custom_op)
        self.compaction = config
        self._window: _Window | None = None

    def _append(
        self, group: LayerGroup, layer: StaticCacheLayer, score: ir.Value, position: ir.Value
    ) -> tuple[Sequence[ir.Value], AppendEvictWrite | None]:
        if self.single_token:
            return super()._append(group, layer, score, position)
        before, heads, types = layer.attention, layer.spec.kv_heads, self.model_info.types
        keys, values = (self.past_and_update(layer, tensor) for tensor in (layer.key, layer.value))
        new_row = self.unsqueeze(before, self.new_position, 1)
        new_position = self.expand(before, new_row, 1, heads, 1)
        positions = self.op(before, "Concat", [position, new_position], axis=2)
        scores = self.op(before, "Concat", [score, group.scorer.score_new_tokens(before, layer)], axis=2)
        assert isinstance(group.scorer, SnapKvScorer)
        priority = group.scorer.context.sanitize(before, self._priority(group.scorer, layer, keys, positions, scores))
        fillers = self._fillers(heads)
        candidates = [
            self.op(before, "Concat", [value, filler], axis=2)
            for value, filler in zip((priority, positions), fillers, strict=True)
        ]
        indices, _ = self.custom_op(
            before, KV_SELECT, candidates, [_INT32, _INT64], keep=group.slots, sinks=self.config.sinks, recent=0
        )
        dtypes = [types[keys], types[values], _FLOAT, _INT32]
        outputs = self.custom_op(before, KV_COMPACT, [keys, values, priority, positions, indices], dtypes)
        for output in outputs[2:]:
            output.shape = self.cache_shape(layer, group.slots)
        return outputs, None

    def _priority(
        self, scorer: SnapKvScorer, layer: StaticCacheLayer, keys: ir.Value, positions: ir.Value, scores: ir.Value
    ) -> ir.Value:
        """Return (batch, kv_heads, slots + seq) float32: the new scores if a row is compacted, `scores` otherwise."""
        before, window = layer.attention, self._last_queries()
        in_window = self.op(before, "GreaterOrEqual", [positions, window.first_position], _BOOL)
        attention = self._window_attention(layer, keys, positions)
        priority = scorer.score_prompt(before, attention, positions, in_window, self.compaction.pooling)
        return self.op(before, "Where", [window.is_full, priority, scores], _FLOAT)

    def _window_attention(self, layer: StaticCacheLayer, keys: ir.Value, positions: ir.Value) -> ir.Value:
        """Return (batch, kv_heads, slots + seq) float32: the mean attention weights of the window's queries."""
        node, integers, scalar, window = layer.attention, self.writer.int64_vector, self.writer.scalar, self._last_queries()
        spec, query = layer.spec, node.inputs[0]
        assert query is not None
        dtype, size, count = self.model_info.types[query], spec.key.head_size, self.config.recent_window
        queries_per_head = spec.heads // spec.kv_heads
        column = self.unsqueeze(node, window.token_indices, 1, 3)
        indices = self.expand(node, column, 1, spec.heads, 1, size)
        queries = self.op(node, "GatherElements", [query, indices], dtype, axis=2)
        queries = self.reshape(node, queries, 0, spec.kv_heads, queries_per_head * count, size)
        scale = float_attribute(node, "scale", 1 / float(np.sqrt(size)))
        queries = self.op(node, "Mul", [queries, scalar(scale, dtype)])
        logits = self.op(node, "MatMul", [queries, self.op(node, "Transpose", [keys], perm=[0, 1, 3, 2])])
        if softcap := float_attribute(node, "softcap", 0.0):
            logits = self.writer.soft_cap(node, logits, softcap, dtype, name_prefix=NODE_NAME_PREFIX)
        logits = self.reshape(node, logits, 0, spec.kv_heads, queries_per_head, count, -1)
        visible = self.unsqueeze(node, self._visible_to_window(layer, positions), 2)
        masked = self.op(node, "Where", [visible, logits, scalar(-np.inf, dtype)], dtype)
        weights = self.op(node, "Softmax", [masked], axis=-1)
        weights_fp32 = weights if dtype == _FLOAT else self.cast(node, weights, _FLOAT)
        return self.op(node, "ReduceMean", [weights_fp32, integers(2, 3)], _FLOAT, keepdims=0)

    def _visible_to_window(self, layer: StaticCacheLayer, positions: ir.Value) -> ir.Value:
        """Return (batch, kv_heads, window, slots + seq) bool: the slots and tokens that the window's queries see."""
        node, query = layer.attention, self._last_queries().position
        key = self.unsqueeze(node, positions, 2)
        return self.visible_positions(node, key, query=query, window=layer.spec.window, has_free_slots=True)

    def _last_queries(self) -> _Window:
        """Return the last queries of each row."""
        if self._window is None:
            before = self.insertion_point
            size = self.config.recent_window
            count = self.token_count()
            offset = self.writer.constant(np.arange(size) - size, _INT64)
            indices = self.op(before, "Max", [self.op(before, "Add", [count, offset]), self.int64(0)])
            position = self.op(before, "GatherElements", [self.new_position, indices], axis=1)
            first = self.slice(before, position, 0, 1, axis=1)
            is_full = self.op(before, "GreaterOrEqual", [count, self.int64(size)], _BOOL)
            self._window = _Window(
                token_indices=indices,
                position=self.unsqueeze(before, position, 1, 3),
                first_position=self.unsqueeze(before, first, 2),
                is_full=self.unsqueeze(before, is_full, 2),
            )
        return self._window

    def _fillers(self, heads: int) -> tuple[ir.Value, ir.Value]:
        """Return (batch, kv_heads, append_slots) float32 and int32: the priorities and positions of the fillers."""
        before, scalar, window = self.insertion_point, self.writer.scalar, self._last_queries()
        shape = (1, heads, self.compaction.append_slots)
        fillers: list[ir.Value] = []
        for name, if_compacted, otherwise, dtype in (
            ("filler priority", _FLOAT32_MAX, 0.0, _FLOAT),
            ("filler position", _FILLER_POSITION, -1, _INT32),
        ):
            choices = [window.is_full, scalar(if_compacted, dtype), scalar(otherwise, dtype)]

            def make(choices: list[ir.Value] = choices, dtype: ir.DataType = dtype) -> ir.Value:
                return self.expand(before, self.op(before, "Where", choices, dtype), *shape)

            fillers.append(self.shared((name, heads), make))
        return fillers[0], fillers[1]
