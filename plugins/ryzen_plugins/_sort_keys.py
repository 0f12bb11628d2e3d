# mypy: ignore-errors
"""Keys by which kernels compare scores: 48 bits, the score before the index, so that equals have one order."""

import triton
import triton.language as tl

KEY_UPPER_BOUND = tl.constexpr(1 << 48)
"""Above every key."""


@triton.jit
def sort_key(score, index):
    """Return the key of float32 scores at indices below 2**16: NaN below all, +inf as the largest finite number."""
    score = tl.where(score == score, score, float("-inf"))
    score = tl.minimum(score, 3.4028234663852886e38) + 0.0
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((bits.to(tl.int64) + 2147483648) << 16) | index.to(tl.int64)
