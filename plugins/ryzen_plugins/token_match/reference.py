# mypy: ignore-errors
"""Reference of TokenMatch in standard ONNX ops."""

from onnxscript import FLOAT, INT64, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

SMALLEST_SIZE = 2.0**-64
LARGEST_SIZE = 2.0**64


@script(Opset("ryzen", 1), default_opset=op)
def TokenMatch(metric, size, a, b):
    """Find the partners; the declaration in `op.py` defines the semantics."""
    last = op.Constant(value_ints=[-1])
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    unlike = op.Constant(value_float=-2.0)
    end = op.Sub(op.Shape(size, start=1, end=2), op.Constant(value_ints=[1]))
    at_a = op.Max(op.Min(op.Cast(a, to=INT64.dtype), end), op.Constant(value_ints=[0]))
    at_b = op.Max(op.Min(op.Cast(b, to=INT64.dtype), end), op.Constant(value_ints=[0]))

    # Rows of both lists, their norms and padding flags.
    rows_a = op.Cast(op.GatherND(metric, op.Unsqueeze(at_a, last), batch_dims=1), to=FLOAT.dtype)
    rows_b = op.Cast(op.GatherND(metric, op.Unsqueeze(at_b, last), batch_dims=1), to=FLOAT.dtype)
    square_a = op.ReduceSum(op.Mul(rows_a, rows_a), last, keepdims=1)
    square_b = op.ReduceSum(op.Mul(rows_b, rows_b), last, keepdims=1)
    fine_a = op.Less(square_a, op.Constant(value_float=1e38))
    fine_b = op.Less(square_b, op.Constant(value_float=1e38))
    scale_a = op.Where(op.Greater(square_a, op.Constant(value_float=1e-30)), op.Div(one, op.Sqrt(square_a)), zero)
    scale_b = op.Where(op.Greater(square_b, op.Constant(value_float=1e-30)), op.Div(one, op.Sqrt(square_b)), zero)
    size_a = op.Unsqueeze(op.GatherElements(size, at_a, axis=1), [2])
    size_b = op.Unsqueeze(op.GatherElements(size, at_b, axis=1), [1])
    small = op.Constant(value_float=SMALLEST_SIZE)
    large = op.Constant(value_float=LARGEST_SIZE)
    real_a = op.And(op.GreaterOrEqual(size_a, small), op.LessOrEqual(size_a, large))
    real_b = op.And(op.GreaterOrEqual(size_b, small), op.LessOrEqual(size_b, large))

    # Similarities of all pairs, and the best of each row.
    product = op.MatMul(op.Where(fine_a, rows_a, zero), op.Transpose(op.Where(fine_b, rows_b, zero), perm=[0, 2, 1]))
    cosine = op.Mul(op.Mul(product, scale_a), op.Transpose(scale_b, perm=[0, 2, 1]))
    cosine = op.Where(op.And(fine_a, op.Transpose(fine_b, perm=[0, 2, 1])), cosine, unlike)
    for_real = op.Where(real_b, cosine, unlike)
    for_padding = op.Where(real_b, op.Constant(value_float=2.0), op.Constant(value_float=3.0))
    alike = op.Where(real_a, for_real, for_padding)
    similarity = op.ReduceMax(alike, last, keepdims=0)
    best = op.ArgMax(alike, axis=2, keepdims=0, select_last_index=0)
    partner = op.Cast(op.GatherElements(at_b, best, axis=1), to=6)
    return partner, similarity
