"""Systems of an evaluation: the PyTorch baseline, the baseline with the candidate's KV method, and the candidate."""

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
    """The decoders that are evaluated side by side."""

    baseline: TokenDecoder
    method: TokenDecoder | None
    """None if the KV method is lossless or has no PyTorch implementation."""
    candidate: TokenDecoder
    batch_size: int
    """The largest number of sequences that run together."""

    @property
    def by_name(self) -> dict[str, TokenDecoder]:
        """The decoders by their field name in MetricResult, the baseline first."""
        decoders = {"baseline": self.baseline, "method": self.method, "candidate": self.candidate}
        return {name: decoder for name, decoder in decoders.items() if decoder is not None}

    @property
    def reference_name(self) -> str:
        """The name of the system that the candidate reproduces if its rewrite is correct."""
        return "baseline" if self.method is None else "method"


def metric_result(name: str, count: int, estimates: dict[str, Estimate], *, group: str = "") -> MetricResult:
    """Return the result of one metric; `estimates` are by system name and include `candidate`."""
    return MetricResult(
        name=name,
        group=group,
        count=count,
        baseline=estimates.get("baseline"),
        method=estimates.get("method"),
        candidate=estimates["candidate"],
    )
