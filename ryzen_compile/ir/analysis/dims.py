"""Sizes that are not known yet: polynomials over symbols, equal exactly where their terms are.

A `Dim` is an int, or a polynomial in its one normal form: terms ordered by their symbols, none with the factor 0. A symbol
stands for one size of one run, so it is never negative, and it may be 0.
"""

from __future__ import annotations

from collections.abc import Iterable

Polynomial = tuple[tuple[tuple[int, ...], int], ...]
"""((symbols of the product, ascending), factor) for each term."""
SymbolicDim = int | Polynomial
SymbolicDims = tuple[SymbolicDim, ...]

MAX_FACTOR = 2**31
"""Factors from here on are given up: int64 arithmetic at run time could wrap around."""
MAX_TERMS = 16


def symbol(number: int) -> Polynomial:
    """Return the symbol of that number."""
    return (((number,), 1),)


def _normalize(terms: dict[tuple[int, ...], int]) -> SymbolicDim | None:
    kept = tuple(sorted((product, factor) for product, factor in terms.items() if factor))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    if len(kept) > MAX_TERMS or any(abs(factor) >= MAX_FACTOR for _, factor in kept):
        return None
    return kept


def _terms(dim: SymbolicDim) -> Polynomial:
    return (((), dim),) if isinstance(dim, int) else dim


def add(a: SymbolicDim, b: SymbolicDim) -> SymbolicDim | None:
    """Return `a + b`, or None where the sum is too large to keep."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    terms = dict(_terms(a))
    for product, factor in _terms(b):
        terms[product] = terms.get(product, 0) + factor
    return _normalize(terms)


def multiply(a: SymbolicDim, b: SymbolicDim) -> SymbolicDim | None:
    """Return `a * b`, or None where the product is too large to keep."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    terms: dict[tuple[int, ...], int] = {}
    for left, factor in _terms(a):
        for right, other in _terms(b):
            product = tuple(sorted(left + right))
            terms[product] = terms.get(product, 0) + factor * other
    return _normalize(terms)


def product(dims: Iterable[SymbolicDim]) -> SymbolicDim | None:
    """Return the product of `dims`, 1 where there are none."""
    result: SymbolicDim | None = 1
    for dim in dims:
        result = None if result is None else multiply(result, dim)
    return result


def divide(a: SymbolicDim, b: SymbolicDim) -> SymbolicDim | None:
    """Return `a / b` where that leaves no rest whatever the symbols are, else None. `b` is taken not to be 0."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if a == 0:
        return 0
    if a == b:
        return 1
    divisor = _terms(b)
    if len(divisor) != 1 or not divisor[0][1]:
        return None
    symbols, factor = divisor[0]
    terms: dict[tuple[int, ...], int] = {}
    for left, value in _terms(a):
        rest = list(left)
        for symbol_ in symbols:
            if symbol_ not in rest:
                return None
            rest.remove(symbol_)
        if value % factor:
            return None
        terms[tuple(rest)] = value // factor
    return _normalize(terms)


def lower_bound(dim: SymbolicDim) -> int | None:
    """Return the smallest value that `dim` can take, or None where there is no bound."""
    if isinstance(dim, int):
        return dim
    if any(factor < 0 and product for product, factor in dim):
        return None
    return sum(factor for product, factor in dim if not product)
