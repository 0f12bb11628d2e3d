# mypy: ignore-errors
"""AcmeAxpy: one block of elements a program."""

import triton
import triton.language as tl


@triton.jit
def axpy(x, y, count, z, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """z[i] = FACTOR * x[i] + y[i]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = FACTOR * tl.load(x + i, mask=i < count).to(tl.float32) + tl.load(y + i, mask=i < count).to(tl.float32)
    tl.store(z + i, wide, mask=i < count)
