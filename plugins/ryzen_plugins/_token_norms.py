# mypy: ignore-errors
"""Device functions shared by the token-merging kernels: padding detection, norms and dot products."""

import os

import triton
import triton.language as tl

SMALLEST_SIZE = tl.constexpr(2.0**-64)
LARGEST_SIZE = tl.constexpr(2.0**64)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def is_valid_size(size):
    """Return which tokens are not padding: zero, negative, infinite and NaN sizes, and sizes out of range, mark padding."""
    return (size >= SMALLEST_SIZE) & (size <= LARGEST_SIZE)


@triton.jit
def squared_norm(vectors):
    """Return the squared norm of each row, in float32."""
    vectors = vectors.to(tl.float32)
    return tl.sum(vectors * vectors, axis=1)


@triton.jit
def is_finite_norm(square):
    """Return which squared norms are usable: below 1e38 and not NaN."""
    return square < 1e38


@triton.jit
def inverse_norm(square):
    """Return 1 / norm for squared norms `square`; 0 for a zero vector."""
    return tl.where(square > 1e-30, tl.div_rn(1.0, tl.sqrt_rn(square)), 0.0)


@triton.jit
def accumulate_dot(rows, others, accumulator):
    """Return `accumulator` + `rows` @ `others`^T, accumulated in float32."""
    if INTERPRETED:  # the interpreter treats the bits of bfloat16 as integers
        rows, others = rows.to(tl.float32), others.to(tl.float32)
    return tl.dot(rows, tl.trans(others), accumulator, input_precision="tf32x3")
