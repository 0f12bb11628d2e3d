# mypy: ignore-errors
"""Kernels of PageScoreBound and PageScoreCosine: one program per (sequence, head) and block of pages reads the pages once.

The pages stay in registers while the program iterates over the query heads that share them.
"""

import triton
import triton.language as tl

LARGE = tl.constexpr(2.0**50)
SMALL = tl.constexpr(2.0**-50)
UP = tl.constexpr(2.0**90)
DOWN = tl.constexpr(2.0**-90)


@triton.jit
def _locate_pages(filled, heads, pages, PAGES: tl.constexpr):
    """Return the head of a program, its pages, and which of them are in use."""
    head = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    return head, p, p < tl.minimum(tl.load(filled + head // heads), pages)


@triton.jit
def _load_pages(values, head, pages, p, used, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the rows of the pages `p` in float32; zeros for pages that are not in use."""
    d = tl.arange(0, BLOCK_D)
    mask = used[:, None] & (d < D)[None, :]
    return tl.load(values + ((head * pages + p) * D)[:, None] + d[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def _load_query(query, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return a query in float32, as a row."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(query + row * D + d, mask=d < D, other=0)[None, :].to(tl.float32)


@triton.jit
def _rescale(rows, element: tl.constexpr):
    """Return the rows, each scaled by a power of two so that its squares neither overflow nor underflow.

    Rows of float16 need no scaling.
    """
    if element != tl.float16:
        largest = tl.max(tl.abs(rows), axis=1)
        rows *= tl.where(largest > LARGE, DOWN, tl.where(largest < SMALL, UP, 1.0))[:, None]
    return rows


@triton.jit
def page_score_bound(
    query, low, high, filled,
    heads, group, pages,
    score,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGES: tl.constexpr, TILE_BYTES: tl.constexpr,
):  # fmt: skip
    """Compute upper bounds of the logits of `PAGES` pages of a head."""
    head, p, used = _locate_pages(filled, heads, pages, PAGES)
    least = _load_pages(low, head, pages, p, used, D, BLOCK_D)
    most = _load_pages(high, head, pages, p, used, D, BLOCK_D)
    best = tl.full((PAGES,), float("-inf"), tl.float32)
    for g in range(group):
        q = _load_query(query, head * group + g, D, BLOCK_D)
        up, down = tl.where(q > 0, q, 0.0), tl.where(q > 0, 0.0, q)
        bound = tl.sum(tl.fma(up, most, down * least), axis=1)
        best = tl.where(bound > best, bound, best)
    best = tl.where(used, best, float("-inf"))
    tl.store(score + head * pages + p, best, mask=p < pages)


@triton.jit
def page_score_cosine(
    query, centroid, filled,
    heads, group, pages,
    score,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGES: tl.constexpr, TILE_BYTES: tl.constexpr,
):  # fmt: skip
    """Compute the cosines between `PAGES` pages of a head and its queries."""
    head, p, used = _locate_pages(filled, heads, pages, PAGES)
    c = _rescale(_load_pages(centroid, head, pages, p, used, D, BLOCK_D), centroid.dtype.element_ty)
    norm = tl.sqrt_rn(tl.sum(c * c, axis=1))
    best = tl.full((PAGES,), float("-inf"), tl.float32)
    for g in range(group):
        q = _rescale(_load_query(query, head * group + g, D, BLOCK_D), centroid.dtype.element_ty)
        norms = norm * tl.sqrt_rn(tl.sum(q * q, axis=1))
        sane = (norms > 0) & (norms < float("inf"))
        cosine = tl.div_rn(tl.sum(q * c, axis=1), tl.where(sane, norms, 1.0))
        best = tl.maximum(best, tl.where(sane, cosine, 0.0))
    best = tl.where(used, best, float("-inf"))
    tl.store(score + head * pages + p, best, mask=p < pages)
