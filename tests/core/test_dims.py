"""Arithmetic over named dimensions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ryzen_compile.dims import bind, evaluate, names_in, power_of_two, shape_of
from ryzen_compile.errors import ShapeError


@pytest.mark.parametrize(
    ("text", "value"),
    [("C + 2 * S", 11), ("ceil_div(C, S)", 2), ("C // S", 1), ("C % S", 2), ("min(C, S)", 3), ("max(C - S, 1)", 2),
     ("power_of_two(C)", 8), ("C <= 5", True), ("C == S", False), ("0.5 * C", 2.5)],
)  # fmt: skip
def test_expressions(text: str, value: float) -> None:
    assert evaluate(text, {"C": 5, "S": 3}) == value


def test_names() -> None:
    assert names_in("ceil_div(C, ROWS) * min + 1") == {"C", "ROWS", "min"}


@pytest.mark.parametrize("text", ["C ** 2", "C.real", "f(C)", "C and S", "-C", "lambda: C", "__import__('os')", "'C'"])
def test_nothing_else_is_understood(text: str) -> None:
    with pytest.raises(ValueError, match="is not an expression over dimensions"):
        evaluate(text, {"C": 5, "S": 3})


def test_what_is_no_expression_says_so() -> None:
    with pytest.raises(ValueError, match="`C \\+` is not an expression"):
        names_in("C +")


@given(st.integers(1, 1 << 40))
def test_a_power_of_two_is_the_lowest_that_is_enough(number: int) -> None:
    power = power_of_two(number)
    assert power >= number
    assert power & (power - 1) == 0
    assert power == 1 or power // 2 < number


def test_dimensions_are_read_off_a_shape() -> None:
    known: dict[str, Any] = {"r": 2}
    bind("B H D", (2, 3, 8), known, what="x")
    bind("B D//2 H-r", (2, 4, 1), known, what="y")
    assert known == {"r": 2, "B": 2, "H": 3, "D": 8}
    assert shape_of("H B*D ceil_div(D,3)", known) == (3, 16, 3)


def test_any_number_of_leading_dimensions() -> None:
    known: dict[str, Any] = {}
    bind("... D", (2, 3, 5, 8), known, what="x")
    bind("...", (2, 3, 5), known, what="y")
    assert known["ROWS"] == 30
    assert shape_of("... D//2", known) == (2, 3, 5, 4)
    alone: dict[str, Any] = {}
    bind("... D", (8,), alone, what="x")
    assert (alone["ROWS"], shape_of("...", alone)) == (1, ())


@pytest.mark.parametrize(
    ("declared", "shape", "says"),
    [("B D", (2, 3, 4), r"x has 3 dimensions, and is declared as \(B D\)"), ("B B", (2, 3), "x is of size 3 in B, which is 2"),
     ("B B+1", (2, 4), r"x is of size 4 in B\+1, which is 3"), ("... A B C", (1, 2), "x has 2 dimensions")],
)  # fmt: skip
def test_contradictions_are_named(declared: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ShapeError, match=says):
        bind(declared, shape, {}, what="x")


def test_two_tensors_of_other_beginnings() -> None:
    known: dict[str, Any] = {}
    bind("... D", (2, 3, 8), known, what="x")
    for shape in ((2, 4), (2,)):
        with pytest.raises(ShapeError, match=r"y begins with \[2.*\], where another begins with \[2, 3\]"):
            bind("...", shape, known, what="y")
