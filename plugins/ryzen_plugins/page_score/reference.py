# mypy: ignore-errors
"""References of PageScoreBound and PageScoreCosine in standard ONNX ops."""

from onnxscript import FLOAT, INT64, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

INF = float("inf")
LARGE = 1125899906842624.0
"""2**50."""
SMALL = 8.881784197001252e-16
"""2**-50."""
UP = 1.2379400392853803e27
"""2**90."""
DOWN = 8.077935669463161e-28
"""2**-90."""


@script(Opset("ryzen", 1), default_opset=op)
def PageScoreBound(query, low, high, filled):
    """Compute the bound as two matrix products, with queries split by sign; `op.py` defines the semantics."""
    zero = op.Constant(value_float=0.0)
    q = op.Cast(query, to=FLOAT.dtype)
    positive = op.Greater(q, zero)
    from_high = op.MatMul(op.Where(positive, q, zero), op.Transpose(op.Cast(high, to=FLOAT.dtype), perm=[0, 1, 3, 2]))
    from_low = op.MatMul(op.Where(positive, zero, q), op.Transpose(op.Cast(low, to=FLOAT.dtype), perm=[0, 1, 3, 2]))
    bound = op.Add(from_high, from_low)
    bound = op.Where(op.IsNaN(bound), op.Constant(value_float=-INF), bound)
    best = op.ReduceMax(bound, op.Constant(value_ints=[2]), keepdims=0)
    pages = op.Squeeze(op.Shape(low, start=2, end=3))
    page = op.Range(op.Constant(value_int=0), pages, op.Constant(value_int=1))
    used = op.Less(page, op.Unsqueeze(op.Cast(filled, to=INT64.dtype), op.Constant(value_ints=[1, 2])))
    score = op.Where(used, best, op.Constant(value_float=-INF))
    return score


@script(Opset("ryzen", 1), default_opset=op)
def PageScoreCosine(query, centroid, filled):
    """Compute cosines, with vectors scaled so that squares stay in float32 range; `op.py` defines the semantics."""
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    last = op.Constant(value_ints=[-1])
    q = op.Cast(query, to=FLOAT.dtype)
    largest = op.ReduceMax(op.Abs(q), last, keepdims=1)
    scale = op.Where(op.Less(largest, op.Constant(value_float=SMALL)), op.Constant(value_float=UP), one)
    q = op.Mul(q, op.Where(op.Greater(largest, op.Constant(value_float=LARGE)), op.Constant(value_float=DOWN), scale))
    c = op.Cast(centroid, to=FLOAT.dtype)
    largest = op.ReduceMax(op.Abs(c), last, keepdims=1)
    scale = op.Where(op.Less(largest, op.Constant(value_float=SMALL)), op.Constant(value_float=UP), one)
    c = op.Mul(c, op.Where(op.Greater(largest, op.Constant(value_float=LARGE)), op.Constant(value_float=DOWN), scale))

    q_norm = op.Sqrt(op.ReduceSum(op.Mul(q, q), last, keepdims=1))
    c_norm = op.Sqrt(op.ReduceSum(op.Mul(c, c), last, keepdims=1))
    norms = op.Mul(q_norm, op.Transpose(c_norm, perm=[0, 1, 3, 2]))
    sane = op.And(op.Greater(norms, zero), op.Less(norms, op.Constant(value_float=INF)))
    dot = op.MatMul(q, op.Transpose(c, perm=[0, 1, 3, 2]))
    cosine = op.Where(sane, op.Div(dot, op.Where(sane, norms, one)), zero)
    best = op.ReduceMax(cosine, op.Constant(value_ints=[2]), keepdims=0)
    pages = op.Squeeze(op.Shape(centroid, start=2, end=3))
    page = op.Range(op.Constant(value_int=0), pages, op.Constant(value_int=1))
    used = op.Less(page, op.Unsqueeze(op.Cast(filled, to=INT64.dtype), op.Constant(value_ints=[1, 2])))
    score = op.Where(used, best, op.Constant(value_float=-INF))
    return score
