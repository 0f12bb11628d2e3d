"""The clock of a decoder with fixed caches: how many tokens each sequence has seen is a state, and the rest follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import NodeBuilder
from ryzen_passes.attention.masks import finite_mask_value
from ryzen_passes.kv.recognition.recognized_decoder import PositionTensor
from ryzen_passes.kv.state_editor import StateEditor

GraphDim = int | ir.SymbolicDim

LENGTH_STATE = "length"
"""The state of the clock."""

NODE_NAME_PREFIX = "kv"
"""How the names of what the kv passes write begin."""

_INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class StepPositions:
    """What tells the time in the graph, all int64."""

    mask: ir.Value
    """(batch, seq): 1 for each token of the step; the rest of a row is padding."""
    length: ir.Value
    """(batch,): the tokens seen before the step."""
    positions: ir.Value
    """(batch, seq): where each token stands; padding behind a row's tokens stands where its last one does."""


def write_step_positions(
    writer: NodeBuilder, states: StateEditor, before: ir.Node, batch: GraphDim, seq: GraphDim, mask_name: str, max_length: int
) -> StepPositions:
    """Add the mask, the state and the nodes that tell the time, in front of `before`."""
    mask = ir.Value(name=writer.names.allocate(mask_name), type=ir.TensorType(_INT64), shape=ir.Shape((batch, seq)))
    writer.graph.inputs.append(mask)
    writer.types[mask] = _INT64
    length = states.add_input(LENGTH_STATE, _INT64, ir.Shape((batch,)), low=0, high=max_length)
    ones = writer.int64_vector(1)
    count = writer.op(
        before, "ReduceSum", [mask, ones], {"keepdims": 0}, shape=ir.Shape((batch,)), name_prefix=NODE_NAME_PREFIX
    )
    following = writer.op(before, "Add", [length, count], shape=ir.Shape((batch,)), name_prefix=NODE_NAME_PREFIX)
    states.set_output(LENGTH_STATE, following, in_place=False)
    rank = writer.op(
        before, "CumSum", [mask, writer.scalar(1, _INT64)], shape=ir.Shape((batch, seq)), name_prefix=NODE_NAME_PREFIX
    )
    since = writer.op(before, "Unsqueeze", [length, ones], shape=ir.Shape((batch, 1)), name_prefix=NODE_NAME_PREFIX)
    one_more = writer.op(before, "Add", [since, rank], shape=ir.Shape((batch, seq)), name_prefix=NODE_NAME_PREFIX)
    at = writer.op(
        before, "Sub", [one_more, writer.scalar(1, _INT64)], shape=ir.Shape((batch, seq)), name_prefix=NODE_NAME_PREFIX
    )
    positions = writer.op(
        before, "Max", [at, writer.scalar(0, _INT64)], shape=ir.Shape((batch, seq)), name_prefix=NODE_NAME_PREFIX
    )
    positions.name = writer.names.allocate("kv_positions")
    return StepPositions(mask=mask, length=length, positions=positions)


def replace_position_input(
    writer: NodeBuilder, before: ir.Node, position_input: PositionTensor, step_positions: StepPositions
) -> None:
    """Let what read `clock` read the positions of `time`, in its shape and type."""
    value = step_positions.positions
    axes = [axis for axis in range(max(position_input.rank, 2)) if axis not in (0, max(position_input.axis, 1))]
    if axes:
        value = writer.op(before, "Unsqueeze", [value, writer.int64_vector(*axes)], name_prefix=NODE_NAME_PREFIX)
    position_input.value.replace_all_uses_with(cast_to(writer, before, value, writer.types[position_input.value]))


def cast_to(writer: NodeBuilder, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return `value` as `dtype`."""
    if writer.types[value] == dtype:
        return value
    return writer.op(before, "Cast", [value], {"to": int(dtype)}, dtype=dtype, name_prefix=NODE_NAME_PREFIX)


def visible_slots(
    writer: NodeBuilder, before: ir.Node, step_positions: StepPositions, slots: int, window: int | None
) -> ir.Value:
    """Return (batch, 1, seq, slots) bool: which slots a query sees where slot n holds the token at position n."""
    number = writer.constant(np.arange(slots), _INT64)
    query = writer.op(before, "Unsqueeze", [step_positions.positions, writer.int64_vector(1, 3)], name_prefix=NODE_NAME_PREFIX)
    seen = writer.op(before, "LessOrEqual", [number, query], dtype=ir.DataType.BOOL, name_prefix=NODE_NAME_PREFIX)
    if window is not None and window < slots:
        since = writer.op(before, "Sub", [query, writer.scalar(window, _INT64)], name_prefix=NODE_NAME_PREFIX)
        recent = writer.op(before, "Greater", [number, since], dtype=ir.DataType.BOOL, name_prefix=NODE_NAME_PREFIX)
        seen = writer.op(before, "And", [seen, recent], name_prefix=NODE_NAME_PREFIX)
    batch, seq = (step_positions.positions.shape or (None, None))[:2]
    seen.shape = ir.Shape((batch, 1, seq, slots))
    return seen


def alibi_bias(
    writer: NodeBuilder,
    before: ir.Node,
    step_positions: StepPositions,
    visible: ir.Value,
    slots: int,
    slopes: Sequence[float],
    dtype: ir.DataType,
) -> ir.Value:
    """Return (batch, heads, seq, slots): what is added to the scores of keys that are `seen`, the lowest number for others.

    That is a head's slope times how far the key is behind the query, negative, so that what is near is exact in few bits.
    """
    batch, seq = (step_positions.positions.shape or (None, None))[:2]
    query = writer.op(before, "Unsqueeze", [step_positions.positions, writer.int64_vector(1, 3)], name_prefix=NODE_NAME_PREFIX)
    number = writer.constant(np.arange(slots), _INT64)
    behind = writer.op(before, "Sub", [number, query], shape=ir.Shape((batch, 1, seq, slots)), name_prefix=NODE_NAME_PREFIX)
    wide = cast_to(writer, before, behind, ir.DataType.FLOAT)
    steep = writer.constant(np.reshape(slopes, (1, len(slopes), 1, 1)), ir.DataType.FLOAT)
    shape = ir.Shape((batch, len(slopes), seq, slots))
    bias = cast_to(writer, before, writer.op(before, "Mul", [wide, steep], shape=shape, name_prefix=NODE_NAME_PREFIX), dtype)
    return writer.op(
        before,
        "Where",
        [visible, bias, writer.scalar(finite_mask_value(dtype), dtype)],
        dtype=dtype,
        shape=shape,
        name_prefix=NODE_NAME_PREFIX,
    )
