# mypy: ignore-errors
"""What the kernels that merge tokens agree on: which tokens are real, and what a cosine is."""

import os

import triton
import triton.language as tl

SMALLEST_SIZE = tl.constexpr(2.0**-64)
LARGEST_SIZE = tl.constexpr(2.0**64)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def is_valid_size(size):
    """Tell which tokens are no padding: a size is a count, so that 0, NaN, an infinity and what is below 0 are none."""
    return (size >= SMALLEST_SIZE) & (size <= LARGEST_SIZE)


@triton.jit
def squared_norm(vectors):
    """Return the sum of the squares of each row, in float32."""
    vectors = vectors.to(tl.float32)
    return tl.sum(vectors * vectors, axis=1)


@triton.jit
def is_finite_norm(square):
    """Tell which vectors have a length, by the sum of their squares: NaN and what overflows have none."""
    return square < 1e38


@triton.jit
def inverse_norm(square):
    """Return 1 / length of vectors whose squares sum to `square`; 0 of a zero vector."""
    return tl.where(square > 1e-30, tl.div_rn(1.0, tl.sqrt_rn(square)), 0.0)


@triton.jit
def accumulate_dot(rows, others, accumulator):
    """Return `product` plus every row times every other one, summed in float32."""
    if INTERPRETED:  # which takes the bits of a bfloat16 for an integer
        rows, others = rows.to(tl.float32), others.to(tl.float32)
    return tl.dot(rows, tl.trans(others), accumulator, input_precision="tf32x3")
