"""Parsing and evaluation of dimension expressions."""

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
def test_evaluate(text: str, value: float) -> None:
    assert evaluate(text, {"C": 5, "S": 3}) == value


def test_names_in_excludes_called_functions() -> None:
    assert names_in("ceil_div(C, ROWS) * min + 1") == {"C", "ROWS", "min"}


@pytest.mark.parametrize("text", ["C ** 2", "C.real", "f(C)", "C and S", "-C", "lambda: C", "__import__('os')", "'C'"])
def test_other_syntax_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="is not a valid dimension expression"):
        evaluate(text, {"C": 5, "S": 3})


def test_invalid_syntax_is_rejected() -> None:
    with pytest.raises(ValueError, match="`C \\+` is not a valid dimension expression"):
        names_in("C +")


@given(st.integers(1, 1 << 40))
def test_power_of_two_returns_the_smallest_sufficient_power(number: int) -> None:
    power = power_of_two(number)
    assert power >= number
    assert power & (power - 1) == 0
    assert power == 1 or power // 2 < number


def test_bind_dims_reads_sizes_from_shapes() -> None:
    dims: dict[str, Any] = {"r": 2}
    bind_dims("B H D", (2, 3, 8), dims, label="x")
    bind_dims("B D//2 H-r", (2, 4, 1), dims, label="y")
    assert dims == {"r": 2, "B": 2, "H": 3, "D": 8}
    assert shape_of("H B*D ceil_div(D,3)", dims) == (3, 16, 3)


def test_ellipsis_matches_any_number_of_leading_dims() -> None:
    dims: dict[str, Any] = {}
    bind_dims("... D", (2, 3, 5, 8), dims, label="x")
    bind_dims("...", (2, 3, 5), dims, label="y")
    assert dims["ROWS"] == 30
    assert shape_of("... D//2", dims) == (2, 3, 5, 4)
    vector_dims: dict[str, Any] = {}
    bind_dims("... D", (8,), vector_dims, label="x")
    assert (vector_dims["ROWS"], shape_of("...", vector_dims)) == (1, ())


@pytest.mark.parametrize(
    ("declared", "shape", "message"),
    [("B D", (2, 3, 4), r"x has 3 dimensions, but is declared as \(B D\)"),
     ("B B", (2, 3), "x has size 3 in dim B, expected 2"),
     ("B B+1", (2, 4), r"x has size 4 in dim B\+1, expected 3"), ("... A B C", (1, 2), "x has 2 dimensions")],
)  # fmt: skip
def test_contradictory_shapes_are_rejected(declared: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        bind_dims(declared, shape, {}, label="x")


def test_tensors_with_different_leading_dims_are_rejected() -> None:
    dims: dict[str, Any] = {}
    bind_dims("... D", (2, 3, 8), dims, label="x")
    for shape in ((2, 4), (2,)):
        with pytest.raises(ShapeError, match=r"y has leading dims \[2.*\], but another tensor has \[2, 3\]"):
            bind_dims("...", shape, dims, label="y")


class Symbol:
    """A symbolic dim like TensorRT's that supports `+ - * //` as the left operand, and comparisons without a truth value."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _binary(self, sign: str, other: Any) -> Symbol:
        assert type(other) in (int, Symbol)
        return Symbol(f"({self.text} {sign} {other.text if isinstance(other, Symbol) else other})")

    def __add__(self, other: Any) -> Symbol:
        return self._binary("+", other)

    def __sub__(self, other: Any) -> Symbol:
        return self._binary("-", other)

    def __mul__(self, other: Any) -> Symbol:
        return self._binary("*", other)

    def __floordiv__(self, other: Any) -> Symbol:
        return self._binary("//", other)

    def __lt__(self, other: Any) -> Symbol:
        return self._binary("<", other)

    def __bool__(self) -> bool:
        raise AssertionError("the truth value of a symbolic comparison was used")


SYMBOLS = Arithmetic(
    ceil_div=lambda a, b: Symbol("ceil")._binary("/", 0),
    minimum=lambda a, b: Symbol("min")._binary("/", 0),
    maximum=lambda a, b: Symbol("max")._binary("/", 0),
    constant=lambda number: Symbol(f"<{number}>"),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("C + 2", "(C + 2)"), ("2 + C", "(C + 2)"), ("2 * C", "(C * 2)"), ("9 - C", "(<9> - C)"), ("9 // C", "(<9> // C)"),
     ("C * S", "(C * S)"), ("2 * 3 * C", "(C * 6)"), ("max(1, C)", "(max / 0)"), ("ceil_div(C, 4 % 3)", "(ceil / 0)")],
)  # fmt: skip
def test_supported_operations_on_symbols(text: str, expected: str) -> None:
    assert evaluate(text, {"C": Symbol("C"), "S": Symbol("S")}, SYMBOLS).text == expected


@pytest.mark.parametrize(
    "text", ["C % 2", "5 % C", "C <= 4", "4 == C", "0.5 * C", "C + ratio", "power_of_two(C)", "min(C, 0.5)"]
)
def test_unsupported_operations_on_symbols_are_rejected(text: str) -> None:
    message = f"`1 + max(2, {text})`: `{text}` is not supported for dynamic dims"
    with pytest.raises(ShapeError, match=re.escape(message)):
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
def test_rows_is_the_product_of_static_and_symbolic_leading_dims(lead: tuple[Any, ...], rows: str) -> None:
    shape = [Symbol(size) if isinstance(size, str) else size for size in lead]
    dims: dict[str, Any] = {}
    bind_dims("... D", [*shape, 8], dims, label="x")
    bind_dims("... 2*D", [*shape, Symbol("E")], dims, label="y")
    assert (dims["ROWS"].text, dims["D"]) == (rows, 8)


def test_symbols_are_not_checked() -> None:
    dims: dict[str, Any] = {}
    bind_dims("N", [Symbol("N")], dims, label="x")
    bind_dims("2*N N%2 N", [7, 1, 3], dims, label="y")
    assert dims["N"].text == "N"
    with pytest.raises(KeyError, match="M"):
        bind_dims("M+1", [4], dims, label="z")
