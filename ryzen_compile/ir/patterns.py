"""A failed match: a model does not have the structure that a rewrite expects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_compile.spec.passes import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir


class PatternNotMatched(Exception):
    """A part of a model does not match the pattern that a rewrite expects: the reason, and the node or tensor at fault.

    `str` of the exception is the reason; `description` also names the location.
    """

    def __init__(self, reason: str, location: str | ir.Node | ir.Value | None = None, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.location, self.hint = reason, _location_name(location), hint

    @property
    def description(self) -> str:
        """The reason, followed by the location if it has a name."""
        return f"{self.reason} (`{self.location}`)" if self.location else self.reason

    def to_refusal(self) -> Refusal:
        """Return the refusal of a pass that this failure causes."""
        return Refusal(reason=self.reason, location=self.location, hint=self.hint)


def _location_name(location: str | ir.Node | ir.Value | None) -> str:
    """Return the name of a node or tensor, the op type of a node without a name, or an empty string."""
    if location is None or isinstance(location, str):
        return location or ""
    op_type: str = getattr(location, "op_type", "")
    return location.name or op_type
