# mypy: ignore-errors
"""AcmeAxpy kernel: one program per block of elements."""

import triton
import triton.language as tl


@triton.jit
def axpy(x, y, count, z, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Compute z[i] = FACTOR * x[i] + y[i]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = FACTOR * tl.load(x + i, mask=i < count).to(tl.float32) + tl.load(y + i, mask=i < count).to(tl.float32)
    tl.store(z + i, wide, mask=i < count)
