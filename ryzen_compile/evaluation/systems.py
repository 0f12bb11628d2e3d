"""The columns of an evaluation: the PyTorch baseline, the same with the subject's method, and the subject."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import Estimate, MetricResult

if TYPE_CHECKING:
    from ryzen_compile.evaluation.token_decoders import TokenDecoder

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Systems:
    """Who is evaluated side by side."""

    baseline: TokenDecoder
    method: TokenDecoder | None
    """None where the method loses nothing, or has no form in torch."""
    candidate: TokenDecoder
    batch_size: int
    """How many sequences are run together, at most."""

    @property
    def by_name(self) -> dict[str, TokenDecoder]:
        """All by their names among the fields of a Finding, the baseline first."""
        found = {"baseline": self.baseline, "method": self.method, "candidate": self.candidate}
        return {name: decoder for name, decoder in found.items() if decoder is not None}

    @property
    def reference_name(self) -> str:
        """What the subject does the same as, if its rewrite is right."""
        return "baseline" if self.method is None else "method"


def metric_result(name: str, count: int, estimates: dict[str, Estimate], *, group: str = "") -> MetricResult:
    """Return a row of the table; `figures` are by column."""
    return MetricResult(
        name=name,
        group=group,
        count=count,
        baseline=estimates.get("baseline"),
        method=estimates.get("method"),
        candidate=estimates["candidate"],
    )
