# mypy: ignore-errors
"""Kernels of KVCompact and KVCompactRotary: one program per (sequence, head) and block of rows gathers the rows in one pass.

All loads of a program are issued before any computation: whether a slot is filled masks the loaded rows, not their addresses,
so that the loads depend only on the index.
"""

import triton
import triton.language as tl

TURN_HIGH = tl.constexpr(2734261102)
"""1 / (2 pi) in units of 2**-66: the upper 32 of its 64 bits."""
TURN_LOW = tl.constexpr(1313084714)


@triton.jit
def _load_slots(index, head, m, slots, kept):
    """Return the slots that become the rows `m`, and which of them are in range."""
    slot = tl.load(index + head * kept + m, mask=m < kept, other=-1)
    return slot, (slot >= 0) & (slot < slots)


@triton.jit
def _load_state(score, position, head, slot, inside, slots):
    """Return the scores and positions of the slots; the position is -1 if a slot is out of range."""
    worth = tl.load(score + head * slots + slot, mask=inside, other=0.0)
    return worth, tl.load(position + head * slots + slot, mask=inside, other=-1)


@triton.jit
def _store_state(score_out, position_out, score, position, occupied, head, m, kept):
    """Store scores and positions of the rows `m`."""
    tl.store(score_out + head * kept + m, tl.where(occupied, score, 0.0), mask=m < kept)
    tl.store(position_out + head * kept + m, tl.where(occupied, position, -1), mask=m < kept)


@triton.jit
def _load_rows(values, head, slot, inside, slots, first, COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return `COUNT` elements, starting at `first`, of the rows `slot`, which have `SIZE` elements each."""
    d = tl.arange(0, BLOCK)
    mask = inside[:, None] & (d < COUNT)[None, :]
    return tl.load(values + ((head * slots + slot) * SIZE)[:, None] + (first + d)[None, :], mask=mask, other=0)


@triton.jit
def _store_rows(values, rows, head, m, kept, first, COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store elements returned by `_load_rows` as the rows `m`."""
    d = tl.arange(0, BLOCK)
    mask = (m < kept)[:, None] & (d < COUNT)[None, :]
    tl.store(values + ((head * kept + m) * SIZE)[:, None] + (first + d)[None, :], rows, mask=mask)


@triton.jit
def _turns_per_position(frequency):
    """Return the turns per position of a frequency in radians per position, modulo 1, in units of 2**-64."""
    bits = frequency.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 0xFF) - 150
    mantissa = tl.where((exponent > -150) & (exponent < -18), (bits & 0x7FFFFF) | 0x800000, 0).to(tl.int64)
    upper = mantissa * tl.full((), TURN_HIGH, tl.int64)
    upper = (upper << tl.maximum(exponent + 30, 0).to(tl.int64)) >> tl.minimum(tl.maximum(-30 - exponent, 0), 63).to(tl.int64)
    lower = (mantissa * tl.full((), TURN_LOW, tl.int64)) >> tl.minimum(tl.maximum(2 - exponent, 0), 63).to(tl.int64)
    return tl.where(bits < 0, -(upper + lower), upper + lower)


@triton.jit
def _cos_sin(turn):
    """Return cosine and sine, each within 1e-7, of an angle in turns in units of 2**-32."""
    quarter = (turn + 536870912) >> 30
    t = (turn - (quarter << 30)).to(tl.float32) * 2.3283064365386963e-10
    z = t * t
    s = tl.fma(z, tl.fma(z, tl.fma(z, -75.401611328125, 81.59254455566406), -41.3416633605957), 6.2831854820251465) * t
    c = tl.fma(z, tl.fma(z, 59.4241065978904, -85.44882202148438), 64.93936920166016)
    c = tl.fma(z, tl.fma(z, c, -19.739208221435547), 1.0)
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -cos, cos), tl.where((quarter & 2) != 0, -sin, sin)


@triton.jit
def kv_compact(
    k, v, score, position, index,
    slots, kept,
    k_out, v_out, score_out, position_out,
    D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_BYTES: tl.constexpr,
):  # fmt: skip
    """Gather `ROWS` rows of a head."""
    head = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot, inside = _load_slots(index, head, m, slots, kept)
    keys = _load_rows(k, head, slot, inside, slots, 0, D, D, BLOCK_D)
    values = _load_rows(v, head, slot, inside, slots, 0, E, E, BLOCK_E)
    worth, at = _load_state(score, position, head, slot, inside, slots)
    held = at >= 0
    _store_rows(k_out, tl.where(held[:, None], keys, tl.zeros_like(keys)), head, m, kept, 0, D, D, BLOCK_D)
    _store_rows(v_out, tl.where(held[:, None], values, tl.zeros_like(values)), head, m, kept, 0, E, E, BLOCK_E)
    _store_state(score_out, position_out, worth, at, held, head, m, kept)


@triton.jit
def kv_compact_rotary(
    k, v, score, position, index, frequency,
    slots, kept,
    k_out, v_out, score_out, position_out,
    D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr, TILE_BYTES: tl.constexpr,
):  # fmt: skip
    """Gather `ROWS` rows of a head, and rotate the first `2 F` elements of their keys."""
    head = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot, inside = _load_slots(index, head, m, slots, kept)
    if INTERLEAVED:
        both = _load_rows(k, head, slot, inside, slots, 0, 2 * F, D, 2 * BLOCK_F)
        x, y = tl.split(tl.reshape(both, (ROWS, BLOCK_F, 2)))
    else:
        x = _load_rows(k, head, slot, inside, slots, 0, F, D, BLOCK_F)
        y = _load_rows(k, head, slot, inside, slots, F, F, D, BLOCK_F)
    if D > 2 * F:
        rest = _load_rows(k, head, slot, inside, slots, 2 * F, D - 2 * F, D, BLOCK_REST)
    values = _load_rows(v, head, slot, inside, slots, 0, E, E, BLOCK_E)
    worth, at = _load_state(score, position, head, slot, inside, slots)
    f = tl.arange(0, BLOCK_F)
    turn = _turns_per_position(tl.load(frequency + f, mask=f < F, other=0.0))

    # Whole turns overflow the 64-bit product.
    held = at >= 0
    distance = tl.where(held, m - at, 0).to(tl.int64)
    cos, sin = _cos_sin(((distance[:, None] * turn[None, :]) >> 32).to(tl.int32))
    x32, y32 = x.to(tl.float32), y.to(tl.float32)
    new_x = tl.where(held[:, None], x32 * cos - y32 * sin, 0.0).to(x.dtype)
    new_y = tl.where(held[:, None], y32 * cos + x32 * sin, 0.0).to(x.dtype)
    if INTERLEAVED:
        both = tl.reshape(tl.join(new_x, new_y), (ROWS, 2 * BLOCK_F))
        _store_rows(k_out, both, head, m, kept, 0, 2 * F, D, 2 * BLOCK_F)
    else:
        _store_rows(k_out, new_x, head, m, kept, 0, F, D, BLOCK_F)
        _store_rows(k_out, new_y, head, m, kept, F, F, D, BLOCK_F)
    if D > 2 * F:
        rest = tl.where(held[:, None], rest, tl.zeros_like(rest))
        _store_rows(k_out, rest, head, m, kept, 2 * F, D - 2 * F, D, BLOCK_REST)
    _store_rows(v_out, tl.where(held[:, None], values, tl.zeros_like(values)), head, m, kept, 0, E, E, BLOCK_E)
    _store_state(score_out, position_out, worth, m, held, head, m, kept)
