"""`RyzenOp`, an op of the domain `ryzen`, and `dims_table` for the dims of test cases."""

from __future__ import annotations

from dataclasses import dataclass

from ryzen_compile.spec.op import Op


@dataclass(frozen=True, kw_only=True)
class RyzenOp(Op):
    """An op of the domain `ryzen`, version 1."""

    domain: str = "ryzen"
    version: int = 1


def dims_table(names: str, *rows: tuple[float, ...]) -> tuple[dict[str, float], ...]:
    """Return one mapping per row from `names`, of dims and attributes, to the numbers of the row."""
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)
