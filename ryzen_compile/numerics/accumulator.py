"""The tally of a comparison: every measure of every output at its worst over all cases, and whether it meets its limit."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

from ryzen_compile.artifacts.package.manifest import Metric
from ryzen_compile.numerics.criteria import Criteria, Limits, Precision
from ryzen_compile.numerics.metrics import Measured


@dataclass
class _Worst:
    """A measure at its worst so far."""

    value: float
    required: str | None
    met: bool
    case: str
    strain: float
    """How much of its limit it uses up; where there is none, the value itself."""


@dataclass
class _Output:
    """What was seen of one output."""

    worst: dict[str, _Worst] = field(default_factory=dict)
    cases: int = 0
    elements: int = 0
    void: int = 0
    """Cases in which no element was left to compare."""
    silent: int = 0
    """Cases that said nothing."""
    rows: int = 0
    agreeing: int = 0
    disagreeing: str | None = None
    fault: str | None = None
    faulty: int = 0
    notes: dict[str, None] = field(default_factory=dict)


class Tally:
    """Gathers what is measured, case by case; holds no arrays."""

    def __init__(self, criteria: Criteria, precision: Precision) -> None:
        self._criteria = criteria
        self._precision: Precision = precision
        self._outputs: dict[str, _Output] = {}
        self.cases = 0

    def see(self, output: str, measured: Measured, case: str) -> None:
        """Take in an output of the subject against the baseline's."""
        seen = self._outputs.setdefault(output, _Output())
        seen.cases += 1
        seen.elements += measured.elements
        seen.void += not measured.elements
        seen.silent += measured.says_nothing
        self._blame(seen, measured, case)
        seen.notes.update(dict.fromkeys(measured.notes))
        self._weigh(seen, "", measured, self._criteria.for_output(self._precision, output), case)
        if measured.rows:
            seen.rows += measured.rows
            seen.agreeing += measured.agreeing
            if measured.agreeing < measured.rows and seen.disagreeing is None:
                seen.disagreeing = _place(case, measured.disagreeing_at)

    def see_slot(self, output: str, measured: Measured, case: str) -> None:
        """Take in a row of a batch of equal rows against its first row."""
        seen = self._outputs.setdefault(output, _Output())
        self._blame(seen, measured, case)
        self._weigh(seen, "slot_", measured, self._criteria.for_output(self._precision, output), case)

    def fail(self, output: str, says: str, case: str) -> None:
        """Take in that an output cannot be compared."""
        self._blame(self._outputs.setdefault(output, _Output()), Measured(faults=[says]), case)

    def holds(self, output: str, measured: Measured) -> bool:
        """Return whether what was measured of an output meets its limits, without taking it in."""
        alone = Tally(self._criteria, self._precision)
        alone.see(output, measured, "")
        return not alone._outputs[output].fault and all(metric.met for metric in alone.metrics())

    def metrics(self) -> tuple[Metric, ...]:
        """Return every measure of every output."""
        found = []
        for output, seen in self._outputs.items():
            limits = self._criteria.for_output(self._precision, output)
            worst = dict(seen.worst)
            if seen.rows:
                share = seen.agreeing / seen.rows
                where = seen.disagreeing and f"{seen.rows - seen.agreeing} of {seen.rows}, first {seen.disagreeing}"
                worst["top1"] = _Worst(
                    value=share,
                    required=None if limits.top1 is None else f">= {limits.top1:.9g}",
                    met=limits.top1 is None or share >= limits.top1,
                    case=where or f"all {seen.rows} rows",
                    strain=0.0,
                )
            for name in sorted(worst, key=_ORDER.index):
                one = worst[name]
                found.append(
                    Metric(output=output, name=name, worst=one.value, required=one.required, met=one.met, case=one.case)
                )
        return tuple(found)

    def faults(self) -> tuple[str, ...]:
        """Return what fails whatever the limits are."""
        if not self.cases:
            return ("nothing was compared: there was no case",)
        if not self._outputs:
            return ("nothing was compared: there is no output",)
        found = []
        judged = {metric.output for metric in self.metrics() if metric.required is not None}
        for output, seen in self._outputs.items():
            if seen.fault:
                more = f", and {seen.faulty - 1} times more" if seen.faulty > 1 else ""
                found.append(f"`{output}` {seen.fault}{more}")
            elif not seen.elements:
                found.append(f"`{output}`: nothing of it was compared: it is empty, masked, fill or not finite in every case")
            elif output not in judged:
                found.append(f"`{output}` was not judged: the criteria set no limit for what can be measured of it")
        if not found and all(seen.silent == seen.cases for seen in self._outputs.values()):
            found.append("nothing was compared: every output is zero in the subject and in the baseline, in every case")
        return tuple(found)

    def notes(self) -> tuple[str, ...]:
        """Return what a reader should know."""
        found = [f"`{output}` {note}" for output, seen in self._outputs.items() for note in seen.notes]
        for output, seen in self._outputs.items():
            if seen.elements and seen.void:
                some = f"in {seen.void} of {seen.cases} comparisons"
                found.append(f"`{output}`: nothing of it was compared {some}: it was empty, masked, fill or not finite")
            if seen.elements and seen.silent == seen.cases:
                found.append(f"`{output}` is zero in the subject and in the baseline, in every case: it says nothing")
        return tuple(found)

    def _blame(self, seen: _Output, measured: Measured, case: str) -> None:
        for fault in measured.faults:
            seen.faulty += 1
            seen.fault = seen.fault or f"{fault} ({case})"

    def _weigh(self, seen: _Output, prefix: str, measured: Measured, limits: Limits, case: str) -> None:
        if measured.rest is not None:
            self._weigh(seen, prefix, measured.rest, limits, case)
        if not measured.elements:
            return
        if measured.exact:
            at = _place(case, measured.max_abs_at)
            _keep(seen, f"{prefix}unequal", measured.unequal, 0.0, "== 0", at)
            return
        allowed = limits.largest_difference(measured.magnitude)
        spelt = None if allowed is None else f"<= {allowed:.9g}"
        _keep(seen, f"{prefix}max_abs", measured.max_abs, allowed, spelt, _place(case, measured.max_abs_at))
        if measured.relative_l2 is not None:
            most = limits.relative_l2
            _keep(seen, f"{prefix}relative_l2", measured.relative_l2, most, None if most is None else f"<= {most:.9g}", case)
        elif allowed is None:
            fault = f"reaches {measured.max_abs:g} where the baseline is zero throughout"
            self._blame(seen, Measured(faults=[fault]), case)
        if measured.cosine is not None:
            least = limits.cosine
            lack = None if least is None else 1.0 - least
            spelt = None if least is None else f">= {least:.9g}"
            _keep(seen, f"{prefix}cosine", 1.0 - measured.cosine, lack, spelt, _place(case, measured.cosine_at))


_MEASURES = ("max_abs", "relative_l2", "cosine", "top1", "unequal")
_ORDER = (*_MEASURES, *(f"slot_{name}" for name in _MEASURES))


def _keep(seen: _Output, name: str, value: float, allowed: float | None, required: str | None, case: str) -> None:
    """Keep a measure if it strains its limit more than what was seen before; a cosine is weighed by what it lacks to 1.

    What is not finite is not met, and kept as the largest number: JSON has no other.
    """
    met = math.isfinite(value) and (allowed is None or value <= allowed)
    value = value if math.isfinite(value) else sys.float_info.max
    strain = value if allowed is None else value / allowed if allowed else math.inf if value else 0.0
    before = seen.worst.get(name)
    if before is None or (not met, strain) > (not before.met, before.strain):
        shown = 1.0 - value if name.endswith("cosine") else value
        seen.worst[name] = _Worst(value=shown, required=required, met=met, case=case, strain=strain)


def _place(case: str, at: tuple[int, ...]) -> str:
    return f"{case}, at {list(at)}" if at else case
