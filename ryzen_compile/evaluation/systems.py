"""The columns of an evaluation: the PyTorch baseline, the same with the subject's method, and the subject."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import Figure, Finding

if TYPE_CHECKING:
    from ryzen_compile.evaluation.token_decoders import Decoder

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Who is evaluated side by side."""

    baseline: Decoder
    method: Decoder | None
    """None where the method loses nothing, or has no form in torch."""
    subject: Decoder
    rows: int
    """How many sequences are run together, at most."""

    @property
    def all(self) -> dict[str, Decoder]:
        """All by their names among the fields of a Finding, the baseline first."""
        found = {"baseline": self.baseline, "method": self.method, "subject": self.subject}
        return {name: decoder for name, decoder in found.items() if decoder is not None}

    @property
    def reference(self) -> str:
        """What the subject does the same as, if its rewrite is right."""
        return "baseline" if self.method is None else "method"


def finding(name: str, of: int, figures: dict[str, Figure], *, part: str = "") -> Finding:
    """Return a row of the table; `figures` are by column."""
    return Finding(
        name=name,
        part=part,
        of=of,
        baseline=figures.get("baseline"),
        method=figures.get("method"),
        subject=figures["subject"],
    )
