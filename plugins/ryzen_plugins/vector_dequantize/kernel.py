# mypy: ignore-errors
"""Kernels of the VectorDequantize ops: each program reads the codes of BLOCK_R vectors once.

`like` is never read; it only determines the output type.
"""

import triton
import triton.language as tl

from ryzen_plugins._codes import apply_signs, decode_e4m3, decode_level, hadamard, locate_elements


@triton.jit
def vector_dequantize_fp8(
    codes, scale, like, rows, x, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ELEMENTS: tl.constexpr
):
    """Write the vectors [rows, D] that `codes` [rows, D] and `scale` [rows] represent."""
    row, element, inside = locate_elements(rows, D, BLOCK_D, BLOCK_R)
    code = tl.load(codes + element, mask=inside, other=0)
    value = decode_e4m3(code) * tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
    tl.store(x + element, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def vector_dequantize_int8(
    codes, scale, like, rows, x, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ELEMENTS: tl.constexpr
):
    """Write the vectors [rows, D] that `codes` [rows, D] and `scale` [rows] represent."""
    row, element, inside = locate_elements(rows, D, BLOCK_D, BLOCK_R)
    code = tl.load(codes + element, mask=inside, other=0)
    value = code.to(tl.float32) * tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
    tl.store(x + element, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def vector_dequantize_int4(
    codes, scale, like, rows, x,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNROTATE: tl.constexpr, BLOCK_R: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write the vectors [rows, D] that `codes` [rows, D / 2] and `scale` [rows] represent, D = A * B."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, D)
    e = tl.arange(0, D // 2)
    packed = tl.load(codes + row[:, None] * (D // 2) + e[None, :], mask=row[:, None] < rows, other=0).to(tl.int32)
    step = tl.load(scale + row, mask=row < rows, other=0.0)
    value = tl.reshape(tl.join(decode_level(packed), decode_level(packed >> 4)), (BLOCK_R, D))
    if UNROTATE:
        columns = tl.reshape(tl.trans(tl.reshape(value, (BLOCK_R, B, A)), (1, 0, 2)), (B, BLOCK_R * A))
        columns = hadamard(columns, B, BLOCK_R * A)
        turned = tl.reshape(tl.trans(tl.reshape(columns, (B, BLOCK_R, A)), (2, 1, 0)), (A, BLOCK_R * B))
        turned = apply_signs(hadamard(turned, A, BLOCK_R * B), A, B, BLOCK_R * B)
        value = tl.reshape(tl.trans(tl.reshape(turned, (A, BLOCK_R, B)), (1, 2, 0)), (BLOCK_R, D))
        value = value * tl.sqrt_rn(tl.full((), 1.0 / D, tl.float32))
    value = value * step[:, None]
    tl.store(x + row[:, None] * D + d[None, :], value.to(x.dtype.element_ty), mask=row[:, None] < rows)
