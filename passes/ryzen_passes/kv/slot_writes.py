"""Write the tokens of a step into cache slots, and record the tensors that determine the slots."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.ir.edit.builder import NodeBuilder, next_node
from ryzen_compile.spec.kv_cache import GatherWrite, ScatterWrite
from ryzen_passes.kv.static.step_positions import NODE_NAME_PREFIX


@dataclass(frozen=True)
class SlotAssignment:
    """The slots that the tokens of a step are written to."""

    slots: ir.Value
    """(batch, kv_heads, seq) int64: distinct slots, or the same slot for the same row."""
    is_written: ir.Value | None = None
    """(batch, 1 or kv_heads, 1 or seq) bool: where false the slot keeps its content; None: every slot is written."""
    token_indices: ir.Value | None = None
    """(batch, kv_heads, seq) int64: the token of the step written to each slot; None: token n to slot n of `slots`."""

    def to_spec(self) -> ScatterWrite:
        """Return the write to record for an assignment of the single token of a step, in token order."""
        assert self.is_written is not None
        assert self.token_indices is None
        return ScatterWrite(slots=self.slots.name or "", is_written=self.is_written.name or "")


@dataclass(frozen=True)
class SlotSources:
    """The token of a step that each slot takes."""

    token_indices: ir.Value
    """(batch, slots) int64: the token of the step; valid where `is_written` is false too."""
    is_written: ir.Value
    """(batch, slots) bool: where false the slot keeps its content."""

    def to_spec(self) -> GatherWrite:
        """Return the write to record."""
        return GatherWrite(token_indices=self.token_indices.name or "", is_written=self.is_written.name or "")


class SlotWriter:
    """Writes rows to cache slots, with ScatterElements or, for the tokens of each slot, with GatherElements."""

    def __init__(self, writer: NodeBuilder) -> None:
        self.writer = writer
        self._indices: dict[tuple[ir.Value, int], ir.Value] = {}
        self._conditions: dict[ir.Value, ir.Value] = {}
        self._sources: dict[tuple[SlotSources, int, int | None], tuple[ir.Value, ir.Value]] = {}

    def scatter(self, before: ir.Node, past: ir.Value, rows: ir.Value, assignment: SlotAssignment) -> ir.Value:
        """Return `past` (batch, kv_heads, slots, ...) with `rows` (batch, kv_heads, seq, ...) written to their slots."""
        indices = self.scatter_indices(past, assignment.slots)
        rows = self.merge_rows(before, past, rows, assignment)
        return self._op(before, "ScatterElements", [past, indices, rows], shape=past.shape, axis=2)

    def gather(self, before: ir.Node, past: ir.Value, rows: ir.Value, sources: SlotSources) -> tuple[ir.Value, ir.Value]:
        """Return the row of each slot, and `past` (batch, kv_heads, slots, ...) with these rows where `sources` write them.

        `rows` is (batch, kv_heads, seq, ...).
        """
        indices, condition = self._expanded_sources(past, sources)
        by_slot = self._op(before, "GatherElements", [rows, indices], axis=2)
        dtype = self.writer.types[past]
        return by_slot, self._op(before, "Where", [condition, by_slot, past], dtype=dtype, shape=past.shape)

    def _expanded_sources(self, past: ir.Value, sources: SlotSources) -> tuple[ir.Value, ir.Value]:
        """Return the token indices in the shape of `past`, and the condition in its rank."""
        assert past.shape is not None
        heads, size = past.shape[1], _vector_size(past)
        assert isinstance(heads, int)
        if (sources, heads, size) not in self._sources:
            nodes = list(self.writer.graph)
            last = max((sources.token_indices.producer(), sources.is_written.producer()), key=nodes.index)  # type: ignore[arg-type]
            early = next_node(self.writer.graph, last)
            axes, integers = (1,) if size is None else (1, 3), self.writer.int64_vector
            column, condition = (
                self._op(early, "Unsqueeze", [value, integers(*axes)]) for value in (sources.token_indices, sources.is_written)
            )
            dims = (1, heads, 1) if size is None else (1, heads, 1, size)
            self._sources[sources, heads, size] = self._op(early, "Expand", [column, integers(*dims)]), condition
        return self._sources[sources, heads, size]

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


def _vector_size(past: ir.Value) -> int | None:
    """Return the size of the last axis of a cache (batch, kv_heads, slots, size), None for (batch, kv_heads, slots)."""
    if past.shape is None or len(past.shape) != 4:
        return None
    size = past.shape[3]
    assert isinstance(size, int)
    return size
