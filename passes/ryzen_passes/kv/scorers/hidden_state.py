"""The hidden state that the values of a layer are a product of."""

from __future__ import annotations

import onnx_ir as ir

_DATA_MOVEMENT_OPS = frozenset({"Reshape", "Transpose", "Identity", "Cast", "Split", "Slice", "Squeeze", "Unsqueeze", "Gather"})
_MAX_DEPTH = 12


def find_hidden_state(value: ir.Value) -> ir.Value | None:
    """Return (batch, seq, width): the hidden state whose product with weights `value`, the new values of a layer, is.

    Between the product and `value` may stand what moves numbers about, and a bias. None where it is not so.
    """
    at: ir.Value | None = value
    for _ in range(_MAX_DEPTH):
        node = at.producer() if at is not None else None
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in _DATA_MOVEMENT_OPS:
            at = node.inputs[0]
        elif node.op_type == "Add":
            moving = [one for one in node.inputs if one is not None and one.const_value is None]
            if len(moving) != 1:
                return None
            at = moving[0]
        elif node.op_type == "MatMul":
            hidden, weight = node.inputs[0], node.inputs[1]
            is_product = hidden is not None and hidden.const_value is None and weight is not None and _is_constant(weight)
            return hidden if is_product and hidden is not None and (hidden.shape is None or len(hidden.shape) == 3) else None
        else:
            return None
    return None


def _is_constant(weight: ir.Value) -> bool:
    """Whether `weight` holds numbers, or what makes it of numbers alone, as dequantised weights are."""
    waiting = [weight]
    for _ in range(_MAX_DEPTH):
        if not waiting:
            return True
        one = waiting.pop()
        if one.const_value is not None:
            continue
        node = one.producer()
        if node is None:
            return False
        waiting += [given for given in node.inputs if given is not None]
    return not waiting
