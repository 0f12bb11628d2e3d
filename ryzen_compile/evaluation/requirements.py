"""Requirements on the metrics of an evaluation: `perplexity<=1.01x`, `needle>=0.99x`, `kl<=0.02`."""

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
    """A bound on a metric of the candidate over all documents, questions or continuations."""

    name: str
    """The metric or task."""
    is_minimum: bool
    """Whether the bound is a minimum (`>=`) or a maximum (`<=`)."""
    bound: float
    relative_to_baseline: bool
    """Whether the bound is a multiple of the baseline's value."""

    def __str__(self) -> str:
        return f"{'>=' if self.is_minimum else '<='} {self.bound:g}{'x' if self.relative_to_baseline else ''}"

    def is_met(self, result: MetricResult) -> bool:
        """Return whether the candidate's value is within the bound; the confidence interval is not considered.

        A minimum relative to a baseline of 0 is not met: a baseline without a correct answer proves nothing.
        """
        scale = result.baseline.value if self.relative_to_baseline and result.baseline is not None else 1.0
        if self.relative_to_baseline and self.is_minimum and scale <= 0:
            return False
        return result.candidate.value >= self.bound * scale if self.is_minimum else result.candidate.value <= self.bound * scale


def parse_requirements(texts: Iterable[str]) -> tuple[Requirement, ...]:
    """Parse `NAME<=NUMBER` or `NAME>=NUMBER`; a trailing `x` makes the number a multiple of the baseline's value.

    Raises UsageError that lists every invalid text.
    """
    requirements, faults = [], []
    for text in texts:
        match = _REQUIREMENT_PATTERN.fullmatch(text)
        bound = _parse_finite(match[3]) if match else None
        if match is None or bound is None:
            faults.append(f"`{text}` is not a requirement")
            continue
        requirements.append(
            Requirement(name=match[1], is_minimum=match[2] == ">=", bound=bound, relative_to_baseline=bool(match[4]))
        )
    if faults:
        raise UsageError("; ".join(faults), hint="write perplexity<=1.01x (x: times the baseline's value) or agreement>=0.98")
    return tuple(requirements)


def check_requirements(
    requirements: Sequence[Requirement], *, metric_names: Sequence[str], comparison_metrics: Sequence[str]
) -> None:
    """Raise UsageError for a metric not in `metric_names`, and for a multiple of the baseline's value of a comparison metric.

    A metric in `comparison_metrics` measures the distance to the baseline, so the baseline has no value.
    """
    for requirement in requirements:
        name = requirement.name
        if name not in metric_names:
            raise UsageError(f"`{name}` is not measured here", hint=did_you_mean(name, list(metric_names)))
        if requirement.relative_to_baseline and name in comparison_metrics:
            raise UsageError(
                f"`{name}` measures the distance to the baseline, so the baseline has no value for it",
                hint=f"leave out the x: {name}{'>=' if requirement.is_minimum else '<='}{requirement.bound:g}",
            )


def apply_requirements(results: Iterable[MetricResult], requirements: Sequence[Requirement]) -> tuple[MetricResult, ...]:
    """Return the results with what is required of them and whether they meet it; requirements apply to whole metrics only."""
    return tuple(
        _apply_to_result(
            result, [requirement for requirement in requirements if requirement.name == result.name and not result.group]
        )
        for result in results
    )


def _apply_to_result(result: MetricResult, requirements: Sequence[Requirement]) -> MetricResult:
    if not requirements:
        return result
    return msgspec.structs.replace(
        result,
        required=", ".join(map(str, requirements)),
        met=all(requirement.is_met(result) for requirement in requirements),
    )


def _parse_finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
