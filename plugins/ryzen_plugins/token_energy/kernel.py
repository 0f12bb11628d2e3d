# mypy: ignore-errors
"""TokenEnergy kernel: one program per block of tokens iterates over all tokens in tiles and sums the energies.

Rows are multiplied without normalization, half types on tensor cores with float32 accumulation; the product is then scaled by
both inverse norms. Sums are kept per column of a tile; columns are reduced once, at the end.
"""

import triton
import triton.language as tl

from ryzen_plugins._token_norms import accumulate_dot, inverse_norm, is_finite_norm, is_valid_size, squared_norm


@triton.jit
def token_energy(
    metric, size,
    tokens,
    energy,
    D: tl.constexpr, MARGIN: tl.constexpr, ALPHA: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, SPAN: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Compute the energies of BLOCK_I tokens of a sequence."""
    start = tl.program_id(1).to(tl.int64) * tokens
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.arange(0, BLOCK_D)
    real_i = is_valid_size(tl.load(size + start + i, mask=i < tokens, other=0.0))
    from_i = metric + (start + i)[:, None] * D + d[None, :]
    rows_i = tl.load(from_i, mask=(i < tokens)[:, None] & (d < D)[None, :], other=0.0)
    square_i = squared_norm(rows_i)
    for first_d in range(BLOCK_D, D, BLOCK_D):
        square_i += squared_norm(tl.load(from_i + first_d, mask=(i < tokens)[:, None] & (first_d + d < D)[None, :], other=0.0))
    fine_i = is_finite_norm(square_i)
    scale_i = inverse_norm(square_i)

    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    count = tl.zeros([BLOCK_J], tl.int32)
    for first_j in range(0, tokens, BLOCK_J):
        j = first_j + tl.arange(0, BLOCK_J)
        real_j = is_valid_size(tl.load(size + start + j, mask=j < tokens, other=0.0))
        from_j = metric + (start + j)[:, None] * D + d[None, :]
        rows_j = tl.load(from_j, mask=(j < tokens)[:, None] & (d < D)[None, :], other=0.0)
        square_j = squared_norm(rows_j)
        product = accumulate_dot(rows_i, rows_j, tl.zeros([BLOCK_I, BLOCK_J], tl.float32))
        for first_d in range(BLOCK_D, D, BLOCK_D):
            more_i = tl.load(from_i + first_d, mask=(i < tokens)[:, None] & (first_d + d < D)[None, :], other=0.0)
            more_j = tl.load(from_j + first_d, mask=(j < tokens)[:, None] & (first_d + d < D)[None, :], other=0.0)
            square_j += squared_norm(more_j)
            product = accumulate_dot(more_i, more_j, product)
        cosine = product * scale_i[:, None] * inverse_norm(square_j)[None, :]
        cosine = tl.where(fine_i[:, None] & is_finite_norm(square_j)[None, :], cosine, -2.0)
        worth = tl.where(cosine >= MARGIN, cosine, ALPHA * (tl.exp(cosine - MARGIN) - 1.0))
        total += tl.where(real_j[None, :] & (i[:, None] != j[None, :]), worth, 0.0)
        count += real_j.to(tl.int32)

    others = tl.maximum(tl.sum(count, axis=0) - 1, 1).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, axis=1), tl.zeros([BLOCK_I], tl.float32) + others)
    tl.store(energy + start + i, tl.where(real_i, mean, 2.0), mask=i < tokens)
