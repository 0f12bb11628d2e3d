# mypy: ignore-errors
"""References of the VectorDequantize ops in standard ONNX ops."""

from onnxscript import FLOAT, INT32, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

from ryzen_plugins.vector_quantize.levels import LEVELS

BITS = [float(2**bit) for bit in range(9)]
NEXT_BITS = [float(2**bit) for bit in range(1, 10)]


def _decode_e4m3(bits: int) -> float:
    """Return the value of 7 bits of float8 e4m3 without the sign."""
    exponent, fraction = divmod(bits, 8)
    if bits == 127:
        return float("nan")
    return fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)


# Tables indexed by code + 128: lookups with indices that may be negative take twice as long on ONNX Runtime.
BYTES = [*range(128, 256), *range(128)]
E4M3 = [_decode_e4m3(byte % 128) * (-1 if byte >= 128 else 1) for byte in BYTES]
SIGNED_LEVELS = [*LEVELS, *(-level for level in LEVELS)]
LEVEL_PAIRS = [SIGNED_LEVELS[code] for byte in BYTES for code in (byte % 16, byte // 16)]
RYZEN = Opset("ryzen", 1)


@script(RYZEN, default_opset=op)
def VectorDequantizeFp8(codes, scale, like):
    """Decode float8 e4m3; the declaration in `op.py` defines the semantics."""
    number = op.Add(op.Cast(codes, to=INT32.dtype), op.Cast(op.Constant(value_int=128), to=INT32.dtype))
    value = op.Gather(op.Constant(value_floats=E4M3), number, axis=0)
    x = op.CastLike(op.Mul(value, op.Unsqueeze(scale, op.Constant(value_ints=[-1]))), like)
    return x


@script(RYZEN, default_opset=op)
def VectorDequantizeInt8(codes, scale, like):
    """Decode 8-bit integers; the declaration in `op.py` defines the semantics."""
    number = op.Cast(codes, to=FLOAT.dtype)
    x = op.CastLike(op.Mul(number, op.Unsqueeze(scale, op.Constant(value_ints=[-1]))), like)
    return x


@script(RYZEN, default_opset=op)
def VectorDequantizeRotatedInt4(codes, scale, like):
    """Decode levels with one table lookup per byte; the declaration in `op.py` defines the semantics."""
    last = op.Constant(value_ints=[-1])
    number = op.Add(op.Cast(codes, to=INT32.dtype), op.Cast(op.Constant(value_int=128), to=INT32.dtype))
    pairs = op.Gather(op.Reshape(op.Constant(value_floats=LEVEL_PAIRS), op.Constant(value_ints=[256, 2])), number, axis=0)
    value = op.Reshape(pairs, op.Concat(op.Shape(scale), last, axis=0))
    x = op.CastLike(op.Mul(value, op.Unsqueeze(scale, last)), like)
    return x


@script(RYZEN, default_opset=op)
def VectorDequantizeInt4(codes, scale, like):
    """Decode levels in a rotated basis; the declaration in `op.py` defines the semantics."""
    one = op.Constant(value_float=1.0)
    two = op.Constant(value_float=2.0)
    last = op.Constant(value_ints=[-1])
    code = op.Add(op.Cast(codes, to=INT32.dtype), op.Cast(op.Constant(value_int=128), to=INT32.dtype))
    table = op.Reshape(op.Constant(value_floats=LEVEL_PAIRS), op.Constant(value_ints=[256, 2]))
    value = op.Reshape(op.Gather(table, code, axis=0), op.Concat(op.Shape(scale), last, axis=0))

    # The rotation matrix: the parity of i & j determines H, the parity of j & (j >> 1) the signs.
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
    x = op.CastLike(op.Mul(turned, op.Unsqueeze(scale, last)), like)
    return x
