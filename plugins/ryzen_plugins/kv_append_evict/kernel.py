# mypy: ignore-errors
"""KVAppendEvict kernel: one program per (sequence, head) finds the slots of lowest score and overwrites them with the new rows.

Scores and positions of a head are read into registers once. A score and its slot form a 48-bit key, which makes the order of
ties unique. A slot whose token is behind the attention window counts as free. For a single token, the key of a free slot is
its index, which is below the key of every score, so that one minimum selects the slot whether or not the cache is full; the
new row is loaded in the meantime. For a chunk, the evicted keys are those up to a threshold that is found bit by bit.
"""

import triton
import triton.language as tl

from ryzen_plugins._sort_keys import KEY_UPPER_BOUND, sort_key


@triton.jit
def kv_append_evict(
    k, v, score, position, new_k, new_v, new_score, new_position,
    heads, slots, chunk,
    k_out, v_out, score_out, position_out, length, slot,
    D: tl.constexpr, E: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write a step of `chunk` tokens into a head of `slots` slots."""
    row = tl.program_id(0).to(tl.int64)
    sequence = row // heads
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    held_at = tl.load(position + row * slots + c, mask=c < slots, other=-1)
    worth = tl.load(score + row * slots + c, mask=c < slots, other=0.0)
    if BLOCK_S == 1:
        now = tl.load(new_position + sequence)
    else:
        s = tl.arange(0, BLOCK_S)
        new_at = tl.load(new_position + sequence * chunk + s, mask=s < chunk, other=-1)
        now = tl.max(new_at, axis=0)
    if WINDOW > 0:
        unseen_until = tl.where(now >= WINDOW, now - WINDOW, -1)
        held_at = tl.where(held_at <= unseen_until, -1, held_at)
        if BLOCK_S > 1:
            new_at = tl.where(new_at <= unseen_until, -1, new_at)
    empty = (held_at < 0) & (c < slots)
    held = tl.sum((held_at >= 0).to(tl.int32), axis=0)
    if BLOCK_S == 1:
        new_worth = tl.load(new_score + row)
        keys = tl.load(new_k + row * D + d, mask=d < D)
        values = tl.load(new_v + row * E + d, mask=d < E)
        key = tl.where((held_at >= SINKS) & (held_at <= now - RECENT), sort_key(worth, c), KEY_UPPER_BOUND)
        lowest = tl.min(tl.where(empty, c.to(tl.int64), key), axis=0)
        placed = (now >= 0) & (lowest < KEY_UPPER_BOUND)
        to = tl.where(placed, lowest & 0xFFFF, -1)
        tl.store(slot + row, to.to(tl.int32))
        tl.store(score_out + row * slots + to, new_worth, mask=placed)
        tl.store(position_out + row * slots + to, now, mask=placed)
        tl.store(k_out + (row * slots + to) * D + d, keys, mask=(d < D) & placed)
        tl.store(v_out + (row * slots + to) * E + d, values, mask=(d < E) & placed)
        left = tl.minimum(held + placed.to(tl.int32), slots)
        tl.store(length + sequence, left.to(tl.int64), mask=row % heads == 0)
    else:
        new_worth = tl.load(new_score + row * chunk + s, mask=s < chunk, other=0.0)

        # The eviction candidates, and the number of tokens to evict.
        newest_old = now - RECENT
        key = tl.where((held_at >= SINKS) & (held_at <= newest_old), sort_key(worth, c), KEY_UPPER_BOUND)
        new_key = tl.where((new_at >= SINKS) & (new_at <= newest_old), sort_key(new_worth, slots + s), KEY_UPPER_BOUND)
        surplus = held + tl.sum((new_at >= 0).to(tl.int32), axis=0) - slots
        threshold = (held * 0).to(tl.int64)
        for step in range(48):
            bit = tl.full((), 1, tl.int64) << (47 - step)
            below = tl.sum((key < threshold + bit).to(tl.int32), axis=0)
            below += tl.sum((new_key < threshold + bit).to(tl.int32), axis=0)
            threshold += tl.where(below < surplus, bit, 0)
        # Without a surplus the threshold is 0, below every key; its maximum, 48 set bits, is below KEY_UPPER_BOUND.
        evicted = key <= threshold
        new_evicted = new_key <= threshold

        # The j-th new token that is not evicted takes the j-th free slot. The slots pass through the memory of `slot`.
        free = empty | evicted
        arrives = (new_at >= 0) & (new_evicted == 0)
        room = tl.sum(free.to(tl.int32), axis=0)
        free_rank = tl.cumsum(free.to(tl.int32), axis=0) - 1
        arrival_rank = tl.cumsum(arrives.to(tl.int32), axis=0) - 1
        placed = arrives & (arrival_rank < room)
        tl.store(slot + row * chunk + free_rank, c, mask=free & (free_rank < chunk))
        tl.debug_barrier()
        target = tl.load(slot + row * chunk + arrival_rank, mask=placed, other=-1)
        tl.debug_barrier()
        tl.store(slot + row * chunk + s, target, mask=s < chunk)
        tl.store(score_out + row * slots + target, new_worth, mask=placed)
        tl.store(position_out + row * slots + target, new_at, mask=placed)
        left = slots + tl.minimum(surplus, 0)
        tl.store(length + sequence, left.to(tl.int64), mask=row % heads == 0)

        # Write the rows.
        tl.debug_barrier()
        for i in range(chunk):
            to = tl.load(slot + row * chunk + i)
            keys = tl.load(new_k + (row * chunk + i) * D + d, mask=d < D)
            values = tl.load(new_v + (row * chunk + i) * E + d, mask=d < E)
            tl.store(k_out + (row * slots + to) * D + d, keys, mask=(d < D) & (to >= 0))
            tl.store(v_out + (row * slots + to) * E + d, values, mask=(d < E) & (to >= 0))
