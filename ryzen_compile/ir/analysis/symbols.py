"""Symbols for dynamic dims: the named dims of a model, fresh symbols, and symbolic broadcasting."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from ryzen_compile.ir.analysis import dims as d
from ryzen_compile.ir.analysis.dims import SymbolicDim, SymbolicDims


class SymbolTable:
    """Allocates symbols: one per dim name of the model, and fresh ones."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self.dims_by_name: dict[str, SymbolicDim] = {}

    def fresh(self) -> SymbolicDim:
        """Return a new symbol."""
        return d.symbol(next(self._numbers))

    def or_fresh(self, dim: SymbolicDim | None) -> SymbolicDim:
        """Return `dim`, or a fresh symbol if it is None."""
        return self.fresh() if dim is None else dim

    def declared_dim(self, dim: object) -> SymbolicDim:
        """Return the dim of a declared graph input; equal names have equal sizes in ONNX."""
        if isinstance(dim, int):
            return dim if dim > 0 else self.fresh()
        name = dim.value if isinstance(dim, ir.SymbolicDim) else None
        if name is None:
            return self.fresh()
        return self.dims_by_name.setdefault(name, self.fresh())


def broadcast(shapes: Sequence[SymbolicDims | None], symbols: SymbolTable) -> SymbolicDims | None:
    """Return the broadcast of `shapes`; None if one of them is unknown."""
    if any(shape is None for shape in shapes):
        return None
    rank = max(map(len, shapes), default=0)  # type: ignore[arg-type]
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes if shape is not None]
    return tuple(_broadcast_dim(column, symbols) for column in zip(*padded, strict=True))


def _broadcast_dim(dims: Iterable[SymbolicDim], symbols: SymbolTable) -> SymbolicDim:
    candidates = list(dict.fromkeys(dim for dim in dims if dim != 1))
    if not candidates:
        return 1
    if len(candidates) == 1:
        return candidates[0]
    # If one dim is a number, each other dim is 1 or equal to it in a valid run. Of two symbols, either may be 1.
    return next((dim for dim in candidates if isinstance(dim, int)), None) or symbols.fresh()
