"""Write the position tensors of a step, and attention masks from positions.

A state `length` counts the tokens of each sequence; positions and masks are computed from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import NodeBuilder
from ryzen_passes.attention_fusion import finite_mask_value
from ryzen_passes.kv.recognition.recognized_decoder import PositionTensor
from ryzen_passes.kv.state_editor import StateEditor

GraphDim = int | ir.SymbolicDim

LENGTH_STATE = "length"
"""The name of the state that holds the number of tokens that each sequence has seen."""

NODE_NAME_PREFIX = "kv"
"""The prefix of the names of all nodes that the kv passes write."""

_INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class StepPositions:
    """The tensors that hold the positions of a step, all int64."""

    mask: ir.Value
    """(batch, seq): 1 for each token of the step; the rest of a row is padding."""
    length: ir.Value
    """(batch,): the number of tokens before the step."""
    positions: ir.Value
    """(batch, seq): the position of each token; padding has the position of the last token of its row."""


def write_step_positions(
    writer: NodeBuilder, states: StateEditor, before: ir.Node, batch: GraphDim, seq: GraphDim, mask_name: str, max_length: int
) -> StepPositions:
    """Add the mask input, the length state and the nodes that compute positions, in front of `before`.

    `max_length` is the largest length before a step.
    """
    mask = ir.Value(name=writer.names.allocate(mask_name), type=ir.TensorType(_INT64), shape=ir.Shape((batch, seq)))
    writer.graph.inputs.append(mask)
    writer.types[mask] = _INT64
    length = states.add_input(LENGTH_STATE, _INT64, ir.Shape((batch,)), low=0, high=max_length)
    axis_1 = writer.int64_vector(1)
    count = writer.op(
        before, "ReduceSum", [mask, axis_1], {"keepdims": 0}, shape=ir.Shape((batch,)), name_prefix=NODE_NAME_PREFIX
    )
    next_length = writer.op(before, "Add", [length, count], shape=ir.Shape((batch,)), name_prefix=NODE_NAME_PREFIX)
    states.set_output(LENGTH_STATE, next_length, in_place=False)
    rank = writer.op(
        before, "CumSum", [mask, writer.scalar(1, _INT64)], shape=ir.Shape((batch, seq)), name_prefix=NODE_NAME_PREFIX
    )
    length_column = writer.op(before, "Unsqueeze", [length, axis_1], shape=ir.Shape((batch, 1)), name_prefix=NODE_NAME_PREFIX)
    position_plus_one = writer.op(
        before, "Add", [length_column, rank], shape=ir.Shape((batch, seq)), name_prefix=NODE_NAME_PREFIX
    )
    unclamped = writer.op(
        before, "Sub", [position_plus_one, writer.scalar(1, _INT64)], shape=ir.Shape((batch, seq)), name_prefix=NODE_NAME_PREFIX
    )
    positions = writer.op(
        before, "Max", [unclamped, writer.scalar(0, _INT64)], shape=ir.Shape((batch, seq)), name_prefix=NODE_NAME_PREFIX
    )
    positions.name = writer.names.allocate("kv_positions")
    return StepPositions(mask=mask, length=length, positions=positions)


def replace_position_input(
    writer: NodeBuilder, before: ir.Node, position_input: PositionTensor, step_positions: StepPositions
) -> None:
    """Replace `position_input` by the positions of the step, in the same rank and element type."""
    value = step_positions.positions
    axes = [axis for axis in range(max(position_input.rank, 2)) if axis not in (0, max(position_input.axis, 1))]
    if axes:
        value = writer.op(before, "Unsqueeze", [value, writer.int64_vector(*axes)], name_prefix=NODE_NAME_PREFIX)
    position_input.value.replace_all_uses_with(cast_to(writer, before, value, writer.types[position_input.value]))


def cast_to(writer: NodeBuilder, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return `value` cast to `dtype`, or `value` itself if it has that element type."""
    if writer.types[value] == dtype:
        return value
    return writer.op(before, "Cast", [value], {"to": int(dtype)}, dtype=dtype, name_prefix=NODE_NAME_PREFIX)


def window_start(writer: NodeBuilder, before: ir.Node, query: ir.Value, window: int | None) -> ir.Value | None:
    """Return the last position outside the attention window of each query, or None if the window is unlimited.

    `query` holds the positions of the queries; a query sees its own position and the `window` - 1 positions before it.
    """
    if window is None:
        return None
    return writer.op(before, "Sub", [query, writer.scalar(window, writer.types[query])], name_prefix=NODE_NAME_PREFIX)


def visible_positions(
    writer: NodeBuilder,
    before: ir.Node,
    key: ir.Value,
    *,
    query: ir.Value | None = None,
    start: ir.Value | None = None,
    has_free_slots: bool = False,
) -> ir.Value:
    """Return bool, broadcast over the shapes of its inputs: whether queries see the keys at the positions `key`.

    A key is visible if its position is at most `query` and greater than `start`, as returned by `window_start`; None omits a
    condition, and at least one is required. With `has_free_slots` a negative position marks a free slot, which is not visible.
    """
    conditions: list[tuple[str, ir.Value]] = []
    if has_free_slots:
        conditions.append(("GreaterOrEqual", writer.scalar(0, writer.types[key])))
    if query is not None:
        conditions.append(("LessOrEqual", query))
    if start is not None:
        conditions.append(("Greater", start))
    visible: ir.Value | None = None
    for op_type, bound in conditions:
        condition = writer.op(before, op_type, [key, bound], dtype=ir.DataType.BOOL, name_prefix=NODE_NAME_PREFIX)
        if visible is not None:
            condition = writer.op(before, "And", [visible, condition], name_prefix=NODE_NAME_PREFIX)
        visible = condition
    assert visible is not None
    return visible


def visible_slots(
    writer: NodeBuilder, before: ir.Node, step_positions: StepPositions, slots: int, window: int | None
) -> ir.Value:
    """Return (batch, 1, seq, slots) bool: the slots that each query sees if slot n holds the token at position n."""
    slot = writer.constant(np.arange(slots), _INT64)
    query = writer.op(before, "Unsqueeze", [step_positions.positions, writer.int64_vector(1, 3)], name_prefix=NODE_NAME_PREFIX)
    start = window_start(writer, before, query, window if window is not None and window < slots else None)
    visible = visible_positions(writer, before, slot, query=query, start=start)
    batch, seq = (step_positions.positions.shape or (None, None))[:2]
    visible.shape = ir.Shape((batch, 1, seq, slots))
    return visible


def alibi_bias(
    writer: NodeBuilder,
    before: ir.Node,
    step_positions: StepPositions,
    visible: ir.Value,
    slots: int,
    slopes: Sequence[float],
    dtype: ir.DataType,
) -> ir.Value:
    """Return (batch, heads, seq, slots): the bias of the attention scores, with the lowest finite value where not `visible`.

    The bias is the slope of the head times the negative distance from query to key, so that near keys have small magnitudes,
    which half precision represents exactly.
    """
    batch, seq = (step_positions.positions.shape or (None, None))[:2]
    query = writer.op(before, "Unsqueeze", [step_positions.positions, writer.int64_vector(1, 3)], name_prefix=NODE_NAME_PREFIX)
    slot = writer.constant(np.arange(slots), _INT64)
    offset = writer.op(before, "Sub", [slot, query], shape=ir.Shape((batch, 1, seq, slots)), name_prefix=NODE_NAME_PREFIX)
    offset_fp32 = cast_to(writer, before, offset, ir.DataType.FLOAT)
    slope = writer.constant(np.reshape(slopes, (1, len(slopes), 1, 1)), ir.DataType.FLOAT)
    shape = ir.Shape((batch, len(slopes), seq, slots))
    bias_fp32 = writer.op(before, "Mul", [offset_fp32, slope], shape=shape, name_prefix=NODE_NAME_PREFIX)
    bias = cast_to(writer, before, bias_fp32, dtype)
    return writer.op(
        before,
        "Where",
        [visible, bias, writer.scalar(finite_mask_value(dtype), dtype)],
        dtype=dtype,
        shape=shape,
        name_prefix=NODE_NAME_PREFIX,
    )
