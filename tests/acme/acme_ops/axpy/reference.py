# mypy: ignore-errors
"""Reference of AcmeAxpy in standard ONNX ops."""

from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import Opset


@script(Opset("acme", 1), default_opset=op)
def AcmeAxpy(x, y, factor: float):
    """Compute factor * x + y in float32."""
    wide = op.Add(op.Mul(op.Constant(value_float=factor), op.Cast(x, to=1)), op.Cast(y, to=1))
    z = op.CastLike(wide, x)
    return z
