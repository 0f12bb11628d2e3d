"""Recognition of models that normalize their keys (QK-norm), as Qwen 3, Gemma 3 and OLMo 2 do."""

from __future__ import annotations

import onnx_ir as ir

_NORMALIZATIONS = frozenset(
    {
        "LayerNormalization",
        "LpNormalization",
        "ReduceL2",
        "ReduceMean",
        "ReduceSumSquare",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
    }
)
"""Ops that normalize a vector, or compute what it is divided by."""
_PROJECTIONS = frozenset({"Conv", "Einsum", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits", "QLinearMatMul"})
"""Ops that compute keys from the hidden state, before which its own normalization comes."""
_NO_DATA = frozenset({"Shape", "Size"})
"""Ops whose results do not depend on the elements of their operand."""


def are_keys_normalized(keys: ir.Value) -> bool:
    """Return whether `keys`, which a step appends to its cache, are normalized after they are projected."""
    pending, seen = [keys], {keys}
    while pending:
        node = pending.pop().producer()
        if node is None or node.op_type in _PROJECTIONS | _NO_DATA:
            continue
        if node.op_type in _NORMALIZATIONS:
            return True
        operands = [operand for operand in node.inputs if operand is not None and operand not in seen]
        seen.update(operands)
        pending += operands
    return False
