# mypy: ignore-errors
"""References of KVCompact and KVCompactRotary in standard ONNX ops."""

from onnxscript import FLOAT, INT32, INT64, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

BITS_24 = 16777216
BITS_30 = 1073741824
BITS_59 = 576460752303423488
BITS_60 = 1152921504606846976
TURN_HIGH = 170891318
"""The first 30 fractional bits of 1 / (2 pi)."""
TURN_LOW = 960041044
"""The next 30 fractional bits."""
TWO_PI = 6.283185307179586


@script(Opset("ryzen", 1), default_opset=op)
def KVCompact(k, v, score, position, index):
    """Gather slots in float32, which represents every element type exactly; `op.py` defines the semantics."""
    zero = op.Constant(value_int=0)
    slot = op.Cast(index, to=INT64.dtype)
    inside = op.And(op.GreaterOrEqual(slot, zero), op.Less(slot, op.Squeeze(op.Shape(position, start=2, end=3))))
    slot = op.Where(inside, slot, zero)
    at = op.Cast(op.GatherElements(position, slot, axis=2), to=INT64.dtype)
    held = op.And(inside, op.GreaterOrEqual(at, zero))
    position_out = op.Cast(op.Where(held, at, op.Constant(value_int=-1)), to=INT32.dtype)
    score_out = op.Where(held, op.GatherElements(score, slot, axis=2), op.Constant(value_float=0.0))

    row = op.Unsqueeze(slot, op.Constant(value_ints=[3]))
    held_rows = op.Unsqueeze(held, op.Constant(value_ints=[3]))
    keys = op.Cast(op.GatherND(k, row, batch_dims=2), to=FLOAT.dtype)
    k_out = op.CastLike(op.Where(held_rows, keys, op.Constant(value_float=0.0)), k)
    values = op.Cast(op.GatherND(v, row, batch_dims=2), to=FLOAT.dtype)
    v_out = op.CastLike(op.Where(held_rows, values, op.Constant(value_float=0.0)), v)
    return k_out, v_out, score_out, position_out


@script(Opset("ryzen", 1), default_opset=op)
def KVCompactRotary(k, v, score, position, index, frequency, interleaved: int):
    """Gather slots and rotate keys, with angles as integer fractions of a turn; `op.py` defines the semantics."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    two = op.Constant(value_int=2)
    slot = op.Cast(index, to=INT64.dtype)
    inside = op.And(op.GreaterOrEqual(slot, zero), op.Less(slot, op.Squeeze(op.Shape(position, start=2, end=3))))
    slot = op.Where(inside, slot, zero)
    at = op.Cast(op.GatherElements(position, slot, axis=2), to=INT64.dtype)
    held = op.And(inside, op.GreaterOrEqual(at, zero))
    new = op.Range(zero, op.Squeeze(op.Shape(index, start=2, end=3)), one)
    position_out = op.Cast(op.Where(held, new, op.Constant(value_int=-1)), to=INT32.dtype)
    score_out = op.Where(held, op.GatherElements(score, slot, axis=2), op.Constant(value_float=0.0))

    # Turns per position, in units of 2**-60. The frequency is coarse * 2**-24 + fine * 2**-60.
    sane = op.Less(op.Abs(frequency), op.Constant(value_float=32.0))
    rate = op.Where(sane, frequency, op.Constant(value_float=0.0))
    coarse = op.Round(op.Mul(rate, op.Constant(value_float=16777216.0)))
    fine = op.Sub(rate, op.Mul(coarse, op.Constant(value_float=5.9604644775390625e-08)))
    coarse = op.Cast(coarse, to=INT64.dtype)
    fine = op.Cast(op.Mul(fine, op.Constant(value_float=1152921504606846976.0)), to=INT64.dtype)
    high = op.Constant(value_int=TURN_HIGH)
    turn = op.Mul(op.Mul(coarse, high), op.Constant(value_int=64))
    turn = op.Add(turn, op.Div(op.Mul(coarse, op.Constant(value_int=TURN_LOW)), op.Constant(value_int=BITS_24)))
    turn = op.Add(turn, op.Div(op.Mul(fine, high), op.Constant(value_int=BITS_30)))

    # Multiply by the distance modulo whole turns, in two halves of 30 bits.
    unit = op.Constant(value_int=BITS_30)
    upper = op.Div(turn, unit)
    lower = op.Sub(turn, op.Mul(upper, unit))
    upper = op.Sub(upper, op.Mul(op.Div(upper, unit), unit))
    distance = op.Unsqueeze(op.Where(held, op.Sub(new, at), zero), op.Constant(value_ints=[3]))
    upper = op.Mul(distance, upper)
    upper = op.Sub(upper, op.Mul(op.Div(upper, unit), unit))
    turns = op.Add(op.Mul(upper, unit), op.Mul(distance, lower))
    whole = op.Constant(value_int=BITS_60)
    turns = op.Sub(turns, op.Mul(op.Div(turns, whole), whole))
    turns = op.Sub(turns, op.Mul(op.Div(turns, op.Constant(value_int=BITS_59)), whole))
    angle = op.Mul(op.Cast(turns, to=FLOAT.dtype), op.Constant(value_float=8.673617379884035e-19))
    angle = op.Mul(angle, op.Constant(value_float=TWO_PI))

    # For every element of a key: whether it is rotated, its pair, its partner, and the sign of the partner.
    size = op.Squeeze(op.Shape(k, start=3, end=4))
    pairs = op.Squeeze(op.Shape(frequency))
    near = op.Constant(value_int=interleaved)
    far = op.Sub(one, near)
    element = op.Range(zero, size, one)
    turning = op.Less(element, op.Mul(pairs, two))
    half = op.Div(element, two)
    pair = op.Add(op.Mul(near, half), op.Mul(far, element))
    pair = op.Sub(pair, op.Mul(op.Div(pair, pairs), pairs))
    odd = op.Sub(element, op.Mul(half, two))
    upper_half = op.Cast(op.GreaterOrEqual(element, pairs), to=INT64.dtype)
    second = op.Add(op.Mul(near, odd), op.Mul(far, upper_half))
    sign = op.Sub(op.Mul(second, two), one)
    step = op.Add(near, op.Mul(far, pairs))
    partner = op.Where(turning, op.Sub(element, op.Mul(sign, step)), element)

    row = op.Unsqueeze(slot, op.Constant(value_ints=[3]))
    held_rows = op.Unsqueeze(held, op.Constant(value_ints=[3]))
    keys = op.Cast(op.GatherND(k, row, batch_dims=2), to=FLOAT.dtype)
    cos = op.Gather(op.Cos(angle), pair, axis=3)
    sin = op.Mul(op.Gather(op.Sin(angle), pair, axis=3), op.Cast(sign, to=FLOAT.dtype))
    turned = op.Add(op.Mul(keys, cos), op.Mul(op.Gather(keys, partner, axis=3), sin))
    turned = op.Where(turning, turned, keys)
    k_out = op.CastLike(op.Where(held_rows, turned, op.Constant(value_float=0.0)), k)
    values = op.Cast(op.GatherND(v, row, batch_dims=2), to=FLOAT.dtype)
    v_out = op.CastLike(op.Where(held_rows, values, op.Constant(value_float=0.0)), v)
    return k_out, v_out, score_out, position_out
