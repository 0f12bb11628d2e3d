"""The tally of a comparison: every measure of every output at its worst over all cases, and whether it meets its limit."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

from ryzen_compile.artifacts.package.manifest import MetricRecord
from ryzen_compile.numerics.criteria import Criteria, Precision, Tolerances
from ryzen_compile.numerics.metrics import Measurement


@dataclass
class _WorstValue:
    """A measure at its worst so far."""

    value: float
    required: str | None
    met: bool
    case: str
    limit_ratio: float
    """How much of its limit it uses up; where there is none, the value itself."""


@dataclass
class _OutputStats:
    """What was seen of one output."""

    worst: dict[str, _WorstValue] = field(default_factory=dict)
    cases: int = 0
    elements: int = 0
    empty_cases: int = 0
    """Cases in which no element was left to compare."""
    uninformative_cases: int = 0
    """Cases that said nothing."""
    top1_rows: int = 0
    top1_matches: int = 0
    first_top1_mismatch: str | None = None
    first_fault: str | None = None
    fault_count: int = 0
    notes: dict[str, None] = field(default_factory=dict)


class Accumulator:
    """Gathers what is measured, case by case; holds no arrays."""

    def __init__(self, criteria: Criteria, precision: Precision) -> None:
        self._criteria = criteria
        self._precision: Precision = precision
        self._outputs: dict[str, _OutputStats] = {}
        self.cases = 0

    def add(self, output: str, measurement: Measurement, case: str) -> None:
        """Take in an output of the subject against the baseline's."""
        seen = self._outputs.setdefault(output, _OutputStats())
        seen.cases += 1
        seen.elements += measurement.elements
        seen.empty_cases += not measurement.elements
        seen.uninformative_cases += measurement.is_uninformative
        self._add_faults(seen, measurement, case)
        seen.notes.update(dict.fromkeys(measurement.notes))
        self._update_worst(seen, "", measurement, self._criteria.for_output(self._precision, output), case)
        if measurement.top1_rows:
            seen.top1_rows += measurement.top1_rows
            seen.top1_matches += measurement.top1_matches
            if measurement.top1_matches < measurement.top1_rows and seen.first_top1_mismatch is None:
                seen.first_top1_mismatch = _format_location(case, measurement.top1_mismatch_at)

    def add_batch_invariance(self, output: str, measurement: Measurement, case: str) -> None:
        """Take in a row of a batch of equal rows against its first row."""
        seen = self._outputs.setdefault(output, _OutputStats())
        self._add_faults(seen, measurement, case)
        self._update_worst(seen, "slot_", measurement, self._criteria.for_output(self._precision, output), case)

    def add_fault(self, output: str, message: str, case: str) -> None:
        """Take in that an output cannot be compared."""
        self._add_faults(self._outputs.setdefault(output, _OutputStats()), Measurement(faults=[message]), case)

    def is_within_tolerance(self, output: str, measurement: Measurement) -> bool:
        """Return whether what was measured of an output meets its limits, without taking it in."""
        alone = Accumulator(self._criteria, self._precision)
        alone.add(output, measurement, "")
        return not alone._outputs[output].first_fault and all(metric.met for metric in alone.metrics())

    def metrics(self) -> tuple[MetricRecord, ...]:
        """Return every measure of every output."""
        found = []
        for output, seen in self._outputs.items():
            limits = self._criteria.for_output(self._precision, output)
            worst = dict(seen.worst)
            if seen.top1_rows:
                share = seen.top1_matches / seen.top1_rows
                where = (
                    seen.first_top1_mismatch
                    and f"{seen.top1_rows - seen.top1_matches} of {seen.top1_rows}, first {seen.first_top1_mismatch}"
                )
                worst["top1"] = _WorstValue(
                    value=share,
                    required=None if limits.top1 is None else f">= {limits.top1:.9g}",
                    met=limits.top1 is None or share >= limits.top1,
                    case=where or f"all {seen.top1_rows} rows",
                    limit_ratio=0.0,
                )
            for name in sorted(worst, key=_METRIC_ORDER.index):
                one = worst[name]
                found.append(
                    MetricRecord(output=output, name=name, worst=one.value, required=one.required, met=one.met, case=one.case)
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
            if seen.first_fault:
                more = f", and {seen.fault_count - 1} times more" if seen.fault_count > 1 else ""
                found.append(f"`{output}` {seen.first_fault}{more}")
            elif not seen.elements:
                found.append(f"`{output}`: nothing of it was compared: it is empty, masked, fill or not finite in every case")
            elif output not in judged:
                found.append(f"`{output}` was not judged: the criteria set no limit for what can be measured of it")
        if not found and all(seen.uninformative_cases == seen.cases for seen in self._outputs.values()):
            found.append("nothing was compared: every output is zero in the subject and in the baseline, in every case")
        return tuple(found)

    def notes(self) -> tuple[str, ...]:
        """Return what a reader should know."""
        found = [f"`{output}` {note}" for output, seen in self._outputs.items() for note in seen.notes]
        for output, seen in self._outputs.items():
            if seen.elements and seen.empty_cases:
                some = f"in {seen.empty_cases} of {seen.cases} comparisons"
                found.append(f"`{output}`: nothing of it was compared {some}: it was empty, masked, fill or not finite")
            if seen.elements and seen.uninformative_cases == seen.cases:
                found.append(f"`{output}` is zero in the subject and in the baseline, in every case: it says nothing")
        return tuple(found)

    def _add_faults(self, stats: _OutputStats, measurement: Measurement, case: str) -> None:
        for fault in measurement.faults:
            stats.fault_count += 1
            stats.first_fault = stats.first_fault or f"{fault} ({case})"

    def _update_worst(
        self, stats: _OutputStats, prefix: str, measurement: Measurement, tolerances: Tolerances, case: str
    ) -> None:
        if measurement.without_outliers is not None:
            self._update_worst(stats, prefix, measurement.without_outliers, tolerances, case)
        if not measurement.elements:
            return
        if measurement.exact:
            at = _format_location(case, measurement.max_abs_at)
            _keep_worst(stats, f"{prefix}unequal", measurement.unequal, 0.0, "== 0", at)
            return
        allowed = tolerances.max_abs_limit(measurement.magnitude)
        spelt = None if allowed is None else f"<= {allowed:.9g}"
        _keep_worst(
            stats, f"{prefix}max_abs", measurement.max_abs, allowed, spelt, _format_location(case, measurement.max_abs_at)
        )
        if measurement.relative_l2 is not None:
            most = tolerances.relative_l2
            _keep_worst(
                stats, f"{prefix}relative_l2", measurement.relative_l2, most, None if most is None else f"<= {most:.9g}", case
            )
        elif allowed is None:
            fault = f"reaches {measurement.max_abs:g} where the baseline is zero throughout"
            self._add_faults(stats, Measurement(faults=[fault]), case)
        if measurement.cosine is not None:
            least = tolerances.cosine
            lack = None if least is None else 1.0 - least
            spelt = None if least is None else f">= {least:.9g}"
            _keep_worst(
                stats, f"{prefix}cosine", 1.0 - measurement.cosine, lack, spelt, _format_location(case, measurement.cosine_at)
            )


_METRICS = ("max_abs", "relative_l2", "cosine", "top1", "unequal")
_METRIC_ORDER = (*_METRICS, *(f"slot_{name}" for name in _METRICS))


def _keep_worst(stats: _OutputStats, name: str, value: float, limit: float | None, required: str | None, case: str) -> None:
    """Keep a measure if it strains its limit more than what was seen before; a cosine is weighed by what it lacks to 1.

    What is not finite is not met, and kept as the largest number: JSON has no other.
    """
    met = math.isfinite(value) and (limit is None or value <= limit)
    value = value if math.isfinite(value) else sys.float_info.max
    strain = value if limit is None else value / limit if limit else math.inf if value else 0.0
    before = stats.worst.get(name)
    if before is None or (not met, strain) > (not before.met, before.limit_ratio):
        shown = 1.0 - value if name.endswith("cosine") else value
        stats.worst[name] = _WorstValue(value=shown, required=required, met=met, case=case, limit_ratio=strain)


def _format_location(case: str, index: tuple[int, ...]) -> str:
    return f"{case}, at {list(index)}" if index else case
