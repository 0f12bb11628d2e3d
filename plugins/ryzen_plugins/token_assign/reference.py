# mypy: ignore-errors
"""Reference of TokenAssign in standard ONNX ops."""

from onnxscript import INT64, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

LOWEST = -3.4028234663852886e38


@script(Opset("ryzen", 1), default_opset=op)
def TokenAssign(size, a, partner, similarity, slots):
    """Compute the slot of every token; the declaration in `op.py` defines the semantics."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    shape = op.Shape(size)
    merged = op.Squeeze(op.Sub(op.Shape(size, start=1, end=2), op.Shape(slots)))
    end = op.Sub(op.Shape(size, start=1, end=2), op.Constant(value_ints=[1]))
    tokens = op.Max(op.Min(op.Cast(a, to=INT64.dtype), end), op.Constant(value_ints=[0]))
    partners = op.Max(op.Min(op.Cast(partner, to=INT64.dtype), end), op.Constant(value_ints=[0]))

    # The merged pairs. TopK selects at least one pair; if none is to be merged, that pair keeps its own slot.
    lowest = op.Constant(value_float=LOWEST)
    alike = op.Where(op.IsNaN(similarity), lowest, op.Max(similarity, lowest))
    pairs = op.Squeeze(op.Shape(similarity, start=1, end=2))
    count = op.Max(op.Min(merged, pairs), one)
    highest, chosen = op.TopK(alike, op.Unsqueeze(count, [0]), axis=1, largest=1, sorted=1)
    rank = op.Range(zero, count, one)
    goes = op.Less(rank, merged)
    source = op.GatherElements(tokens, chosen, axis=1)
    leaves = op.Mul(op.Add(op.Mul(source, zero), one), op.Cast(goes, to=INT64.dtype))

    # The other tokens are numbered in sequence order.
    stays = op.ScatterElements(op.Expand(one, shape), source, op.Sub(one, leaves), axis=1)
    slot = op.Sub(op.CumSum(stays, one), one)
    own = op.GatherElements(slot, source, axis=1)
    theirs = op.GatherElements(slot, op.GatherElements(partners, chosen, axis=1), axis=1)
    target = op.Cast(op.ScatterElements(slot, source, op.Where(goes, theirs, own), axis=1), to=6)
    return target
