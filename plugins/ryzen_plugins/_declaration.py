"""The declaration of an op of this package."""

from __future__ import annotations

from dataclasses import dataclass

from ryzen_compile.spec.op import Op


@dataclass(frozen=True, kw_only=True)
class RyzenOp(Op):
    """An op of the domain `ryzen`, version 1."""

    domain: str = "ryzen"
    version: int = 1
