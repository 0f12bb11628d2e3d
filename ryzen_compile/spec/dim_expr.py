"""Arithmetic over named dimensions: what `B H C D`, `ceil_div(C, ROWS)` and `sinks + recent <= C` say.

A declaration is text; the same text is worked out over numbers where shapes are known, and over TensorRT's symbols where
they are not.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ryzen_compile.errors import ShapeError

Number = Any
"""An integer, a float of an attribute, or a symbol: what stands for an integer that is known only when an engine runs."""


@dataclass(frozen=True)
class Arithmetic:
    """The functions that expressions may call; the operators are the numbers' and the symbols' own.

    A symbol has `+ - * //`, with itself on the left and a symbol or an integer on the right. `%`, comparisons, `power_of_two`
    and floats are for numbers alone: `evaluate` refuses them where a symbol takes part.
    """

    ceil_div: Callable[[Number, Number], Number]
    minimum: Callable[[Number, Number], Number]
    maximum: Callable[[Number, Number], Number]
    constant: Callable[[int], Number] = int
    """Makes a symbol of an integer, for the left side of `-` and `//` with a symbol on the right."""

    def functions(self) -> dict[str, Callable[..., Number]]:
        """Return them by the names that expressions have for them."""
        return {"ceil_div": self.ceil_div, "min": self.minimum, "max": self.maximum, "power_of_two": power_of_two}


def power_of_two(number: int) -> int:
    """Return the lowest power of two that is at least `number`, and at least 1; of a known number only."""
    return 1 << max(0, int(number) - 1).bit_length()


NUMERIC = Arithmetic(ceil_div=lambda number, by: -(-number // by), minimum=min, maximum=max)
"""Over numbers."""

_BINARY: dict[type[ast.AST], Callable[[Number, Number], Number]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}
_COMMUTATIVE = (ast.Add, ast.Mult)
"""Those whose sides may be exchanged."""
_COMPARE: dict[type[ast.AST], Callable[[Number, Number], bool]] = {
    ast.LtE: lambda a, b: bool(a <= b),
    ast.Lt: lambda a, b: bool(a < b),
    ast.GtE: lambda a, b: bool(a >= b),
    ast.Gt: lambda a, b: bool(a > b),
    ast.Eq: lambda a, b: bool(a == b),
}


@functools.cache
def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"`{text}` is not an expression over dimensions") from error


@functools.cache
def names_in(text: str) -> frozenset[str]:
    """Return the names that the expression `text` speaks of."""
    called = {node.func.id for node in ast.walk(_parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return frozenset(node.id for node in ast.walk(_parse(text)) if isinstance(node, ast.Name)) - called


def evaluate(text: str, values: Mapping[str, Number], arithmetic: Arithmetic = NUMERIC) -> Number:
    """Return what the expression `text` comes to.

    Raises KeyError for a name that is not in `known`, and ShapeError for what cannot be asked of symbols.
    """
    functions = arithmetic.functions()

    def value(node: ast.expr) -> Number:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name):
                return values[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                one, other = value(left), value(right)
                _check_symbols(text, node, (one, other), supported=not isinstance(op, ast.Mod))
                if _is_number(one) and not _is_number(other):
                    one, other = (other, one) if isinstance(op, _COMMUTATIVE) else (arithmetic.constant(one), other)
                return _BINARY[type(op)](one, other)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                one, other = value(left), value(right)
                _check_symbols(text, node, (one, other), supported=False)
                return _COMPARE[type(op)](one, other)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in functions:
                given = [*map(value, arguments)]
                _check_symbols(text, node, given, supported=name != "power_of_two")
                return functions[name](*given)
        raise ValueError(f"`{text}` is not an expression over dimensions: `{ast.unparse(node)}`")

    return value(_parse(text))


def _is_number(value: Number) -> bool:
    return isinstance(value, (int, float))


def _check_symbols(text: str, node: ast.expr, operands: Sequence[Number], *, supported: bool) -> None:
    """Refuse an operation that is not `possible` with symbols, or mixes them with floats."""
    if all(map(_is_number, operands)) or (supported and not any(isinstance(one, float) for one in operands)):
        return
    raise ShapeError(
        f"`{text}`: of dims that are known only at run time, `{ast.unparse(node)}` cannot be worked out; "
        "what can is + - * // and ceil_div, min, max over whole numbers",
        hint="fix those dimensions, or declare the op without it",
    )


def bind_dims(declared: str, shape: Sequence[Number], dims: dict[str, Number], *, label: str) -> None:
    """Read the dimensions `declared`, such as `B H C D` or `... D`, off `shape` into `known`.

    A leading `...` is any number of dimensions, known as `...`; their product is known as `ROWS`. Symbols are believed to be
    what is declared. Raises ShapeError where the rank is another, or a dimension is not what it is already known to be.
    """
    tokens = declared.split()
    if tokens[:1] == ["..."]:
        rest = tokens[1:]
        if len(shape) < len(rest):
            raise ShapeError(f"{label} has {len(shape)} dimensions, and is declared as ({declared})")
        lead = tuple(shape[: len(shape) - len(rest)])
        earlier = dims.setdefault("...", lead)
        if len(earlier) != len(lead) or any(_differ(one, other) for one, other in zip(earlier, lead, strict=True)):
            raise ShapeError(f"{label} begins with {list(lead)}, where another begins with {list(dims['...'])}")
        symbols = [size for size in lead if not _is_number(size)]
        dims["ROWS"] = functools.reduce(operator.mul, [*symbols, math.prod(filter(_is_number, lead))])
        shape, tokens = shape[len(lead) :], rest
    if len(shape) != len(tokens):
        raise ShapeError(f"{label} has {len(shape)} dimensions, and is declared as ({declared})")
    for token, size in zip(tokens, shape, strict=True):
        if token.isidentifier():
            expected = dims.setdefault(token, size)
        elif all(_is_number(dims[name]) for name in names_in(token)):
            expected = evaluate(token, dims)
        else:
            continue
        if _differ(size, expected):
            raise ShapeError(f"{label} is of size {size} in {token}, which is {expected} here", hint=f"declared: ({declared})")


def _differ(one: Number, other: Number) -> bool:
    return isinstance(one, int) and isinstance(other, int) and one != other


def shape_of(declared: str, dims: Mapping[str, Number], arithmetic: Arithmetic = NUMERIC) -> tuple[Number, ...]:
    """Return the shape that `declared` means where the dimensions are `known`."""
    shape: list[Number] = []
    for token in declared.split():
        if token == "...":
            shape += dims["..."]
        else:
            shape.append(evaluate(token, dims, arithmetic))
    return tuple(shape)
