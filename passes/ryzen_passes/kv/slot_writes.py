"""Write the tokens of a step into cache slots, and recognize how an earlier pass wrote them.

Caches are written in one of three ways: TensorScatter (kv-static), ScatterElements (kv-evict and kv-window, one token) or the
custom operator KVAppendEvict (kv-evict, any number of tokens, and TensorRT). kv-quant reads the slots of the tokens from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute
from ryzen_compile.ir.edit.builder import NodeBuilder
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticKVTensor
from ryzen_passes.kv.static.step_positions import NODE_NAME_PREFIX
from ryzen_plugins.kv_append_evict import KV_APPEND_EVICT

CacheWriteOp = Literal["TensorScatter", "ScatterElements", "KVAppendEvict"]


@dataclass(frozen=True)
class SlotAssignment:
    """The slots that the tokens of a step are written to."""

    slots: ir.Value
    """(batch, kv_heads, seq) int64: distinct slots, or the same slot for the same row."""
    is_written: ir.Value | None = None
    """(batch, 1 or kv_heads, 1 or seq) bool: where false the slot keeps its content; None: every slot is written."""
    token_indices: ir.Value | None = None
    """(batch, kv_heads, seq) int64: the token of the step written to each slot; None: token n to slot n of `slots`."""


class SlotWriter:
    """Writes rows to cache slots with ScatterElements, and recognizes what it wrote."""

    def __init__(self, writer: NodeBuilder) -> None:
        self.writer = writer
        self._indices: dict[tuple[ir.Value, int], ir.Value] = {}
        self._conditions: dict[ir.Value, ir.Value] = {}

    def scatter(self, before: ir.Node, past: ir.Value, rows: ir.Value, assignment: SlotAssignment) -> ir.Value:
        """Return `past` (batch, kv_heads, slots, ...) with `rows` (batch, kv_heads, seq, ...) written to their slots."""
        indices = self.scatter_indices(past, assignment.slots)
        rows = self.merge_rows(before, past, rows, assignment)
        return self._op(before, "ScatterElements", [past, indices, rows], shape=past.shape, axis=2)

    def merge_rows(self, before: ir.Node, past: ir.Value, rows: ir.Value, assignment: SlotAssignment) -> ir.Value:
        """Return the rows to write: `rows`, or the content of the slot in `past` where `is_written` is false."""
        if assignment.token_indices is not None:
            assert past.shape is not None and len(past.shape) == 3  # noqa: PT018
            rows = self._op(before, "GatherElements", [rows, assignment.token_indices], axis=2)
        if assignment.is_written is None:
            return rows
        content = self._op(before, "GatherElements", [past, self.scatter_indices(past, assignment.slots)], axis=2)
        condition = assignment.is_written
        if _vector_size(past) is not None:
            if condition not in self._conditions:
                early = next_node(self.writer.graph, condition.producer())
                self._conditions[condition] = self._op(early, "Unsqueeze", [condition, self.writer.int64_vector(3)])
            condition = self._conditions[condition]
        return self._op(before, "Where", [condition, rows, content], dtype=self.writer.types[past])

    def scatter_indices(self, past: ir.Value, slots: ir.Value) -> ir.Value:
        """Return `slots` (batch, kv_heads, seq), expanded to (batch, kv_heads, seq, size) if `past` holds vectors."""
        size = _vector_size(past)
        if size is None:
            return slots
        if (slots, size) not in self._indices:
            early = next_node(self.writer.graph, slots.producer())
            column = self._op(early, "Unsqueeze", [slots, self.writer.int64_vector(3)])
            self._indices[slots, size] = self._op(early, "Expand", [column, self.writer.int64_vector(1, 1, 1, size)])
        return self._indices[slots, size]

    def _op(
        self,
        before: ir.Node,
        op_type: str,
        inputs: list[ir.Value | None],
        *,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        **attributes: int,
    ) -> ir.Value:
        return self.writer.op(before, op_type, inputs, attributes, dtype=dtype, shape=shape, name_prefix=NODE_NAME_PREFIX)

    @staticmethod
    def match(tensor: StaticKVTensor) -> SlotAssignment | None:
        """Return the assignment with which `scatter` wrote the single token of a step to `tensor`; None if it did not."""
        scatter = tensor.cache.producer()
        if scatter is None or scatter.op_type != "ScatterElements":
            return None
        past, indices, rows = scatter.inputs
        if past is not tensor.past or int_attribute(scatter, "axis", 0) != 2 or indices is None or rows is None:
            return None
        expand, where = indices.producer(), rows.producer()
        if expand is None or where is None or (expand.op_type, where.op_type) != ("Expand", "Where"):
            return None
        slots, is_written = (_unsqueezed(node.inputs[0]) for node in (expand, where))
        if slots is None or is_written is None or where.inputs[1] is not tensor.update:
            return None
        return SlotAssignment(slots=slots, is_written=is_written)


def cache_write_op(layer: StaticCacheLayer) -> CacheWriteOp:
    """Return the operator that writes the caches of `layer`. Raises PatternNotMatched if it is not one of the three."""
    key, value = (_cache_write_op(tensor) for tensor in (layer.key, layer.value))
    if key is None or key != value:
        raise PatternNotMatched(
            "the caches are not written by kv-static or kv-evict",
            layer.spec.attention_node,
            hint="list kv-quant directly after kv-static or kv-evict",
        )
    return key


def _cache_write_op(tensor: StaticKVTensor) -> CacheWriteOp | None:
    node = tensor.cache.producer()
    inputs = list(node.inputs) if node is not None else []
    if node is None or tensor.past not in inputs:
        return None
    if node.op_type == "TensorScatter" and inputs[:2] == [tensor.past, tensor.update]:
        return "TensorScatter" if int_attribute(node, "axis", -2) in (-2, 2) else None
    if node.op_type == KV_APPEND_EVICT.name and tensor.update in inputs:
        return "KVAppendEvict"
    return "ScatterElements" if SlotWriter.match(tensor) is not None else None


def next_node(graph: ir.Graph, node: ir.Node | None) -> ir.Node:
    """Return the node after `node` in the order of the graph, or the first node if `node` is None."""
    nodes = list(graph)
    return nodes[nodes.index(node) + 1 if node is not None else 0]


def _vector_size(past: ir.Value) -> int | None:
    """Return the size of the last axis of a cache (batch, kv_heads, slots, size), None for (batch, kv_heads, slots)."""
    if past.shape is None or len(past.shape) != 4:
        return None
    size = past.shape[3]
    assert isinstance(size, int)
    return size


def _unsqueezed(value: ir.Value | None) -> ir.Value | None:
    """Return the input of the Unsqueeze that produces `value`, None if another operator does."""
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == "Unsqueeze" else None
