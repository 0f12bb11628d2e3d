# mypy: ignore-errors
"""Reference of TokenEnergy in standard ONNX ops."""

from onnxscript import FLOAT, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

SMALLEST_SIZE = 2.0**-64
LARGEST_SIZE = 2.0**64


@script(Opset("ryzen", 1), default_opset=op)
def TokenEnergy(metric, size, margin: float, alpha: float):
    """Compute the energy of every token; the declaration in `op.py` defines the semantics."""
    last = op.Constant(value_ints=[-1])
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    threshold = op.Constant(value_float=margin)

    # Cosines of every pair.
    rows = op.Cast(metric, to=FLOAT.dtype)
    square = op.ReduceSum(op.Mul(rows, rows), last, keepdims=1)
    fine = op.Less(square, op.Constant(value_float=1e38))
    scale = op.Where(op.Greater(square, op.Constant(value_float=1e-30)), op.Div(one, op.Sqrt(square)), zero)
    rows = op.Where(fine, rows, zero)
    cosine = op.Mul(op.Mul(op.MatMul(rows, op.Transpose(rows, perm=[0, 2, 1])), scale), op.Transpose(scale, perm=[0, 2, 1]))
    cosine = op.Where(op.And(fine, op.Transpose(fine, perm=[0, 2, 1])), cosine, op.Constant(value_float=-2.0))

    # The mean over the other real tokens.
    soft = op.Mul(op.Constant(value_float=alpha), op.Sub(op.Exp(op.Sub(cosine, threshold)), one))
    worth = op.Where(op.GreaterOrEqual(cosine, threshold), cosine, soft)
    real = op.And(
        op.GreaterOrEqual(size, op.Constant(value_float=SMALLEST_SIZE)),
        op.LessOrEqual(size, op.Constant(value_float=LARGEST_SIZE)),
    )
    tokens = op.Squeeze(op.Shape(size, start=1, end=2))
    index = op.Range(op.Constant(value_int=0), tokens, op.Constant(value_int=1))
    other = op.Not(op.Equal(op.Unsqueeze(index, [0]), op.Unsqueeze(index, [1])))
    counted = op.And(op.Unsqueeze(real, [1]), op.Unsqueeze(other, [0]))
    total = op.ReduceSum(op.Where(counted, worth, zero), last, keepdims=0)
    others = op.Sub(op.ReduceSum(op.Cast(real, to=FLOAT.dtype), last, keepdims=1), one)
    mean = op.Div(total, op.Max(others, one))
    energy = op.Where(real, mean, op.Constant(value_float=2.0))
    return energy
