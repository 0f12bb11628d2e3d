# mypy: ignore-errors
"""Kernels of VectorQuantizeFp8, VectorQuantizeInt8 and VectorQuantizeInt4: each program reads BLOCK_R vectors once.

All arithmetic is float32. The 8-bit codes and scales are computed by individually rounded operations in the order of the
reference, so that they are bitwise identical in every implementation.
"""

import triton
import triton.language as tl

from ryzen_plugins._codes import apply_signs, encode_e4m3, encode_level, hadamard, locate_elements

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def sanitize(raw):
    """Return vectors [R, D] as float32, with NaN replaced by 0 and infinities clamped to the vector's amax, and amax [R]."""
    if raw.dtype == tl.bfloat16:  # convert by bits: Triton's interpreter flushes small numbers to 0
        value = (raw.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = raw.to(tl.float32)
    size = tl.abs(value)
    amax = tl.max(tl.where(size < float("inf"), size, 0.0), axis=1)
    value = tl.where(value == value, value, 0.0)
    return tl.maximum(tl.minimum(value, amax[:, None]), -amax[:, None]), amax


@triton.jit
def divide_clamped(value, scale, limit):
    """Return value [R, D] / scale [R], clamped to +-limit; the divisor is 1 if a scale is 0."""
    ratio = tl.div_rn(value, tl.broadcast_to(tl.where(scale > 0.0, scale, 1.0)[:, None], value.shape))
    return tl.maximum(tl.minimum(ratio, limit), -limit)


@triton.jit
def vector_quantize_fp8(
    x, rows, codes, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ELEMENTS: tl.constexpr
):
    """Write the codes [rows, D] and the scales [rows] of `x` [rows, D]."""
    row, element, inside = locate_elements(rows, D, BLOCK_D, BLOCK_R)
    value, amax = sanitize(tl.load(x + element, mask=inside, other=0.0))
    step = tl.div_rn(amax, 448.0)
    code = encode_e4m3(divide_clamped(value, step, 448.0))
    tl.store(codes + element, code.to(tl.int8), mask=inside)
    tl.store(scale + row, step, mask=row < rows)


@triton.jit
def vector_quantize_int8(
    x, rows, codes, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ELEMENTS: tl.constexpr
):
    """Write the codes [rows, D] and the scales [rows] of `x` [rows, D]."""
    row, element, inside = locate_elements(rows, D, BLOCK_D, BLOCK_R)
    value, amax = sanitize(tl.load(x + element, mask=inside, other=0.0))
    step = tl.minimum(tl.div_rn(amax, 127.0), 2.679388389e36)
    rounded = divide_clamped(value, step, 127.0) + 12582912.0  # 1.5 * 2**23: the addition rounds to integers
    code = rounded.to(tl.int32, bitcast=True) - 0x4B400000
    tl.store(codes + element, code.to(tl.int8), mask=inside)
    tl.store(scale + row, step, mask=row < rows)


@triton.jit
def vector_quantize_int4(
    x, rows, codes, scale, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_R: tl.constexpr, ELEMENTS: tl.constexpr
):
    """Write the codes [rows, D / 2] and the scales [rows] of `x` [rows, D], D = A * B.

    The transform over D is a transform over A and one over B; the tile is transposed in between, so that both run in registers.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, D)
    raw = tl.load(x + row[:, None] * D + d[None, :], mask=row[:, None] < rows, other=0.0)
    value, amax = sanitize(raw)
    unit = tl.full((BLOCK_R,), 1.0, tl.float32)
    if x.dtype.element_ty != tl.float16:  # scale amax to about 1 by a power of two, so that squares stay in float32 range
        field = 254 - (amax.to(tl.int32, bitcast=True) >> 23)
        field = tl.minimum(tl.maximum(field, 1), 253)
        value = value * (field << 23).to(tl.float32, bitcast=True)[:, None]
        unit = ((254 - field) << 23).to(tl.float32, bitcast=True)
    columns = tl.reshape(tl.trans(tl.reshape(value, (BLOCK_R, B, A)), (2, 0, 1)), (A, BLOCK_R * B))
    columns = hadamard(apply_signs(columns, A, B, BLOCK_R * B), A, BLOCK_R * B)
    turned = tl.reshape(tl.trans(tl.reshape(columns, (A, BLOCK_R, B)), (2, 1, 0)), (B, BLOCK_R * A))
    rotated = tl.reshape(hadamard(turned, B, BLOCK_R * A), (B, BLOCK_R, A))
    square = tl.sum(tl.sum(rotated * rotated, axis=0), axis=1) * (1.0 / D)  # squared norm
    inverse = tl.where(square > 0.0, tl.rsqrt(square), 0.0)
    code = encode_level(rotated * inverse[None, :, None])
    even, uneven = tl.split(tl.reshape(code, (B, BLOCK_R, A // 2, 2)))
    packed = tl.reshape(tl.trans((even | (uneven << 4)).to(tl.int8), (1, 0, 2)), (BLOCK_R, D // 2))
    e = tl.arange(0, D // 2)
    tl.store(codes + row[:, None] * (D // 2) + e[None, :], packed, mask=row[:, None] < rows)
    step = tl.minimum(tl.sqrt_rn(square * (1.0 / D)) * unit, LARGEST)
    tl.store(scale + row, step, mask=row < rows)
