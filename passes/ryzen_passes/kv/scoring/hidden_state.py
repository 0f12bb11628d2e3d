"""Find the hidden state from which the values of an attention layer are projected."""

from __future__ import annotations

import onnx_ir as ir

from ryzen_compile.ir.analysis.op_traits import CONVERSION_OPS, LAYOUT_OPS

_PASS_THROUGH_OPS = LAYOUT_OPS | CONVERSION_OPS | {"Gather", "Split"}
_MAX_DEPTH = 12


def find_hidden_state(value: ir.Value) -> ir.Value | None:
    """Return the hidden state (batch, seq, width) whose product with constant weights is `value`, the new values of a layer.

    Data movement nodes and a bias may lie between the product and `value`. Returns None if the pattern does not match.
    """
    current: ir.Value | None = value
    for _ in range(_MAX_DEPTH):
        node = current.producer() if current is not None else None
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in _PASS_THROUGH_OPS:
            current = node.inputs[0]
        elif node.op_type == "Add":
            variable_inputs = [operand for operand in node.inputs if operand is not None and operand.const_value is None]
            if len(variable_inputs) != 1:
                return None
            current = variable_inputs[0]
        elif node.op_type == "MatMul":
            hidden, weight = node.inputs[0], node.inputs[1]
            is_product = hidden is not None and hidden.const_value is None and weight is not None and _is_constant(weight)
            return hidden if is_product and hidden is not None and (hidden.shape is None or len(hidden.shape) == 3) else None
        else:
            return None
    return None


def _is_constant(weight: ir.Value) -> bool:
    """Return whether `weight` is a constant or is computed from constants only, such as dequantized weights."""
    pending = [weight]
    for _ in range(_MAX_DEPTH):
        if not pending:
            return True
        value = pending.pop()
        if value.const_value is not None:
            continue
        node = value.producer()
        if node is None:
            return False
        pending += [operand for operand in node.inputs if operand is not None]
    return not pending
