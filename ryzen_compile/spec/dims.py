"""Dims of an interface: numbers, names, and sums such as `past+seq`.

Only this module parses dim names. `dim_expr` parses the expressions in op declarations, such as `ceil_div(C, ROWS)`.
"""

from __future__ import annotations

from collections.abc import Mapping

Dim = int | str
"""A fixed size, or the name of a dynamic size: equal names have equal sizes. `past+seq` is the sum of two named dims."""


def dim_terms(dim: Dim) -> tuple[Dim, ...]:
    """Return the terms of the sum `dim`: numbers and names, without spaces around them."""
    if isinstance(dim, int):
        return (dim,)
    terms = (term.strip() for term in dim.split("+"))
    return tuple(int(term) if term.isdecimal() else term for term in terms)


def dim_names(dim: Dim) -> tuple[str, ...]:
    """Return the names in the sum `dim`, in order; empty for a number."""
    return tuple(term for term in dim_terms(dim) if isinstance(term, str))


def factor_names(dim: Dim) -> tuple[str, ...]:
    """Return the names in `dim` like `dim_names`, with those of products such as `batch*seq`, which exporters write."""
    return tuple(factor.strip() for name in dim_names(dim) for factor in name.split("*"))


def resolve_dim(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    """Return the size of `dim`, given the sizes of named dims; None if a name has no size."""
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    terms = dim_terms(dim)
    resolved = [size for term in terms if (size := term if isinstance(term, int) else sizes.get(term)) is not None]
    return sum(resolved) if len(terms) > 1 and len(resolved) == len(terms) else None
