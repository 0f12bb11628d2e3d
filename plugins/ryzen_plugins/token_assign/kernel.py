# mypy: ignore-errors
"""TokenAssign kernel: one program per sequence finds the similarity threshold of merged pairs and numbers the other tokens.

Similarities stay in registers as 32-bit keys, where a lower key is a higher similarity. The threshold is found bit by bit, in
32 counts for any number of pairs; among pairs equal to it, the first ones in the list are merged. Flags and slots are
exchanged between pairs and tokens through the memory of `target`.
"""

import triton
import triton.language as tl


@triton.jit
def token_assign(
    size, a, partner, similarity, slots,
    tokens, pairs, merged,
    target,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Assign the tokens of a sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_A)
    t = tl.arange(0, BLOCK_N)
    alike = tl.load(similarity + sequence * pairs + i, mask=i < pairs, other=0.0)

    # The merged pairs are those with the lowest keys.
    alike = tl.where(alike == alike, tl.maximum(alike, -3.4028234663852886e38), -3.4028234663852886e38)
    bits = tl.where(alike == 0.0, 0.0, alike).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits, bits ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)
    key = tl.where(i < pairs, key, 0xFFFFFFFF)
    threshold = tl.full((), 0, tl.uint32)
    for step in range(32):
        bit = (tl.full((), 1, tl.int64) << (31 - step)).to(tl.uint32)
        below = tl.sum((key < (threshold | bit)).to(tl.int32), axis=0)
        threshold = tl.where(below < merged, threshold | bit, threshold)
    ahead = tl.sum((key < threshold).to(tl.int32), axis=0)
    level = (key == threshold) & (i < pairs)
    turn = tl.cumsum(level.to(tl.int32), axis=0)
    goes = ((key < threshold) | (level & (turn <= merged - ahead))) & (i < pairs)

    # The other tokens are numbered in sequence order.
    here = target + sequence * tokens
    source = tl.load(a + sequence * pairs + i, mask=i < pairs, other=0)
    source = tl.minimum(tl.maximum(source, 0), tokens - 1)
    other = tl.load(partner + sequence * pairs + i, mask=i < pairs, other=0)
    other = tl.minimum(tl.maximum(other, 0), tokens - 1)
    tl.store(here + t, t * 0 + 1, mask=t < tokens)
    tl.debug_barrier()
    tl.store(here + source, i * 0, mask=goes)
    tl.debug_barrier()
    stays = tl.load(here + t, mask=t < tokens, other=0)
    tl.debug_barrier()
    tl.store(here + t, tl.cumsum(stays, axis=0) - 1, mask=t < tokens)
    tl.debug_barrier()
    theirs = tl.load(here + other, mask=goes, other=0)
    tl.debug_barrier()
    tl.store(here + source, theirs, mask=goes)
