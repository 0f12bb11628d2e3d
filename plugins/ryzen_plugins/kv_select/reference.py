# mypy: ignore-errors
"""Reference of KVSelect in standard ONNX ops."""

from onnxscript import INT32, INT64, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

LARGEST = 3.4028234663852886e38
INF = float("inf")
NEVER = 2147483647


@script(Opset("ryzen", 1), default_opset=op)
def KVSelect(score, position, keep: int, sinks: int, recent: int):
    """Select slots; the declaration in `op.py` defines the semantics."""
    last = op.Constant(value_ints=[-1])
    count = op.Reshape(op.Constant(value_int=keep), op.Constant(value_ints=[1]))
    at = op.Cast(position, to=INT64.dtype)
    filled = op.GreaterOrEqual(at, op.Constant(value_int=0))
    newest = op.ReduceMax(at, last, keepdims=1)
    latest = op.Greater(at, op.Sub(newest, op.Constant(value_int=recent)))
    protected = op.Or(op.Less(at, op.Constant(value_int=sinks)), latest)

    # The highest-scoring slots. Scores are clamped to finite values between -inf (free) and +inf (protected).
    worth = op.Where(op.IsNaN(score), op.Constant(value_float=-LARGEST), score)
    worth = op.Max(op.Min(worth, op.Constant(value_float=LARGEST)), op.Constant(value_float=-LARGEST))
    worth = op.Where(protected, op.Constant(value_float=INF), worth)
    worth = op.Where(filled, worth, op.Constant(value_float=-INF))
    best, place = op.TopK(worth, count, axis=2, largest=1, sorted=1)
    taken = op.Cast(op.Greater(best, op.Constant(value_float=-INF)), to=INT64.dtype)
    chosen = op.ScatterElements(op.Mul(at, op.Constant(value_int=0)), place, taken, axis=2)

    # The selected slots in time order.
    when = op.Where(op.Greater(chosen, op.Constant(value_int=0)), at, op.Constant(value_int=NEVER))
    first, slot = op.TopK(when, count, axis=2, largest=0, sorted=1)
    index = op.Cast(op.Where(op.Less(first, op.Constant(value_int=NEVER)), slot, op.Constant(value_int=-1)), to=INT32.dtype)
    one = op.Constant(value_ints=[1])
    held = op.ReduceSum(taken, last, keepdims=0)
    length = op.Squeeze(op.Slice(held, op.Constant(value_ints=[0]), one, one), one)
    return index, length
