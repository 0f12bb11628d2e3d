"""What an evaluation must meet: `perplexity<=1.01x`, `needle>=0.99x`, `kl<=0.02`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from ryzen_compile.artifacts.package.manifest import MetricResult
from ryzen_compile.errors import UsageError, did_you_mean

_REQUIREMENT_PATTERN = re.compile(r"\s*([A-Za-z][\w.-]*)\s*(<=|>=)\s*([^\sx]+)(x?)\s*")


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One bound on a figure of the subject over everything it was measured on."""

    name: str
    """The measure, or the task."""
    is_minimum: bool
    """Whether it must be at least the bound, or at most."""
    bound: float
    relative_to_baseline: bool
    """Whether the bound is a multiple of the baseline's figure."""

    def __str__(self) -> str:
        return f"{'>=' if self.is_minimum else '<='} {self.bound:g}{'x' if self.relative_to_baseline else ''}"

    def is_met(self, result: MetricResult) -> bool:
        """Whether the subject's figure lies within the bound; figures are compared as they are, not their intervals.

        At least a multiple of nothing is met by nobody: a baseline that gets no answer right shows nothing.
        """
        scale = result.baseline.value if self.relative_to_baseline and result.baseline is not None else 1.0
        if self.relative_to_baseline and self.is_minimum and scale <= 0:
            return False
        return result.candidate.value >= self.bound * scale if self.is_minimum else result.candidate.value <= self.bound * scale


def parse_requirements(texts: Iterable[str]) -> tuple[Requirement, ...]:
    """Read NAME<=NUMBER or NAME>=NUMBER, with an `x` behind it where it is a multiple of the baseline's figure.

    Raises UsageError for what is none, and that names every fault at once.
    """
    found, faults = [], []
    for text in texts:
        match = _REQUIREMENT_PATTERN.fullmatch(text)
        bound = _parse_finite(match[3]) if match else None
        if match is None or bound is None:
            faults.append(f"`{text}` is no criterion")
            continue
        found.append(Requirement(name=match[1], is_minimum=match[2] == ">=", bound=bound, relative_to_baseline=bool(match[4])))
    if faults:
        raise UsageError("; ".join(faults), hint="write perplexity<=1.01x, where x is the baseline's, or agreement>=0.98")
    return tuple(found)


def check_requirements(
    requirements: Sequence[Requirement], *, metric_names: Sequence[str], comparison_metrics: Sequence[str]
) -> None:
    """Raise UsageError for a measure that is none of `known`, and for a multiple of one of `alone`, which no baseline has."""
    for one in requirements:
        if one.name not in metric_names:
            raise UsageError(f"`{one.name}` is not measured here", hint=did_you_mean(one.name, list(metric_names)))
        if one.relative_to_baseline and one.name in comparison_metrics:
            raise UsageError(
                f"`{one.name}` tells how far a decoder is from its baseline, which has no such figure",
                hint=f"leave out the x: {one.name}{'>=' if one.is_minimum else '<='}{one.bound:g}",
            )


def apply_requirements(results: Iterable[MetricResult], requirements: Sequence[Requirement]) -> tuple[MetricResult, ...]:
    """Return the findings with what is required of them, and whether they meet all of it."""
    return tuple(
        _apply_to_result(one, [held for held in requirements if held.name == one.name and not one.group]) for one in results
    )


def _apply_to_result(result: MetricResult, requirements: Sequence[Requirement]) -> MetricResult:
    if not requirements:
        return result
    return msgspec.structs.replace(
        result, required=", ".join(map(str, requirements)), met=all(one.is_met(result) for one in requirements)
    )


def _parse_finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
