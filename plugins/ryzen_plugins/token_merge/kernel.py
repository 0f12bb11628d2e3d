# mypy: ignore-errors
"""TokenMerge kernel: one program per block of slots finds the tokens of its slots and sums their rows in registers.

The targets of a sequence are read once, in groups of 64, to determine which groups contain tokens of the block. Those groups
are visited in order. Within a group, each iteration adds the next token of every slot, until none is left: an iteration
usually reads rows of many slots, and no row is read twice.
"""

import triton
import triton.language as tl

from ryzen_plugins._token_norms import is_valid_size

GROUP = tl.constexpr(64)
TOO_LARGE = tl.constexpr(2.0**96)


@triton.jit
def token_merge(
    x, size, target, slots,
    tokens, slot_count,
    y, size_out,
    D: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Merge the tokens of SLOTS slots of a sequence, BLOCK_D elements of each."""
    sequence = tl.program_id(1).to(tl.int64)
    start = sequence * tokens
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, GROUP)
    g = tl.arange(0, GROUPS)
    token = g[:, None] * GROUP + n[None, :]
    goes_to = tl.load(target + start + token, mask=token < tokens, other=-1) - tl.program_id(0) * SLOTS
    visited = tl.max(((goes_to >= 0) & (goes_to < SLOTS)).to(tl.int32), axis=1)

    total = tl.zeros([SLOTS, BLOCK_D], tl.float32)
    weight = tl.zeros([SLOTS], tl.float32)
    count = tl.zeros([SLOTS], tl.int32)
    group = tl.min(tl.where(visited > 0, g, GROUPS), axis=0)
    while group < GROUPS:
        here = group * GROUP + n
        to = tl.load(target + start + here, mask=here < tokens, other=-1)
        real = is_valid_size(tl.load(size + start + here, mask=here < tokens, other=0.0))
        mine = (to[None, :] == slot[:, None]) & real[None, :]
        pick = tl.min(tl.where(mine, n[None, :], GROUP), axis=1)
        while tl.min(pick, axis=0) < GROUP:
            found = pick < GROUP
            at = start + group * GROUP + pick
            share = tl.load(size + at, mask=found, other=0.0)
            row = tl.load(x + at[:, None] * D + d[None, :], mask=found[:, None] & (d < D)[None, :], other=0.0)
            row = row.to(tl.float32)
            # The first row of a slot is stored unweighted; it is weighted when a second row is added.
            part = row * share[:, None]
            part = tl.where(tl.abs(part) < TOO_LARGE, part, float("nan"))
            first = total * weight[:, None]
            first = tl.where(tl.abs(first) < TOO_LARGE, first, float("nan"))
            held = tl.where((count == 1)[:, None], first, total)
            held = tl.where((count == 0)[:, None], row, held + part)
            total = tl.where(found[:, None], held, total)
            weight += share
            count += found.to(tl.int32)
            pick = tl.min(tl.where(mine & (n[None, :] > pick[:, None]), n[None, :], GROUP), axis=1)
        group = tl.min(tl.where((visited > 0) & (g > group), g, GROUPS), axis=0)

    mean = tl.div_rn(total, tl.zeros([SLOTS, BLOCK_D], tl.float32) + weight[:, None])
    mean = tl.where((count > 1)[:, None], mean, total)
    to_y = y + (sequence * slot_count + slot)[:, None] * D + d[None, :]
    tl.store(to_y, mean.to(y.dtype.element_ty), mask=(slot < slot_count)[:, None] & (d < D)[None, :])
    tl.store(size_out + sequence * slot_count + slot, weight, mask=(slot < slot_count) & (tl.program_id(2) == 0))
