"""The clock of a decoder with fixed caches: how many tokens each sequence has seen is a state, and the rest follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import Writer
from ryzen_passes.attention.masks import low
from ryzen_passes.kv.recognition.decoder import Clock
from ryzen_passes.kv.states import States

Dim = int | ir.SymbolicDim

LENGTH = "length"
"""The state of the clock."""

STEM = "kv"
"""How the names of what the kv passes write begin."""

_INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class Time:
    """What tells the time in the graph, all int64."""

    mask: ir.Value
    """(batch, seq): 1 for each token of the step; the rest of a row is padding."""
    length: ir.Value
    """(batch,): the tokens seen before the step."""
    positions: ir.Value
    """(batch, seq): where each token stands; padding behind a row's tokens stands where its last one does."""


def write_time(write: Writer, states: States, before: ir.Node, batch: Dim, seq: Dim, mask_name: str, most: int) -> Time:
    """Add the mask, the state and the nodes that tell the time, in front of `before`."""
    mask = ir.Value(name=write.names.new(mask_name), type=ir.TensorType(_INT64), shape=ir.Shape((batch, seq)))
    write.graph.inputs.append(mask)
    write.types[mask] = _INT64
    length = states.begin(LENGTH, _INT64, ir.Shape((batch,)), low=0, high=most)
    ones = write.integers(1)
    count = write.op(before, "ReduceSum", [mask, ones], {"keepdims": 0}, shape=ir.Shape((batch,)), stem=STEM)
    following = write.op(before, "Add", [length, count], shape=ir.Shape((batch,)), stem=STEM)
    states.end(LENGTH, following, in_place=False)
    rank = write.op(before, "CumSum", [mask, write.number(1, _INT64)], shape=ir.Shape((batch, seq)), stem=STEM)
    since = write.op(before, "Unsqueeze", [length, ones], shape=ir.Shape((batch, 1)), stem=STEM)
    one_more = write.op(before, "Add", [since, rank], shape=ir.Shape((batch, seq)), stem=STEM)
    at = write.op(before, "Sub", [one_more, write.number(1, _INT64)], shape=ir.Shape((batch, seq)), stem=STEM)
    positions = write.op(before, "Max", [at, write.number(0, _INT64)], shape=ir.Shape((batch, seq)), stem=STEM)
    positions.name = write.names.new("kv_positions")
    return Time(mask=mask, length=length, positions=positions)


def set_clock(write: Writer, before: ir.Node, clock: Clock, time: Time) -> None:
    """Let what read `clock` read the positions of `time`, in its shape and type."""
    value = time.positions
    axes = [axis for axis in range(max(clock.rank, 2)) if axis not in (0, max(clock.axis, 1))]
    if axes:
        value = write.op(before, "Unsqueeze", [value, write.integers(*axes)], stem=STEM)
    clock.value.replace_all_uses_with(write_as(write, before, value, write.types[clock.value]))


def write_as(write: Writer, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return `value` as `dtype`."""
    if write.types[value] == dtype:
        return value
    return write.op(before, "Cast", [value], {"to": int(dtype)}, dtype=dtype, stem=STEM)


def seen_slots(write: Writer, before: ir.Node, time: Time, slots: int, window: int | None) -> ir.Value:
    """Return (batch, 1, seq, slots) bool: which slots a query sees where slot n holds the token at position n."""
    number = write.constant(np.arange(slots), _INT64)
    query = write.op(before, "Unsqueeze", [time.positions, write.integers(1, 3)], stem=STEM)
    seen = write.op(before, "LessOrEqual", [number, query], dtype=ir.DataType.BOOL, stem=STEM)
    if window is not None and window < slots:
        since = write.op(before, "Sub", [query, write.number(window, _INT64)], stem=STEM)
        recent = write.op(before, "Greater", [number, since], dtype=ir.DataType.BOOL, stem=STEM)
        seen = write.op(before, "And", [seen, recent], stem=STEM)
    batch, seq = (time.positions.shape or (None, None))[:2]
    seen.shape = ir.Shape((batch, 1, seq, slots))
    return seen


def sloped(
    write: Writer, before: ir.Node, time: Time, seen: ir.Value, slots: int, slopes: Sequence[float], dtype: ir.DataType
) -> ir.Value:
    """Return (batch, heads, seq, slots): what is added to the scores of keys that are `seen`, the lowest number for others.

    That is a head's slope times how far the key is behind the query, negative, so that what is near is exact in few bits.
    """
    batch, seq = (time.positions.shape or (None, None))[:2]
    query = write.op(before, "Unsqueeze", [time.positions, write.integers(1, 3)], stem=STEM)
    number = write.constant(np.arange(slots), _INT64)
    behind = write.op(before, "Sub", [number, query], shape=ir.Shape((batch, 1, seq, slots)), stem=STEM)
    wide = write_as(write, before, behind, ir.DataType.FLOAT)
    steep = write.constant(np.reshape(slopes, (1, len(slopes), 1, 1)), ir.DataType.FLOAT)
    shape = ir.Shape((batch, len(slopes), seq, slots))
    bias = write_as(write, before, write.op(before, "Mul", [wide, steep], shape=shape, stem=STEM), dtype)
    return write.op(before, "Where", [seen, bias, write.number(low(dtype), dtype)], dtype=dtype, shape=shape, stem=STEM)
