# mypy: ignore-errors
"""KVSelect kernel: one program per (sequence, head) finds the score threshold and lists the selected slots in time order.

Scores are mapped to order-preserving integers and stay in registers; the threshold is found bit by bit, by counting. Slots are
listed in slot order, which is time order if the cache was filled in order; otherwise they are sorted by position.
"""

import triton
import triton.language as tl

from ryzen_plugins._sort_keys import sort_key

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def kv_select(
    score, position,
    heads, slots,
    index, length,
    KEEP: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """List the `KEEP` highest-scoring slots of a head with `slots` slots."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    at = tl.load(position + row * slots + c, mask=c < slots, other=-1)
    worth = tl.load(score + row * slots + c, mask=c < slots, other=0.0)

    # 32-bit keys: free slots sort below all others, protected slots above.
    newest = tl.max(at, axis=0)
    worth = tl.where(worth >= LOWEST, worth, LOWEST)
    key = ((sort_key(worth, c * 0) >> 16) - 2147483648).to(tl.int32)
    key = tl.where((at < SINKS) | (at > newest - RECENT), 2147483647, key)
    key = tl.where(at >= 0, key, -2147483648)
    kept = tl.minimum(tl.sum((at >= 0).to(tl.int32), axis=0), KEEP)

    # The highest threshold that at least `kept` keys reach; among keys equal to it, the lowest slots are selected.
    reached = (kept * 0).to(tl.int64) - 2147483648
    for step in range(32):
        higher = reached + (tl.full((), 1, tl.int64) << (31 - step))
        count = tl.sum((key >= higher.to(tl.int32)).to(tl.int32), axis=0)
        reached = tl.where(count >= kept, higher, reached)
    threshold = reached.to(tl.int32)
    above = key > threshold
    equal = key == threshold
    needed = kept - tl.sum(above.to(tl.int32), axis=0)
    both = above.to(tl.int32) | (equal.to(tl.int32) << 16)
    before = tl.cumsum(both, axis=0) - both
    equals = (before >> 16) & 0xFFFF
    rank = (before & 0xFFFF) + tl.minimum(equals, needed)
    tl.store(index + row * KEEP + rank, c, mask=above | (equal & (equals < needed)))
    tl.store(length + row // heads, kept.to(tl.int64), mask=row % heads == 0)
    tl.debug_barrier()

    # Sort the selected slots by position if they are not in time order.
    m = tl.arange(0, BLOCK_M)
    slot = tl.load(index + row * KEEP + m, mask=m < kept, other=0)
    following = tl.load(index + row * KEEP + m + 1, mask=m + 1 < kept, other=0)
    now = tl.load(position + row * slots + slot, mask=m < kept, other=0)
    later = tl.load(position + row * slots + following, mask=m + 1 < kept, other=2147483647)
    if tl.max((now > later).to(tl.int32), axis=0) > 0:
        # Radix sort by two bits of the position per pass, lowest bits first. The slots pass through the memory of `index`; a
        # 64-bit integer holds 16-bit counts of the four digits.
        digits = tl.sum((newest >> tl.arange(0, 32) > 0).to(tl.int32), axis=0)
        for shift in range(0, digits, 2):
            slot = tl.load(index + row * KEEP + m, mask=m < kept, other=0)
            lane = ((tl.load(position + row * slots + slot, mask=m < kept, other=0) >> shift) & 3) * 16
            one = tl.where(m < kept, tl.full((), 1, tl.int64) << lane.to(tl.int64), 0)
            earlier = tl.cumsum(one, axis=0) - one
            lower = tl.sum(one, axis=0) * 0x1000100010000
            to = ((earlier + lower) >> lane.to(tl.int64)) & 0xFFFF
            tl.debug_barrier()
            tl.store(index + row * KEEP + to, slot, mask=m < kept)
            tl.debug_barrier()
    tl.store(index + row * KEEP + m, -1, mask=(m >= kept) & (m < KEEP))
