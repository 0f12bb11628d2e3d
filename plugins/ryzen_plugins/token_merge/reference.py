# mypy: ignore-errors
"""Reference of TokenMerge in standard ONNX ops."""

from onnxscript import FLOAT, INT64, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

SMALLEST_SIZE = 2.0**-64
LARGEST_SIZE = 2.0**64
TOO_LARGE = 2.0**96
POISON = 2.0**112
POISONED = 2.0**111
NAN = float("nan")


@script(Opset("ryzen", 1), default_opset=op)
def TokenMerge(x, size, target, slots):
    """Average the tokens of every slot; the declaration in `op.py` defines the semantics."""
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    real = op.And(
        op.GreaterOrEqual(size, op.Constant(value_float=SMALLEST_SIZE)),
        op.LessOrEqual(size, op.Constant(value_float=LARGEST_SIZE)),
    )

    # Assignment of tokens to slots: B M N.
    indices = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(slots)), op.Constant(value_int=1))
    slot = op.Unsqueeze(indices, [0, 2])
    takes = op.And(op.Equal(slot, op.Unsqueeze(op.Cast(target, to=INT64.dtype), [1])), op.Unsqueeze(real, [1]))
    taken = op.Cast(takes, to=FLOAT.dtype)
    size_out = op.ReduceSum(op.Where(takes, op.Unsqueeze(size, [1]), zero), [2], keepdims=0)
    count = op.ReduceSum(taken, [2], keepdims=0)

    # The mean. Products out of bounds are replaced by a finite number that sums of other products cannot reach, so that its
    # product with 0 is 0.
    part = op.Mul(op.Cast(x, to=FLOAT.dtype), op.Unsqueeze(op.Where(real, size, zero), [2]))
    part = op.Where(op.Less(op.Abs(part), op.Constant(value_float=TOO_LARGE)), part, op.Constant(value_float=POISON))
    total = op.MatMul(taken, part)
    mean = op.Div(total, op.Unsqueeze(op.Where(op.Greater(size_out, zero), size_out, one), [2]))
    mean = op.Where(op.Less(total, op.Constant(value_float=POISONED)), mean, op.Constant(value_float=NAN))

    # A slot with one token is exactly that token. Rows are gathered because Where may lose the sign of a zero.
    first = op.ArgMax(taken, axis=2, keepdims=0, select_last_index=0)
    tokens = op.Shape(size, start=1, end=2)
    means = op.Add(indices, tokens)
    source = op.Unsqueeze(op.Where(op.Equal(count, one), first, means), [2])
    y = op.GatherND(op.Concat(x, op.CastLike(mean, x), axis=1), source, batch_dims=1)
    return y, size_out
