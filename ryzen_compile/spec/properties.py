"""Facts: named, checkable statements about a model that passes require, ensure and break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Property:
    """A statement about a model.

    `check` returns None where the statement holds, else one sentence that says where it fails.
    """

    name: str
    """Its name, `room/what`: `types/strong`, `kv/dense`."""
    description: str
    """The statement as a clause: "every tensor has one element type"."""
    check: Callable[[ir.Model], str | None]

    def __str__(self) -> str:
        return self.name
