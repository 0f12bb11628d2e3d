# mypy: ignore-errors
"""TokenUnmerge kernel: one program per block of tokens copies the rows of their slots."""

import triton
import triton.language as tl


@triton.jit
def token_unmerge(
    y, target,
    slots, tokens,
    x,
    D: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Copy BLOCK_D elements of the rows of TOKENS tokens of a sequence."""
    sequence = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = (t < tokens)[:, None] & (d < D)[None, :]
    slot = tl.load(target + sequence * tokens + t, mask=t < tokens, other=0)
    slot = tl.minimum(tl.maximum(slot, 0), slots - 1)
    rows = tl.load(y + (sequence * slots + slot)[:, None] * D + d[None, :], mask=live)
    tl.store(x + (sequence * tokens + t)[:, None] * D + d[None, :], rows, mask=live)
