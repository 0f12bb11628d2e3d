"""Fill values: the -1e9 and -3.4e38 of masks, which stand for minus infinity and must stay finite in half precision."""

from __future__ import annotations

import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import is_standard_op
from ryzen_compile.ir.lazy_cast import LazyCastTensor
from ryzen_passes.precision.rules import HalfType, constant_tensor

_PROPAGATING_OPS = frozenset(
    """Where Add Sub Mul Expand Unsqueeze Squeeze Reshape Flatten Cast Slice Concat Gather Tile Pad Transpose Identity Max
    Min Clip ScatterND ScatterElements Split Trilu""".split()
)
_MASK_INPUTS = {"Softmax": {0}, "LogSoftmax": {0}, "Attention": {3}, "TRT_Attention": {3}, "Clip": {1, 2}}
"""Where a fill value ends: what is far below all else counts as nothing there, what is far out bounds nothing."""


def clamp_mask_fills(
    magnitudes: dict[ir.Value, float], half: HalfType, threshold: float
) -> tuple[frozenset[ir.Value], list[str]]:
    """Pull fill values that are beyond `least` into range, in place; `sizes` are the magnitudes of the fp32 constants.

    A constant is a fill value where all that is computed from it, by ops that move, choose or add, ends in a softmax, in the
    mask of an attention or as a bound of Clip. It is pulled to half of the largest value of the type, so that the sum of two
    fill values and any scores is finite still: a row that is masked altogether gives an average as it does in fp32, not NaN.
    Infinities stay what they are.

    Returns the tensors that hold fill values, and the names of the constants that were changed; `sizes` follows.
    """
    bound = half.max / 2
    holders: set[ir.Value] = set()
    clamped: list[str] = []
    for value, size in magnitudes.items():
        if size <= threshold or (reached := _mask_fill_holders(value)) is None:
            continue
        holders |= reached
        if size > bound and (tensor := constant_tensor(value)) is not None:
            _replace_constant(value, LazyCastTensor(tensor, ir.DataType.FLOAT, bound=bound))
            magnitudes[value] = bound
            clamped.append(value.name or "")
    return frozenset(holders), clamped


def _mask_fill_holders(value: ir.Value) -> set[ir.Value] | None:
    """Return `value` and all tensors that hold what came from it, or None where it ends elsewhere than a fill value does."""
    found, waiting = {value}, [value]
    while waiting:
        held = waiting.pop()
        if held.is_graph_output():
            return None
        for node, index in held.uses():
            if index in _MASK_INPUTS.get(node.op_type, ()):
                continue
            if not is_standard_op(node) or node.op_type not in _PROPAGATING_OPS:
                return None
            for output in node.outputs:
                if output not in found:
                    found.add(output)
                    waiting.append(output)
    return found


def _replace_constant(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    node = value.producer()
    if node is None:
        value.const_value = tensor
        return
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", tensor)
    value.const_value = None
