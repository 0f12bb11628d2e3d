"""Dimension expressions: parsing and evaluation of `B H C D`, `ceil_div(C, ROWS)` and `sinks + recent <= C`.

Op declarations state shapes and constraints as text. The same text is evaluated over integers if the shapes are static, and
over TensorRT's symbolic dimension expressions if they are dynamic.
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
"""An integer, a float attribute, or a symbol: a placeholder for an integer that is known only at run time."""


@dataclass(frozen=True)
class Arithmetic:
    """The functions that expressions may call; operators are those of the numbers and symbols themselves.

    A symbol supports `+ - * //` as the left operand, with a symbol or an integer on the right. `%`, comparisons,
    `power_of_two` and floats are supported for numbers only: `evaluate` raises ShapeError if an operand is a symbol.
    """

    ceil_div: Callable[[Number, Number], Number]
    minimum: Callable[[Number, Number], Number]
    maximum: Callable[[Number, Number], Number]
    constant: Callable[[int], Number] = int
    """Convert an integer to a symbol: the left operand of `-` and `//` if the right operand is a symbol."""

    def functions(self) -> dict[str, Callable[..., Number]]:
        """Return the functions by their names in expressions."""
        return {"ceil_div": self.ceil_div, "min": self.minimum, "max": self.maximum, "power_of_two": power_of_two}


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least max(`number`, 1). Symbols are not supported."""
    return 1 << max(0, int(number) - 1).bit_length()


NUMERIC = Arithmetic(ceil_div=lambda number, divisor: -(-number // divisor), minimum=min, maximum=max)
"""Arithmetic over numbers."""

_BINARY: dict[type[ast.AST], Callable[[Number, Number], Number]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}
_COMMUTATIVE = (ast.Add, ast.Mult)
"""Operators whose operands may be swapped."""
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
        raise ValueError(f"`{text}` is not a valid dimension expression") from error


@functools.cache
def names_in(text: str) -> frozenset[str]:
    """Return the names of dims and attributes that the expression `text` refers to."""
    function_names = {
        node.func.id for node in ast.walk(_parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return frozenset(node.id for node in ast.walk(_parse(text)) if isinstance(node, ast.Name)) - function_names


def evaluate(text: str, values: Mapping[str, Number], arithmetic: Arithmetic = NUMERIC) -> Number:
    """Return the value of the expression `text`.

    Raises KeyError for a name that is not in `values`, ShapeError for an operation that symbols do not support, and ValueError
    for an invalid expression.
    """
    functions = arithmetic.functions()

    def value(node: ast.expr) -> Number:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name):
                return values[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                a, b = value(left), value(right)
                _check_symbols(text, node, (a, b), supported=not isinstance(op, ast.Mod))
                if _is_number(a) and not _is_number(b):
                    a, b = (b, a) if isinstance(op, _COMMUTATIVE) else (arithmetic.constant(a), b)
                return _BINARY[type(op)](a, b)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                a, b = value(left), value(right)
                _check_symbols(text, node, (a, b), supported=False)
                return _COMPARE[type(op)](a, b)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in functions:
                operands = [*map(value, arguments)]
                _check_symbols(text, node, operands, supported=name != "power_of_two")
                return functions[name](*operands)
        raise ValueError(f"`{text}` is not a valid dimension expression: `{ast.unparse(node)}` is not supported")

    return value(_parse(text))


def _is_number(value: Number) -> bool:
    return isinstance(value, (int, float))


def _check_symbols(text: str, node: ast.expr, operands: Sequence[Number], *, supported: bool) -> None:
    """Raise ShapeError if a symbol is used in an operation that is not `supported`, or together with a float."""
    if all(map(_is_number, operands)) or (supported and not any(isinstance(operand, float) for operand in operands)):
        return
    raise ShapeError(
        f"`{text}`: `{ast.unparse(node)}` is not supported for dynamic dims; "
        "supported are + - * // and ceil_div, min, max over integers",
        hint="make those dims static, or declare the op without this expression",
    )


def bind_dims(declared: str, shape: Sequence[Number], dims: dict[str, Number], *, label: str) -> None:
    """Match `shape` against the declared dims, such as `B H C D` or `... D`, and add the sizes to `dims`.

    A leading `...` matches any number of dimensions; `dims["..."]` is their sizes and `dims["ROWS"]` their product. Symbols
    are not checked. Raises ShapeError if the rank differs, or a size contradicts `dims`. `label` names the tensor in messages.
    """
    tokens = declared.split()
    if tokens[:1] == ["..."]:
        trailing = tokens[1:]
        if len(shape) < len(trailing):
            raise ShapeError(f"{label} has {len(shape)} dimensions, but is declared as ({declared})")
        lead = tuple(shape[: len(shape) - len(trailing)])
        previous = dims.setdefault("...", lead)
        if len(previous) != len(lead) or any(_differ(a, b) for a, b in zip(previous, lead, strict=True)):
            raise ShapeError(f"{label} has leading dims {list(lead)}, but another tensor has {list(dims['...'])}")
        symbols = [size for size in lead if not _is_number(size)]
        dims["ROWS"] = functools.reduce(operator.mul, [*symbols, math.prod(filter(_is_number, lead))])
        shape, tokens = shape[len(lead) :], trailing
    if len(shape) != len(tokens):
        raise ShapeError(f"{label} has {len(shape)} dimensions, but is declared as ({declared})")
    for token, size in zip(tokens, shape, strict=True):
        if token.isidentifier():
            expected = dims.setdefault(token, size)
        elif all(_is_number(dims[name]) for name in names_in(token)):
            expected = evaluate(token, dims)
        else:
            continue
        if _differ(size, expected):
            raise ShapeError(f"{label} has size {size} in dim {token}, expected {expected}", hint=f"declared: ({declared})")


def _differ(a: Number, b: Number) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def shape_of(declared: str, dims: Mapping[str, Number], arithmetic: Arithmetic = NUMERIC) -> tuple[Number, ...]:
    """Return the shape that the declared dims evaluate to, given the sizes in `dims`."""
    shape: list[Number] = []
    for token in declared.split():
        if token == "...":
            shape += dims["..."]
        else:
            shape.append(evaluate(token, dims, arithmetic))
    return tuple(shape)
