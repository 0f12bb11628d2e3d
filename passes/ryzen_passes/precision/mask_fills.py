"""Mask fill values: clamp values like -1e9 and -3.4e38, which represent minus infinity, to stay finite in half precision."""

from __future__ import annotations

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_tensor
from ryzen_compile.ir.analysis.element_types import is_standard_op
from ryzen_compile.ir.analysis.op_traits import ATTENTION_OPS, CONVERSION_OPS, LAYOUT_OPS
from ryzen_compile.ir.lazy_cast import LazyCastTensor
from ryzen_passes.precision.rules import HalfType

_PROPAGATING_OPS = (
    LAYOUT_OPS
    | CONVERSION_OPS
    | frozenset("Where Add Sub Mul Concat Gather Tile Pad Max Min Clip ScatterND ScatterElements Split Trilu".split())
)
_MASK_INPUTS = {"Softmax": {0}, "LogSoftmax": {0}, **dict.fromkeys(ATTENTION_OPS, {3}), "Clip": {1, 2}}
"""Op type to the inputs where a fill value may end: a very low score has no weight there, a very large bound has no effect."""


def clamp_mask_fills(
    magnitudes: dict[ir.Value, float], half: HalfType, threshold: float
) -> tuple[frozenset[ir.Value], list[str]]:
    """Clamp mask fill values of a magnitude above `threshold` to the range of `half`, in place.

    A constant is a fill value if everything computed from it, by ops that move, select or add, ends in a softmax, in the mask
    of an attention or as a bound of Clip. It is clamped to half of the largest value of the type, so that the sum of two fill
    values and any scores is finite: a fully masked row returns an average, as in fp32, not NaN. Infinities do not change.

    `magnitudes` has the largest finite magnitude of each fp32 constant and is updated. Return the tensors that hold fill
    values, and the names of the constants that were clamped.
    """
    bound = half.max / 2
    holders: set[ir.Value] = set()
    clamped: list[str] = []
    for value, magnitude in magnitudes.items():
        if magnitude <= threshold or (derived := _mask_fill_holders(value)) is None:
            continue
        holders |= derived
        if magnitude > bound and (tensor := constant_tensor(value)) is not None:
            _replace_constant(value, LazyCastTensor(tensor, ir.DataType.FLOAT, bound=bound))
            magnitudes[value] = bound
            clamped.append(value.name or "")
    return frozenset(holders), clamped


def _mask_fill_holders(value: ir.Value) -> set[ir.Value] | None:
    """Return `value` and all tensors derived from it; None if one of them is used where a fill value may not end."""
    holders, worklist = {value}, [value]
    while worklist:
        holder = worklist.pop()
        if holder.is_graph_output():
            return None
        for node, index in holder.uses():
            if index in _MASK_INPUTS.get(node.op_type, ()):
                continue
            if not is_standard_op(node) or node.op_type not in _PROPAGATING_OPS:
                return None
            for output in node.outputs:
                if output not in holders:
                    holders.add(output)
                    worklist.append(output)
    return holders


def _replace_constant(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    node = value.producer()
    if node is None:
        value.const_value = tensor
        return
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", tensor)
    value.const_value = None
