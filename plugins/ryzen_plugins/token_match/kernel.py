# mypy: ignore-errors
"""TokenMatch kernel: one program per block of list a iterates over list b in tiles and keeps the best match.

Rows are multiplied without normalization, half types on tensor cores with float32 accumulation; the product is then scaled by
both inverse norms. The best match is kept per column of a tile; columns are reduced once, at the end.
"""

import triton
import triton.language as tl

from ryzen_plugins._token_norms import accumulate_dot, inverse_norm, is_finite_norm, is_valid_size, squared_norm


@triton.jit
def _locate_tokens(metric, size, indices, sequence, tokens, i, count, d, D: tl.constexpr):
    """Return which of the tokens of a list at `i` are real, and pointers to their elements `d`."""
    token = tl.load(indices + sequence * count + i, mask=i < count, other=0)
    token = sequence * tokens + tl.minimum(tl.maximum(token, 0), tokens - 1)
    return is_valid_size(tl.load(size + token)), metric + token[:, None] * D + d[None, :]


@triton.jit
def token_match(
    metric, size, a, b,
    tokens, count_a, count_b,
    partner, similarity,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_A: tl.constexpr, SPAN: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Find the partners of BLOCK_A tokens of a sequence."""
    sequence = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    d = tl.arange(0, BLOCK_D)
    real_a, from_a = _locate_tokens(metric, size, a, sequence, tokens, i, count_a, d, D)
    rows_a = tl.load(from_a, mask=(d < D)[None, :], other=0.0)
    square_a = squared_norm(rows_a)
    for first_d in range(BLOCK_D, D, BLOCK_D):
        square_a += squared_norm(tl.load(from_a + first_d, mask=(first_d + d < D)[None, :], other=0.0))
    fine_a = is_finite_norm(square_a)
    scale_a = inverse_norm(square_a)

    best = tl.full([BLOCK_A, BLOCK_B], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK_A, BLOCK_B], tl.int32)
    for first_b in range(0, count_b, BLOCK_B):
        j = first_b + tl.arange(0, BLOCK_B)
        real_b, from_b = _locate_tokens(metric, size, b, sequence, tokens, j, count_b, d, D)
        rows_b = tl.load(from_b, mask=(d < D)[None, :], other=0.0)
        square_b = squared_norm(rows_b)
        product = accumulate_dot(rows_a, rows_b, tl.zeros([BLOCK_A, BLOCK_B], tl.float32))
        for first_d in range(BLOCK_D, D, BLOCK_D):
            more_a = tl.load(from_a + first_d, mask=(first_d + d < D)[None, :], other=0.0)
            more_b = tl.load(from_b + first_d, mask=(first_d + d < D)[None, :], other=0.0)
            square_b += squared_norm(more_b)
            product = accumulate_dot(more_a, more_b, product)
        cosine = product * scale_a[:, None] * inverse_norm(square_b)[None, :]
        cosine = tl.where(fine_a[:, None] & is_finite_norm(square_b)[None, :], cosine, -2.0)
        for_real = tl.where(real_b[None, :], cosine, -2.0)
        alike = tl.where(real_a[:, None], for_real, tl.where(real_b, 2.0, 3.0)[None, :])
        better = (alike > best) & (j < count_b)[None, :]
        best = tl.where(better, alike, best)
        best_at = tl.where(better, j[None, :], best_at)

    top = tl.max(best, axis=1)
    place = tl.min(tl.where(best == top[:, None], best_at, count_b), axis=1)
    found = tl.load(b + sequence * count_b + place, mask=i < count_a, other=0)
    found = tl.minimum(tl.maximum(found, 0), tokens - 1)
    tl.store(partner + sequence * count_a + i, found, mask=i < count_a)
    tl.store(similarity + sequence * count_a + i, top, mask=i < count_a)
