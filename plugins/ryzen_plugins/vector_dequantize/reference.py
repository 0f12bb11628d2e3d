# mypy: ignore-errors
"""What VectorDequantizeFp8, VectorDequantizeInt8 and VectorDequantizeInt4 mean, in standard ONNX ops."""

from onnxscript import FLOAT, INT32, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

from ryzen_plugins.vector_quantize.levels import LEVELS

SIXTEEN = [*LEVELS, *(-level for level in LEVELS)]
BITS = [float(2**bit) for bit in range(9)]
NEXT_BITS = [float(2**bit) for bit in range(1, 10)]
RYZEN = Opset("ryzen", 1)


def _e4m3(bits: int) -> float:
    """Return what 7 bits without the sign mean."""
    exponent, fraction = divmod(bits, 8)
    if bits == 127:
        return float("nan")
    return fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)


E4M3 = [*(_e4m3(bits) for bits in range(128)), *(-_e4m3(bits) for bits in range(128))]


@script(RYZEN, default_opset=op)
def VectorDequantizeFp8(codes, scale, like):
    """Codes are float8 e4m3; see the declaration."""
    number = op.Cast(codes, to=INT32.dtype)
    wrap = op.Mul(op.Constant(value_int=256), op.Cast(op.Less(codes, op.CastLike(op.Constant(value_int=0), codes)), to=7))
    value = op.Gather(op.Constant(value_floats=E4M3), op.Add(number, op.Cast(wrap, to=INT32.dtype)), axis=0)
    x = op.CastLike(op.Mul(value, op.Unsqueeze(scale, op.Constant(value_ints=[-1]))), like)
    return x


@script(RYZEN, default_opset=op)
def VectorDequantizeInt8(codes, scale, like):
    """Codes are whole numbers; see the declaration."""
    number = op.Cast(codes, to=FLOAT.dtype)
    x = op.CastLike(op.Mul(number, op.Unsqueeze(scale, op.Constant(value_ints=[-1]))), like)
    return x


@script(RYZEN, default_opset=op)
def VectorDequantizeInt4(codes, scale, like, unrotate: int):
    """Codes are levels in a rotated basis; see the declaration."""
    one = op.Constant(value_float=1.0)
    two = op.Constant(value_float=2.0)
    last = op.Constant(value_ints=[-1])
    sixteen = op.Constant(value_float=16.0)
    byte = op.Cast(codes, to=FLOAT.dtype)
    high = op.Floor(op.Div(byte, sixteen))
    low = op.Sub(byte, op.Mul(high, sixteen))
    high = op.Where(op.Less(high, op.Constant(value_float=0.0)), op.Add(high, sixteen), high)
    pair = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
    number = op.Reshape(pair, op.Concat(op.Shape(scale), last, axis=0))
    value = op.Gather(op.Constant(value_floats=SIXTEEN), op.Cast(number, to=INT32.dtype), axis=0)

    # The rotation: the parity of i & j for H, that of j & (j >> 1) for the signs.
    width = op.Shape(value, start=-1)
    index = op.Range(op.Constant(value_int=0), op.Squeeze(width), op.Constant(value_int=1))
    index = op.Unsqueeze(op.Cast(index, to=FLOAT.dtype), last)
    bits = op.Floor(op.Div(index, op.Constant(value_floats=BITS)))
    bits = op.Sub(bits, op.Mul(two, op.Floor(op.Div(bits, two))))
    after = op.Floor(op.Div(index, op.Constant(value_floats=NEXT_BITS)))
    after = op.Sub(after, op.Mul(two, op.Floor(op.Div(after, two))))
    ones = op.Add(op.MatMul(bits, op.Transpose(bits, perm=[1, 0])), op.ReduceSum(op.Mul(bits, after), last, keepdims=1))
    odd = op.Sub(ones, op.Mul(two, op.Floor(op.Div(ones, two))))
    turned = op.MatMul(value, op.Transpose(op.Sub(one, op.Mul(two, odd)), perm=[1, 0]))
    turned = op.Mul(turned, op.Sqrt(op.Div(one, op.Cast(width, to=FLOAT.dtype))))
    value = op.Where(op.Cast(op.Constant(value_int=unrotate), to=9), turned, value)
    x = op.CastLike(op.Mul(value, op.Unsqueeze(scale, last)), like)
    return x
