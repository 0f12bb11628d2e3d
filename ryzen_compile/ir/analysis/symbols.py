"""Symbols for dynamic dims: the named dims of a model, fresh symbols, quotients, and symbolic broadcasting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from ryzen_compile.ir.analysis import dims as d
from ryzen_compile.ir.analysis.dims import SymbolicDim, SymbolicDims
from ryzen_compile.spec.dims import dim_terms, factor_names

PartialDims = tuple[SymbolicDim | None, ...]
"""The dims of a tensor of known rank; None for each unknown dim."""


class SymbolTable:
    """Allocates symbols: one per dim name of the model, one per quotient that is no polynomial, and fresh ones."""

    def __init__(self, *, assume_nonempty: bool = False, names_are_sums: bool = False) -> None:
        """Create an empty table. Without the assumptions, all results follow from the ONNX specification.

        Args:
            assume_nonempty: Whether a symbol in the target of a Reshape is assumed not to be 0. In ONNX, 0 copies the input
                dim instead, so without the assumption such an output dim is unknown. It is wrong for empty tensors only.
            names_are_sums: Whether the dim `past+seq` is the sum of the dims `past` and `seq`, as in an interface. In ONNX,
                it is a name like any other.
        """
        self.assume_nonempty, self._names_are_sums = assume_nonempty, names_are_sums
        self._numbers = itertools.count()
        self.dims_by_name: dict[str, SymbolicDim] = {}
        self._names: dict[SymbolicDim, str] = {}
        """Dim -> the first name that was declared for it."""
        self._quotients: dict[tuple[SymbolicDim, SymbolicDim], SymbolicDim] = {}
        self._operands: dict[SymbolicDim, tuple[SymbolicDim, SymbolicDim]] = {}
        """The symbol of a quotient -> its dividend and divisor."""

    def fresh(self) -> SymbolicDim:
        """Return a new symbol for a size."""
        return d.symbol(next(self._numbers))

    def fresh_integer(self) -> SymbolicDim:
        """Return a new symbol for an integer that may be negative."""
        return d.symbol(-1 - next(self._numbers))

    def or_fresh(self, dim: SymbolicDim | None) -> SymbolicDim:
        """Return `dim`, or a fresh symbol if it is None."""
        return self.fresh() if dim is None else dim

    def declared_dim(self, dim: object) -> SymbolicDim:
        """Return the dim of a declared shape; equal names have equal sizes in ONNX."""
        if isinstance(dim, int):
            return dim if dim > 0 else self.fresh()
        name = dim.value if isinstance(dim, ir.SymbolicDim) else None
        return self.fresh() if name is None else self.named_dim(name)

    def named_dim(self, name: str) -> SymbolicDim:
        """Return the dim with this name."""
        if name not in self.dims_by_name:
            dim = self._sum_of_names(name)
            self.dims_by_name[name] = dim
            self._names.setdefault(dim, name)
        return self.dims_by_name[name]

    def _sum_of_names(self, name: str) -> SymbolicDim:
        terms = dim_terms(name)
        if (
            not self._names_are_sums
            or len(terms) == 1
            or not all(isinstance(term, int) or term.isidentifier() for term in terms)
        ):
            return self.fresh()
        total: SymbolicDim | None = 0
        for term in terms:
            total = None if total is None else d.add(total, term if isinstance(term, int) else self.named_dim(term))
        return self.or_fresh(total)

    def quotient(self, dividends: Iterable[SymbolicDim], divisors: Iterable[SymbolicDim]) -> SymbolicDim | None:
        """Return the product of `dividends` divided by that of `divisors`, rounded toward zero.

        A quotient that is no polynomial is a symbol; equal quotients are equal symbols. Returns None if a product exceeds the
        limits of `dims`, a divisor is 0, or the division of two numbers has a remainder.
        """
        remaining, unmatched = list(dividends), []
        for divisor in divisors:
            if divisor in remaining:
                remaining.remove(divisor)
            else:
                unmatched.append(divisor)
        dividend, divisor_product = d.product(remaining), d.product(unmatched)
        if dividend is None or divisor_product is None or divisor_product == 0:
            return None
        if (exact := d.divide(dividend, divisor_product)) is not None:
            return exact
        if isinstance(dividend, int) and isinstance(divisor_product, int):
            return None
        key = (dividend, divisor_product)
        if key not in self._quotients:
            is_size = all((bound := d.lower_bound(operand)) is not None and bound >= 0 for operand in key)
            quotient = self._quotients[key] = self.fresh() if is_size else self.fresh_integer()
            self._operands[quotient] = key
        return self._quotients[key]

    def name_of(self, dim: SymbolicDim) -> str | None:
        """Return the declared name of `dim`, or None."""
        return self._names.get(dim)

    def evaluate(self, dim: SymbolicDim, sizes: Mapping[str, int]) -> int | None:
        """Return the number that `dim` is for these `sizes` of the named dims, or None if it is unknown."""
        if isinstance(dim, int):
            return dim
        if (name := self.name_of(dim)) is not None and name in sizes:
            return sizes[name]
        if dim in self._operands:
            dividend, divisor = (self.evaluate(operand, sizes) for operand in self._operands[dim])
            return None if dividend is None or divisor is None else d.truncated_quotient(dividend, divisor)
        if d.is_symbol(dim):
            return None
        total = 0
        for product, factor in dim:
            numbers = [self.evaluate(d.symbol(symbol), sizes) for symbol in product]
            if None in numbers:
                return None
            total += factor * math.prod(number for number in numbers if number is not None)
        return total

    def may_depend_on(self, dim: SymbolicDim, names: Collection[str]) -> bool:
        """Return whether `dim` may change with the sizes of the dims with these `names`; True if its symbols are unknown."""
        if isinstance(dim, int):
            return False
        if (name := self.name_of(dim)) is not None:
            return any(factor in names for factor in factor_names(name))
        if dim in self._operands:
            return any(self.may_depend_on(operand, names) for operand in self._operands[dim])
        return d.is_symbol(dim) or any(self.may_depend_on(d.symbol(symbol), names) for product, _ in dim for symbol in product)

    def describe(self, dim: SymbolicDim) -> str:
        """Return `dim` as text for messages: `16`, `past+seq`, `?` for a symbol without a name."""
        if isinstance(dim, int):
            return str(dim)
        if (name := self.name_of(dim)) is not None:
            return name
        if dim in self._operands:
            return " // ".join(f"({self.describe(operand)})" for operand in self._operands[dim])
        if d.is_symbol(dim):
            return "?"
        terms = []
        for product, factor in dim:
            names = [self.describe(d.symbol(symbol)) for symbol in product]
            terms.append(" * ".join(([str(factor)] if factor != 1 or not names else []) + names))
        return " + ".join(terms)


def broadcast(shapes: Sequence[SymbolicDims | None]) -> PartialDims | None:
    """Return the broadcast of `shapes`, None for each unknown dim; None if one of the shapes is unknown."""
    if any(shape is None for shape in shapes):
        return None
    known = [shape for shape in shapes if shape is not None]
    if all(shape == known[0] for shape in known[1:]):
        return known[0] if known else ()
    rank = max(map(len, known))
    padded = [(1,) * (rank - len(shape)) + shape for shape in known]
    return tuple(map(_broadcast_dim, zip(*padded, strict=True)))


def _broadcast_dim(dims: Iterable[SymbolicDim]) -> SymbolicDim | None:
    """Return the broadcast of the sizes of one axis.

    In a valid run each size is 1 or equal to the result. So a number other than 1 is the result, whatever the symbols are. Of
    two different symbols, either may be 1: the result is unknown.
    """
    candidates = list(dict.fromkeys(dim for dim in dims if dim != 1))
    if len(candidates) <= 1:
        return candidates[0] if candidates else 1
    return next((dim for dim in candidates if isinstance(dim, int)), None)
