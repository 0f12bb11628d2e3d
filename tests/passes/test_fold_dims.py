"""Sizes as polynomials: whatever the symbols turn out to be, they compute as numbers do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from ryzen_compile.ir.analysis import dims as d
from ryzen_compile.ir.analysis.dims import SymbolicDim

VALUES = st.lists(st.integers(0, 50), min_size=3, max_size=3)


@st.composite
def sizes(draw: st.DrawFn) -> SymbolicDim:
    """A size over three symbols."""
    dim: SymbolicDim = draw(st.integers(-4, 4))
    for _ in range(draw(st.integers(0, 3))):
        part: SymbolicDim | None = draw(st.integers(-3, 3))
        for number in draw(st.lists(st.integers(0, 2), max_size=2)):
            assert part is not None
            part = d.multiply(part, d.symbol(number))
        assert part is not None
        total = d.add(dim, part)
        assert total is not None
        dim = total
    return dim


def value(dim: SymbolicDim, symbols: Sequence[int]) -> int:
    if isinstance(dim, int):
        return dim
    return sum(factor * math.prod(symbols[symbol] for symbol in product) for product, factor in dim)


@given(sizes(), sizes(), VALUES)
def test_sums_and_products_are_those_of_the_values(a: SymbolicDim, b: SymbolicDim, symbols: list[int]) -> None:
    total, product = d.add(a, b), d.multiply(a, b)
    assert total is not None
    assert value(total, symbols) == value(a, symbols) + value(b, symbols)
    assert product is None or value(product, symbols) == value(a, symbols) * value(b, symbols)


@given(sizes(), sizes(), sizes())
def test_equal_polynomials_are_equal_however_they_came_about(a: SymbolicDim, b: SymbolicDim, c: SymbolicDim) -> None:
    left, right = d.add(a, b), d.add(b, a)
    assert left == right
    assert left is not None
    distributed = [d.multiply(a, c), d.multiply(b, c)]
    if None not in distributed:
        assert d.multiply(left, c) == d.add(*distributed)  # type: ignore[arg-type]


@given(sizes(), sizes(), VALUES)
def test_a_quotient_leaves_no_rest(a: SymbolicDim, b: SymbolicDim, symbols: list[int]) -> None:
    quotient = d.divide(a, b)
    if quotient is not None and value(b, symbols):
        assert value(quotient, symbols) * value(b, symbols) == value(a, symbols)


@given(sizes(), sizes())
@example(0, d.symbol(0))
def test_a_product_is_divided_by_either_factor_that_is_one_term(a: SymbolicDim, b: SymbolicDim) -> None:
    product = d.multiply(a, b)
    if product is not None and b != 0 and (isinstance(b, int) or len(b) == 1):
        assert d.divide(product, b) == a


@given(sizes(), VALUES)
def test_no_value_lies_below_the_least(a: SymbolicDim, symbols: list[int]) -> None:
    least = d.lower_bound(a)
    assert least is None or least <= value(a, symbols)


def test_what_grows_beyond_bounds_is_given_up() -> None:
    large = d.multiply(d.symbol(0), 2**31 - 1)
    assert large is not None
    assert d.multiply(large, 2) is None
    assert d.product([large, 2, 3]) is None
    many: SymbolicDim = 0
    for number in range(d.MAX_TERMS):
        many = d.add(many, d.symbol(number)) or 0
    assert d.add(many, d.symbol(99)) is None


def test_none_of_no_dims_is_one() -> None:
    assert d.product([]) == 1
    assert d.divide(d.symbol(0), 0) is None
