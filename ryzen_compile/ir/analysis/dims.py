"""Symbolic dimensions: polynomials over symbols that are equal if and only if their terms are equal.

A `SymbolicDim` is an int or a polynomial in normal form: terms sorted by their symbols, without zero factors. A symbol is an
integer that is constant within one inference. A symbol with a number of at least 0 is a size, so it is at least 0.
"""

from __future__ import annotations

from collections.abc import Iterable

Polynomial = tuple[tuple[tuple[int, ...], int], ...]
"""One ((symbols of the product, ascending), factor) per term."""
SymbolicDim = int | Polynomial
SymbolicDims = tuple[SymbolicDim, ...]

MAX_FACTOR = 2**31
"""Polynomials with a factor of at least this magnitude are rejected: int64 arithmetic at run time could overflow."""
MAX_TERMS = 16
"""Polynomials with more terms are rejected."""


def symbol(number: int) -> Polynomial:
    """Return the symbol with this number as a polynomial; a negative number is a symbol that may be negative."""
    return (((number,), 1),)


def is_symbol(dim: SymbolicDim) -> bool:
    """Return whether `dim` is a single symbol."""
    return not isinstance(dim, int) and len(dim) == 1 and dim[0][1] == 1 and len(dim[0][0]) == 1


def may_be_negative(dim: SymbolicDim) -> bool:
    """Return whether `dim` is a negative number or contains a symbol that may be negative."""
    return dim < 0 if isinstance(dim, int) else any(number < 0 for product, _ in dim for number in product)


def _normalize(terms: dict[tuple[int, ...], int]) -> SymbolicDim | None:
    polynomial = tuple(sorted((product, factor) for product, factor in terms.items() if factor))
    if not polynomial:
        return 0
    if len(polynomial) == 1 and not polynomial[0][0]:
        return polynomial[0][1]
    if len(polynomial) > MAX_TERMS or any(abs(factor) >= MAX_FACTOR for _, factor in polynomial):
        return None
    return polynomial


def _terms(dim: SymbolicDim) -> Polynomial:
    return (((), dim),) if isinstance(dim, int) else dim


def add(a: SymbolicDim, b: SymbolicDim) -> SymbolicDim | None:
    """Return `a + b`, or None if it exceeds `MAX_TERMS` or `MAX_FACTOR`."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    terms = dict(_terms(a))
    for product, factor in _terms(b):
        terms[product] = terms.get(product, 0) + factor
    return _normalize(terms)


def multiply(a: SymbolicDim, b: SymbolicDim) -> SymbolicDim | None:
    """Return `a * b`, or None if it exceeds `MAX_TERMS` or `MAX_FACTOR`."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    terms: dict[tuple[int, ...], int] = {}
    for a_symbols, a_factor in _terms(a):
        for b_symbols, b_factor in _terms(b):
            product = tuple(sorted(a_symbols + b_symbols))
            terms[product] = terms.get(product, 0) + a_factor * b_factor
    return _normalize(terms)


def subtract(a: SymbolicDim, b: SymbolicDim) -> SymbolicDim | None:
    """Return `a - b`, or None if it exceeds `MAX_TERMS` or `MAX_FACTOR`."""
    negative = multiply(b, -1)
    return None if negative is None else add(a, negative)


def product(dims: Iterable[SymbolicDim]) -> SymbolicDim | None:
    """Return the product of `dims`, 1 for no dims, or None if it exceeds `MAX_TERMS` or `MAX_FACTOR`."""
    result: SymbolicDim | None = 1
    for dim in dims:
        result = None if result is None else multiply(result, dim)
    return result


def divide(a: SymbolicDim, b: SymbolicDim) -> SymbolicDim | None:
    """Return `a / b` if the division is exact for all values of the symbols, else None. `b` is assumed not to be 0."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if a == 0:
        return 0
    if a == b:
        return 1
    divisor = _terms(b)
    leading = max(divisor, key=_term_order)
    if not leading[1]:
        return None
    remainder, terms = dict(_terms(a)), dict[tuple[int, ...], int]()
    while remainder:
        if len(remainder) > MAX_TERMS:
            return None
        quotient = _divide_terms(max(remainder.items(), key=_term_order), leading)
        if quotient is None:
            return None
        symbols, factor = quotient
        terms[symbols] = factor
        for divisor_symbols, divisor_factor in divisor:
            product = tuple(sorted(symbols + divisor_symbols))
            remainder[product] = remainder.get(product, 0) - factor * divisor_factor
            if not remainder[product]:
                del remainder[product]
    return _normalize(terms)


def _term_order(term: tuple[tuple[int, ...], int]) -> tuple[int, tuple[int, ...]]:
    """Order terms by degree, then by symbols: a product with a third term keeps the order of two terms."""
    return len(term[0]), term[0]


def _divide_terms(
    dividend: tuple[tuple[int, ...], int], divisor: tuple[tuple[int, ...], int]
) -> tuple[tuple[int, ...], int] | None:
    """Return the quotient of two terms, or None if it is not exact."""
    remaining = list(dividend[0])
    for number in divisor[0]:
        if number not in remaining:
            return None
        remaining.remove(number)
    return None if dividend[1] % divisor[1] else (tuple(remaining), dividend[1] // divisor[1])


def truncated_quotient(a: int, b: int) -> int | None:
    """Return `a / b` rounded toward zero, as the ONNX op Div does for integers; None if `b` is 0."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else None


def lower_bound(dim: SymbolicDim) -> int | None:
    """Return a lower bound of `dim`, or None if there is none. Products of sizes are at least 0."""
    if isinstance(dim, int):
        return dim
    if may_be_negative(dim) or any(factor < 0 and product for product, factor in dim):
        return None
    return sum(factor for product, factor in dim if not product)


def sign_of_difference(a: SymbolicDim, b: SymbolicDim) -> int | None:
    """Return the sign of `a - b` if it is the same for all values of the symbols, else None."""
    difference = subtract(a, b)
    if difference is None:
        return None
    if isinstance(difference, int):
        return (difference > 0) - (difference < 0)
    opposite = multiply(difference, -1)
    if (bound := lower_bound(difference)) is not None and bound > 0:
        return 1
    if opposite is not None and (bound := lower_bound(opposite)) is not None and bound > 0:
        return -1
    return None
