# mypy: ignore-errors
"""48-bit sort keys of scores in kernels: the score in the high bits and the index in the low bits, which breaks ties."""

import triton
import triton.language as tl

KEY_UPPER_BOUND = tl.constexpr(1 << 48)
"""Exclusive upper bound of all keys."""


@triton.jit
def sort_key(score, index):
    """Return the keys of float32 scores at indices below 2**16; NaN sorts as -inf, +inf as the largest finite number."""
    score = tl.where(score == score, score, float("-inf"))
    score = tl.minimum(score, 3.4028234663852886e38) + 0.0
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((bits.to(tl.int64) + 2147483648) << 16) | index.to(tl.int64)
