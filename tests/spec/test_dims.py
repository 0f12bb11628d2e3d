"""Arithmetic over named dimensions."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ryzen_compile.errors import ShapeError
from ryzen_compile.spec.dim_expr import Arithmetic, bind_dims, evaluate, names_in, power_of_two, shape_of


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
    bind_dims("B H D", (2, 3, 8), known, label="x")
    bind_dims("B D//2 H-r", (2, 4, 1), known, label="y")
    assert known == {"r": 2, "B": 2, "H": 3, "D": 8}
    assert shape_of("H B*D ceil_div(D,3)", known) == (3, 16, 3)


def test_any_number_of_leading_dimensions() -> None:
    known: dict[str, Any] = {}
    bind_dims("... D", (2, 3, 5, 8), known, label="x")
    bind_dims("...", (2, 3, 5), known, label="y")
    assert known["ROWS"] == 30
    assert shape_of("... D//2", known) == (2, 3, 5, 4)
    alone: dict[str, Any] = {}
    bind_dims("... D", (8,), alone, label="x")
    assert (alone["ROWS"], shape_of("...", alone)) == (1, ())


@pytest.mark.parametrize(
    ("declared", "shape", "says"),
    [("B D", (2, 3, 4), r"x has 3 dimensions, and is declared as \(B D\)"), ("B B", (2, 3), "x is of size 3 in B, which is 2"),
     ("B B+1", (2, 4), r"x is of size 4 in B\+1, which is 3"), ("... A B C", (1, 2), "x has 2 dimensions")],
)  # fmt: skip
def test_contradictions_are_named(declared: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ShapeError, match=says):
        bind_dims(declared, shape, {}, label="x")


def test_two_tensors_of_other_beginnings() -> None:
    known: dict[str, Any] = {}
    bind_dims("... D", (2, 3, 8), known, label="x")
    for shape in ((2, 4), (2,)):
        with pytest.raises(ShapeError, match=r"y begins with \[2.*\], where another begins with \[2, 3\]"):
            bind_dims("...", shape, known, label="y")


class Symbol:
    """A dimension as TensorRT has it: `+ - * //` with itself on the left, and a comparison that says nothing."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _with(self, sign: str, other: Any) -> Symbol:
        assert type(other) in (int, Symbol)
        return Symbol(f"({self.text} {sign} {other.text if isinstance(other, Symbol) else other})")

    def __add__(self, other: Any) -> Symbol:
        return self._with("+", other)

    def __sub__(self, other: Any) -> Symbol:
        return self._with("-", other)

    def __mul__(self, other: Any) -> Symbol:
        return self._with("*", other)

    def __floordiv__(self, other: Any) -> Symbol:
        return self._with("//", other)

    def __lt__(self, other: Any) -> Symbol:
        return self._with("<", other)

    def __bool__(self) -> bool:
        raise AssertionError("nobody knows")


SYMBOLS = Arithmetic(
    ceil_div=lambda one, other: Symbol("ceil")._with("/", 0),
    minimum=lambda one, other: Symbol("min")._with("/", 0),
    maximum=lambda one, other: Symbol("max")._with("/", 0),
    constant=lambda number: Symbol(f"<{number}>"),
)


@pytest.mark.parametrize(
    ("text", "comes_to"),
    [("C + 2", "(C + 2)"), ("2 + C", "(C + 2)"), ("2 * C", "(C * 2)"), ("9 - C", "(<9> - C)"), ("9 // C", "(<9> // C)"),
     ("C * S", "(C * S)"), ("2 * 3 * C", "(C * 6)"), ("max(1, C)", "(max / 0)"), ("ceil_div(C, 4 % 3)", "(ceil / 0)")],
)  # fmt: skip
def test_what_can_be_asked_of_symbols(text: str, comes_to: str) -> None:
    assert evaluate(text, {"C": Symbol("C"), "S": Symbol("S")}, SYMBOLS).text == comes_to


@pytest.mark.parametrize(
    "text", ["C % 2", "5 % C", "C <= 4", "4 == C", "0.5 * C", "C + ratio", "power_of_two(C)", "min(C, 0.5)"]
)
def test_what_cannot_be_asked_of_symbols_says_so(text: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(f"`1 + max(2, {text})`: of dims that are known only at run time, `{text}`")):
        evaluate(f"1 + max(2, {text})", {"C": Symbol("C"), "ratio": 0.5}, SYMBOLS)


@pytest.mark.parametrize(
    ("lead", "rows"),
    [
        ((1, "S"), "(S * 1)"),
        (("S", 3), "(S * 3)"),
        (("S", "R"), "((S * R) * 1)"),
        ((2, "S", 3), "(S * 6)"),
        (("S",), "(S * 1)"),
    ],
)
def test_rows_of_leading_dimensions_some_of_which_are_symbols(lead: tuple[Any, ...], rows: str) -> None:
    shape = [Symbol(size) if isinstance(size, str) else size for size in lead]
    known: dict[str, Any] = {}
    bind_dims("... D", [*shape, 8], known, label="x")
    bind_dims("... 2*D", [*shape, Symbol("E")], known, label="y")
    assert (known["ROWS"].text, known["D"]) == (rows, 8)


def test_symbols_are_believed() -> None:
    known: dict[str, Any] = {}
    bind_dims("N", [Symbol("N")], known, label="x")
    bind_dims("2*N N%2 N", [7, 1, 3], known, label="y")
    assert known["N"].text == "N"
    with pytest.raises(KeyError, match="M"):
        bind_dims("M+1", [4], known, label="z")
