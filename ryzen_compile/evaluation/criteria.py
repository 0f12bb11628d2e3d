"""What an evaluation must meet: `perplexity<=1.01x`, `needle>=0.99x`, `kl<=0.02`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from ryzen_compile.artifacts.package.manifest import Finding
from ryzen_compile.errors import UsageError, did_you_mean

_SPELLING = re.compile(r"\s*([A-Za-z][\w.-]*)\s*(<=|>=)\s*([^\sx]+)(x?)\s*")


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One bound on a figure of the subject over everything it was measured on."""

    name: str
    """The measure, or the task."""
    least: bool
    """Whether it must be at least the bound, or at most."""
    bound: float
    relative: bool
    """Whether the bound is a multiple of the baseline's figure."""

    def __str__(self) -> str:
        return f"{'>=' if self.least else '<='} {self.bound:g}{'x' if self.relative else ''}"

    def is_met(self, found: Finding) -> bool:
        """Whether the subject's figure lies within the bound; figures are compared as they are, not their intervals.

        At least a multiple of nothing is met by nobody: a baseline that gets no answer right shows nothing.
        """
        scale = found.baseline.value if self.relative and found.baseline is not None else 1.0
        if self.relative and self.least and scale <= 0:
            return False
        return found.subject.value >= self.bound * scale if self.least else found.subject.value <= self.bound * scale


def parse(texts: Iterable[str]) -> tuple[Requirement, ...]:
    """Read NAME<=NUMBER or NAME>=NUMBER, with an `x` behind it where it is a multiple of the baseline's figure.

    Raises UsageError for what is none, and that names every fault at once.
    """
    found, faults = [], []
    for text in texts:
        match = _SPELLING.fullmatch(text)
        bound = _number(match[3]) if match else None
        if match is None or bound is None:
            faults.append(f"`{text}` is no criterion")
            continue
        found.append(Requirement(name=match[1], least=match[2] == ">=", bound=bound, relative=bool(match[4])))
    if faults:
        raise UsageError("; ".join(faults), hint="write perplexity<=1.01x, where x is the baseline's, or agreement>=0.98")
    return tuple(found)


def check(required: Sequence[Requirement], *, known: Sequence[str], alone: Sequence[str]) -> None:
    """Raise UsageError for a measure that is none of `known`, and for a multiple of one of `alone`, which no baseline has."""
    for one in required:
        if one.name not in known:
            raise UsageError(f"`{one.name}` is not measured here", hint=did_you_mean(one.name, list(known)))
        if one.relative and one.name in alone:
            raise UsageError(
                f"`{one.name}` tells how far a decoder is from its baseline, which has no such figure",
                hint=f"leave out the x: {one.name}{'>=' if one.least else '<='}{one.bound:g}",
            )


def judged(findings: Iterable[Finding], required: Sequence[Requirement]) -> tuple[Finding, ...]:
    """Return the findings with what is required of them, and whether they meet all of it."""
    return tuple(_judged(one, [held for held in required if held.name == one.name and not one.part]) for one in findings)


def _judged(found: Finding, held: Sequence[Requirement]) -> Finding:
    if not held:
        return found
    return msgspec.structs.replace(found, required=", ".join(map(str, held)), met=all(one.is_met(found) for one in held))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
