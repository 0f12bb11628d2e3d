"""Model properties: named, checkable statements about a model that passes require, ensure and invalidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Property:
    """A checkable statement about a model."""

    name: str
    """Unique name with a category prefix: `types/float32`, `kv/dense`."""
    description: str
    """The statement as a clause: "every floating-point tensor is fp32"."""
    check: Callable[[ir.Model], str | None]
    """Return None if the statement holds, otherwise one sentence that locates the violation."""

    def __str__(self) -> str:
        return self.name
