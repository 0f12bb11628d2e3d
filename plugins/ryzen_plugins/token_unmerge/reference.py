# mypy: ignore-errors
"""Reference of TokenUnmerge in standard ONNX ops."""

from onnxscript import INT64, script
from onnxscript import opset21 as op
from onnxscript.values import Opset


@script(Opset("ryzen", 1), default_opset=op)
def TokenUnmerge(y, target):
    """Copy the row of its slot to every token; the declaration in `op.py` defines the semantics."""
    end = op.Sub(op.Shape(y, start=1, end=2), op.Constant(value_ints=[1]))
    slot = op.Max(op.Min(op.Cast(target, to=INT64.dtype), end), op.Constant(value_ints=[0]))
    x = op.GatherND(y, op.Unsqueeze(slot, [2]), batch_dims=1)
    return x
