# mypy: ignore-errors
"""References of VectorQuantizeFp8, VectorQuantizeInt8 and VectorQuantizeInt4 in standard ONNX ops."""

from onnxscript import FLOAT, INT8, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

from ryzen_plugins.vector_quantize.levels import THRESHOLDS

LARGEST = 3.4028234663852886e38
INF = float("inf")
T0, T1, T2, T3, T4, T5, T6 = THRESHOLDS
BITS = [float(2**bit) for bit in range(9)]
NEXT_BITS = [float(2**bit) for bit in range(1, 10)]
RYZEN = Opset("ryzen", 1)


@script(RYZEN, default_opset=op)
def VectorQuantizeFp8(x):
    """Quantize to float8 e4m3; the declaration in `op.py` defines the semantics."""
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    last = op.Constant(value_ints=[-1])
    wide = op.Cast(x, to=FLOAT.dtype)
    size = op.Abs(wide)
    amax = op.ReduceMax(op.Where(op.Less(size, op.Constant(value_float=INF)), size, zero), last, keepdims=1)
    value = op.Max(op.Min(op.Where(op.IsNaN(wide), zero, wide), amax), op.Neg(amax))
    step = op.Div(amax, op.Constant(value_float=448.0))
    ratio = op.Div(value, op.Where(op.Greater(step, zero), step, one))
    ratio = op.Min(op.Abs(ratio), op.Constant(value_float=448.0))

    # The binary search for one of the 15 ranges of equal spacing; the spacing doubles from range to range.
    b3 = op.GreaterOrEqual(ratio, op.Constant(value_float=4.0))
    rest = op.Where(b3, op.Mul(ratio, op.Constant(value_float=0.00390625)), ratio)
    b2 = op.GreaterOrEqual(rest, op.Constant(value_float=0.25))
    rest = op.Where(b2, op.Mul(rest, op.Constant(value_float=0.0625)), rest)
    b1 = op.GreaterOrEqual(rest, op.Constant(value_float=0.0625))
    rest = op.Where(b1, op.Mul(rest, op.Constant(value_float=0.25)), rest)
    b0 = op.GreaterOrEqual(rest, op.Constant(value_float=0.03125))
    rest = op.Where(b0, op.Mul(rest, op.Constant(value_float=0.5)), rest)
    code = op.Round(op.Mul(rest, op.Constant(value_float=512.0)))
    code = op.Add(code, op.Where(b3, op.Constant(value_float=64.0), zero))
    code = op.Add(code, op.Where(b2, op.Constant(value_float=32.0), zero))
    code = op.Add(code, op.Where(b1, op.Constant(value_float=16.0), zero))
    code = op.Add(code, op.Where(b0, op.Constant(value_float=8.0), zero))
    negative = op.And(op.Less(value, zero), op.Greater(code, zero))
    codes = op.Cast(op.Where(negative, op.Sub(code, op.Constant(value_float=128.0)), code), to=INT8.dtype)
    scale = op.Squeeze(step, last)
    return codes, scale


@script(RYZEN, default_opset=op)
def VectorQuantizeInt8(x):
    """Quantize to 8-bit integers; the declaration in `op.py` defines the semantics."""
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    last = op.Constant(value_ints=[-1])
    wide = op.Cast(x, to=FLOAT.dtype)
    size = op.Abs(wide)
    amax = op.ReduceMax(op.Where(op.Less(size, op.Constant(value_float=INF)), size, zero), last, keepdims=1)
    value = op.Max(op.Min(op.Where(op.IsNaN(wide), zero, wide), amax), op.Neg(amax))
    step = op.Min(op.Div(amax, op.Constant(value_float=127.0)), op.Constant(value_float=2.679388389e36))
    ratio = op.Div(value, op.Where(op.Greater(step, zero), step, one))
    ratio = op.Max(op.Min(ratio, op.Constant(value_float=127.0)), op.Constant(value_float=-127.0))
    codes = op.Cast(op.Round(ratio), to=INT8.dtype)
    scale = op.Squeeze(step, last)
    return codes, scale


@script(RYZEN, default_opset=op)
def VectorQuantizeInt4(x):
    """Quantize to the nearest levels in a rotated basis; the declaration in `op.py` defines the semantics."""
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    two = op.Constant(value_float=2.0)
    last = op.Constant(value_ints=[-1])
    wide = op.Cast(x, to=FLOAT.dtype)
    size = op.Abs(wide)
    amax = op.ReduceMax(op.Where(op.Less(size, op.Constant(value_float=INF)), size, zero), last, keepdims=1)
    value = op.Max(op.Min(op.Where(op.IsNaN(wide), zero, wide), amax), op.Neg(amax))

    # Scale by a power of two that brings amax into 2**-32 .. 2**32, so that squares stay in float32 range.
    power = op.Where(op.Less(amax, op.Constant(value_float=2.0**-32)), op.Constant(value_float=2.0**64), one)
    power = op.Where(op.Less(amax, op.Constant(value_float=2.0**-96)), op.Constant(value_float=2.0**120), power)
    power = op.Where(op.Less(amax, op.Constant(value_float=2.0**32)), power, op.Constant(value_float=2.0**-64))
    power = op.Where(op.Less(amax, op.Constant(value_float=2.0**96)), power, op.Constant(value_float=2.0**-112))
    value = op.Mul(value, power)

    # The rotation matrix: the parity of i & j determines H, the parity of j & (j >> 1) the signs.
    width = op.Shape(x, start=-1)
    index = op.Range(op.Constant(value_int=0), op.Squeeze(width), op.Constant(value_int=1))
    index = op.Unsqueeze(op.Cast(index, to=FLOAT.dtype), last)
    bits = op.Floor(op.Div(index, op.Constant(value_floats=BITS)))
    bits = op.Sub(bits, op.Mul(two, op.Floor(op.Div(bits, two))))
    after = op.Floor(op.Div(index, op.Constant(value_floats=NEXT_BITS)))
    after = op.Sub(after, op.Mul(two, op.Floor(op.Div(after, two))))
    ones = op.Add(op.MatMul(bits, op.Transpose(bits, perm=[1, 0])), op.ReduceSum(op.Mul(bits, after), last, keepdims=1))
    odd = op.Sub(ones, op.Mul(two, op.Floor(op.Div(ones, two))))
    rotated = op.MatMul(value, op.Sub(one, op.Mul(two, odd)))

    square = op.ReduceSum(op.Mul(value, value), last, keepdims=1)
    norm = op.Sqrt(square)
    rotated = op.Div(rotated, op.Where(op.Greater(norm, zero), norm, one))
    size = op.Abs(rotated)
    code = op.Cast(op.Greater(size, op.Constant(value_float=T0)), to=FLOAT.dtype)
    code = op.Add(code, op.Cast(op.Greater(size, op.Constant(value_float=T1)), to=FLOAT.dtype))
    code = op.Add(code, op.Cast(op.Greater(size, op.Constant(value_float=T2)), to=FLOAT.dtype))
    code = op.Add(code, op.Cast(op.Greater(size, op.Constant(value_float=T3)), to=FLOAT.dtype))
    code = op.Add(code, op.Cast(op.Greater(size, op.Constant(value_float=T4)), to=FLOAT.dtype))
    code = op.Add(code, op.Cast(op.Greater(size, op.Constant(value_float=T5)), to=FLOAT.dtype))
    code = op.Add(code, op.Cast(op.Greater(size, op.Constant(value_float=T6)), to=FLOAT.dtype))
    code = op.Add(code, op.Where(op.Less(rotated, zero), op.Constant(value_float=8.0), zero))

    lead = op.Shape(x, start=0, end=-1)
    pairs = op.Reshape(code, op.Concat(lead, op.Constant(value_ints=[-1, 2]), axis=0))
    byte = op.ReduceSum(op.Mul(pairs, op.Constant(value_floats=[1.0, 16.0])), last, keepdims=0)
    wrapped = op.Where(op.Less(byte, op.Constant(value_float=128.0)), byte, op.Sub(byte, op.Constant(value_float=256.0)))
    codes = op.Cast(wrapped, to=INT8.dtype)
    step = op.Div(op.Sqrt(op.Div(square, op.Cast(width, to=FLOAT.dtype))), power)
    scale = op.Squeeze(op.Min(step, op.Constant(value_float=LARGEST)), last)
    return codes, scale
