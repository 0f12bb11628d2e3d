"""Where sizes come from: the names that a model gives them, fresh symbols, and broadcasting."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from ryzen_compile.ir.analysis import dims as d
from ryzen_compile.ir.analysis.dims import SymbolicDim, SymbolicDims


class SymbolTable:
    """The source of symbols: one for each name that the model gives to a dimension, and fresh ones."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self.dims_by_name: dict[str, SymbolicDim] = {}

    def fresh(self) -> SymbolicDim:
        """Return a symbol that equals no other one."""
        return d.symbol(next(self._numbers))

    def or_fresh(self, dim: SymbolicDim | None) -> SymbolicDim:
        """Return `dim`, or a fresh symbol where it is not known."""
        return self.fresh() if dim is None else dim

    def declared_dim(self, dim: object) -> SymbolicDim:
        """Return the size that an interface declares: ONNX gives equal names to equal sizes."""
        if isinstance(dim, int):
            return dim if dim > 0 else self.fresh()
        name = dim.value if isinstance(dim, ir.SymbolicDim) else None
        if name is None:
            return self.fresh()
        return self.dims_by_name.setdefault(name, self.fresh())


def broadcast(shapes: Sequence[SymbolicDims | None], symbols: SymbolTable) -> SymbolicDims | None:
    """Return the sizes that `shapes` broadcast to."""
    if any(shape is None for shape in shapes):
        return None
    rank = max(map(len, shapes), default=0)  # type: ignore[arg-type]
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes if shape is not None]
    return tuple(_broadcast_dim(column, symbols) for column in zip(*padded, strict=True))


def _broadcast_dim(dims: Iterable[SymbolicDim], symbols: SymbolTable) -> SymbolicDim:
    wide = list(dict.fromkeys(dim for dim in dims if dim != 1))
    if not wide:
        return 1
    if len(wide) == 1:
        return wide[0]
    # The others are 1 or equal to a known number, or the model cannot run; two symbols may be 1 and n, either way round.
    return next((dim for dim in wide if isinstance(dim, int)), None) or symbols.fresh()
