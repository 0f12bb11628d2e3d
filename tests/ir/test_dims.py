"""Symbolic dims: arithmetic on polynomials matches arithmetic on numbers for all values of the symbols."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ryzen_compile.ir.analysis import dims as d
from ryzen_compile.ir.analysis.dims import SymbolicDim

VALUES = st.lists(st.integers(0, 50), min_size=3, max_size=3)


@st.composite
def symbolic_dims(draw: st.DrawFn) -> SymbolicDim:
    """Draw a polynomial over up to three symbols."""
    dim: SymbolicDim = draw(st.integers(-4, 4))
    for _ in range(draw(st.integers(0, 3))):
        term: SymbolicDim | None = draw(st.integers(-3, 3))
        for number in draw(st.lists(st.integers(0, 2), max_size=2)):
            assert term is not None
            term = d.multiply(term, d.symbol(number))
        assert term is not None
        total = d.add(dim, term)
        assert total is not None
        dim = total
    return dim


def value(dim: SymbolicDim, symbols: Sequence[int]) -> int:
    if isinstance(dim, int):
        return dim
    return sum(factor * math.prod(symbols[symbol] for symbol in product) for product, factor in dim)


@given(symbolic_dims(), symbolic_dims(), VALUES)
def test_sums_and_products_match_those_of_the_values(a: SymbolicDim, b: SymbolicDim, symbols: list[int]) -> None:
    total, product = d.add(a, b), d.multiply(a, b)
    assert total is not None
    assert value(total, symbols) == value(a, symbols) + value(b, symbols)
    assert product is None or value(product, symbols) == value(a, symbols) * value(b, symbols)


@given(symbolic_dims(), symbolic_dims(), symbolic_dims())
def test_equal_polynomials_have_equal_representations(a: SymbolicDim, b: SymbolicDim, c: SymbolicDim) -> None:
    left, right = d.add(a, b), d.add(b, a)
    assert left == right
    assert left is not None
    distributed = [d.multiply(a, c), d.multiply(b, c)]
    if None not in distributed:
        assert d.multiply(left, c) == d.add(*distributed)  # type: ignore[arg-type]


@given(symbolic_dims(), symbolic_dims(), VALUES)
def test_a_quotient_is_exact(a: SymbolicDim, b: SymbolicDim, symbols: list[int]) -> None:
    quotient = d.divide(a, b)
    if quotient is not None and value(b, symbols):
        assert value(quotient, symbols) * value(b, symbols) == value(a, symbols)


@given(symbolic_dims(), symbolic_dims())
@example(0, d.symbol(0))
def test_a_product_divided_by_a_single_term_factor_is_the_other_factor(a: SymbolicDim, b: SymbolicDim) -> None:
    product = d.multiply(a, b)
    if product is not None and b != 0 and (isinstance(b, int) or len(b) == 1):
        assert d.divide(product, b) == a


@given(symbolic_dims(), VALUES)
def test_no_value_is_below_the_lower_bound(a: SymbolicDim, symbols: list[int]) -> None:
    bound = d.lower_bound(a)
    assert bound is None or bound <= value(a, symbols)


def test_results_beyond_the_limits_are_none() -> None:
    large = d.multiply(d.symbol(0), 2**31 - 1)
    assert large is not None
    assert d.multiply(large, 2) is None
    assert d.product([large, 2, 3]) is None
    many: SymbolicDim = 0
    for number in range(d.MAX_TERMS):
        many = d.add(many, d.symbol(number)) or 0
    assert d.add(many, d.symbol(99)) is None


def test_the_empty_product_is_one_and_division_by_zero_is_none() -> None:
    assert d.product([]) == 1
    assert d.divide(d.symbol(0), 0) is None


@given(symbolic_dims(), symbolic_dims(), VALUES)
def test_the_sign_of_a_difference_holds_for_all_values(a: SymbolicDim, b: SymbolicDim, symbols: list[int]) -> None:
    difference, sign = value(a, symbols) - value(b, symbols), d.sign_of_difference(a, b)
    assert sign is None or sign == (difference > 0) - (difference < 0)


@pytest.mark.parametrize(("a", "b", "quotient"), [(7, 2, 3), (-7, 2, -3), (7, -2, -3), (-7, -2, 3), (7, 0, None)])
def test_the_truncated_quotient_rounds_toward_zero(a: int, b: int, quotient: int | None) -> None:
    assert d.truncated_quotient(a, b) == quotient
