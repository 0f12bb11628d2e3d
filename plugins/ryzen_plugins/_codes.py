# mypy: ignore-errors
"""Device functions that encode and decode quantized vectors: float8 e4m3 and rotated 4-bit codes.

The rotation is H diag(s) / sqrt(D): s[j] is -1 if j & (j >> 1) has an odd number of ones, otherwise 1; H[i, j] is -1 if i & j
has an odd number of ones, otherwise 1. The butterflies run along the first axis of a tile, so that each thread holds whole
columns.
"""

import struct

import triton
import triton.language as tl

from ryzen_plugins.vector_quantize.levels import LEVELS, THRESHOLDS

THRESHOLD = tl.constexpr(THRESHOLDS)
SMALL_LEVELS = tl.constexpr(int.from_bytes(struct.pack("<4e", *LEVELS[:4]), "little"))
LARGE_LEVELS = tl.constexpr(int.from_bytes(struct.pack("<4e", *LEVELS[4:]), "little"))
"""Four half-precision levels each, packed into 64 bits: a lookup table that is indexed by a shift."""


@triton.jit
def locate_elements(rows, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return for the vectors of a program their rows [BLOCK_R], the offsets of their elements, and which elements exist."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    return row, row[:, None] * D + d[None, :], (row[:, None] < rows) & (d[None, :] < D)


@triton.jit
def encode_e4m3(value):
    """Return the bits of the nearest float8 e4m3 (ties to even) of float32 values in [-448, 448]; zero is always positive."""
    size = tl.abs(value)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # the sum is rounded to 2**-9
    code = tl.where(size < 0.015625, small, normal)
    return tl.where((value < 0.0) & (code > 0), code | 0x80, code)


@triton.jit
def decode_e4m3(code):
    """Return the float32 values of int8 codes, interpreted as the bits of float8 e4m3."""
    bits = code.to(tl.int32)
    value = (((bits & 0x7F) << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def encode_level(value):
    """Return the 4-bit codes of float32 values: the sign in bit 3, the index of the nearest level's magnitude below."""
    size = tl.abs(value)
    high = size > THRESHOLD[3]
    middle = size > tl.where(high, THRESHOLD[5], THRESHOLD[1])
    upper = tl.where(middle, THRESHOLD[6], THRESHOLD[4])
    lower = tl.where(middle, THRESHOLD[2], THRESHOLD[0])
    low = size > tl.where(high, upper, lower)
    return tl.where(value < 0.0, 8, 0) + tl.where(high, 4, 0) + tl.where(middle, 2, 0) + tl.where(low, 1, 0)


@triton.jit
def decode_level(code):
    """Return the float32 levels of the low 4 bits of int32 codes."""
    four = tl.where((code & 4) != 0, LARGE_LEVELS, SMALL_LEVELS)
    size = (four >> ((code & 3) << 4).to(tl.int64)).to(tl.int32) & 0x7FFF
    return (size | ((code & 8) << 12)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def bit_parity(bits):
    """Return the parity of the number of ones of integers below 2**12: 1 if it is odd, otherwise 0."""
    bits = bits ^ (bits >> 8)
    bits = bits ^ (bits >> 4)
    return (0x6996 >> (bits & 15)) & 1


@triton.jit
def apply_signs(value, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Return float32 `value` [A, N] multiplied by the signs s; column n holds the elements (n % B) * A + a of a vector."""
    a = tl.arange(0, A)[:, None]
    b = (tl.arange(0, N) % B)[None, :]
    sign = bit_parity(a & (a >> 1)) ^ bit_parity(b & (b >> 1)) ^ ((a // (A // 2)) & b & 1)
    return (value.to(tl.int32, bitcast=True) ^ (sign << 31)).to(tl.float32, bitcast=True)


@triton.jit
def butterfly(value, A: tl.constexpr, N: tl.constexpr):
    """Apply one Hadamard stage to the highest bit of the first axis of `value` [A, N]; it becomes the lowest bit."""
    one, other = tl.split(tl.trans(tl.reshape(value, (2, A // 2, N)), (1, 2, 0)))
    return tl.reshape(tl.trans(tl.join(one + other, one - other), (0, 2, 1)), (A, N))


@triton.jit
def hadamard(value, A: tl.constexpr, N: tl.constexpr):
    """Return the unnormalized Hadamard transform of `value` [A, N] along the first axis; A is a power of two up to 32."""
    if A >= 2:
        value = butterfly(value, A, N)
    if A >= 4:
        value = butterfly(value, A, N)
    if A >= 8:
        value = butterfly(value, A, N)
    if A >= 16:
        value = butterfly(value, A, N)
    if A >= 32:
        value = butterfly(value, A, N)
    return value
