"""Accumulator of a comparison: the worst value of every metric of every output over all cases, checked against its limit."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

from ryzen_compile.artifacts.package.manifest import LEFT_OUT, MetricRecord
from ryzen_compile.numerics.criteria import Criteria, Tolerances
from ryzen_compile.numerics.metrics import Measurement
from ryzen_compile.spec.dtypes import Precision


@dataclass
class _WorstValue:
    """The worst value of a metric so far."""

    value: float
    required: str | None
    met: bool
    case: str
    limit_ratio: float
    """The value divided by its limit; without a limit, the value itself."""


@dataclass
class _OutputStats:
    """What has been accumulated for one output."""

    worst: dict[str, _WorstValue] = field(default_factory=dict)
    cases: int = 0
    elements: int = 0
    total: int = 0
    padding: int = 0
    empty_cases: int = 0
    """Cases in which no element could be compared."""
    uninformative_cases: int = 0
    """Cases in which nothing was compared, or only zeros with zeros."""
    top1_rows: int = 0
    top1_matches: int = 0
    top1_near_ties: int = 0
    largest_tie_margin: float = 0.0
    first_top1_mismatch: str | None = None
    first_fault: str | None = None
    fault_count: int = 0
    notes: dict[str, None] = field(default_factory=dict)


class Accumulator:
    """Accumulates measurements case by case; holds no arrays."""

    def __init__(self, criteria: Criteria, precision: Precision) -> None:
        self._criteria = criteria
        self.precision: Precision = precision
        """The precision whose limits apply."""
        self._outputs: dict[str, _OutputStats] = {}
        self.cases = 0

    def add(self, output: str, measurement: Measurement, case: str) -> None:
        """Add the measurement of one output of the candidate against the baseline."""
        stats = self._outputs.setdefault(output, _OutputStats())
        stats.cases += 1
        stats.elements += measurement.elements
        stats.total += measurement.total
        stats.padding += measurement.padding
        stats.empty_cases += not measurement.elements
        stats.uninformative_cases += measurement.is_uninformative
        self._add_faults(stats, measurement, case)
        stats.notes.update(dict.fromkeys(measurement.notes))
        self._update_worst(stats, "", measurement, self._criteria.for_output(self.precision, output), case)
        if measurement.top1_rows:
            stats.top1_rows += measurement.top1_rows
            stats.top1_matches += measurement.top1_matches
            stats.top1_near_ties += measurement.top1_near_ties
            stats.largest_tie_margin = max(stats.largest_tie_margin, measurement.largest_tie_margin)
            mismatches = measurement.top1_rows - measurement.top1_matches - measurement.top1_near_ties
            if mismatches and stats.first_top1_mismatch is None:
                stats.first_top1_mismatch = _format_location(case, measurement.top1_mismatch_at)

    def add_batch_invariance(self, output: str, measurement: Measurement, case: str) -> None:
        """Add the measurement of one row of a batch of identical rows against row 0 of the same output."""
        stats = self._outputs.setdefault(output, _OutputStats())
        self._add_faults(stats, measurement, case)
        tolerances = self._criteria.for_output(self.precision, output)
        self._update_worst(stats, _BATCH_INVARIANCE_PREFIX, measurement, tolerances, case)

    def add_fault(self, output: str, message: str, case: str) -> None:
        """Add that an output cannot be compared."""
        self._add_faults(self._outputs.setdefault(output, _OutputStats()), Measurement(faults=[message]), case)

    def is_within_tolerance(self, output: str, measurement: Measurement) -> bool:
        """Return whether one measurement meets the limits of its output; it is not accumulated."""
        tolerances = self._criteria.for_output(self.precision, output)
        if measurement.faults or not _is_top1_met(measurement, tolerances):
            return False
        return all(
            _is_met(value, limit)
            for part in (measurement, measurement.without_outliers)
            if part is not None
            for _, value, limit in _values_and_limits(part, tolerances)
        )

    def metrics(self) -> tuple[MetricRecord, ...]:
        """Return the worst value of every metric of every output."""
        records = []
        for output, stats in self._outputs.items():
            tolerances = self._criteria.for_output(self.precision, output)
            worst = dict(stats.worst)
            if stats.top1_rows:
                mismatches = stats.top1_rows - stats.top1_matches - stats.top1_near_ties
                share = _top1_share(stats.top1_rows, stats.top1_matches, stats.top1_near_ties)
                worst["top1"] = _WorstValue(
                    value=share,
                    required=None if tolerances.top1 is None else f">= {tolerances.top1:.9g}",
                    met=tolerances.top1 is None or share >= tolerances.top1,
                    case=f"{mismatches} of {stats.top1_rows} rows differ, first in {stats.first_top1_mismatch}"
                    if stats.first_top1_mismatch
                    else f"all {stats.top1_rows} rows match{', near ties included' if stats.top1_near_ties else ''}",
                    limit_ratio=0.0,
                )
            records += [
                MetricRecord(
                    output=output,
                    name=name,
                    worst=worst[name].value,
                    required=worst[name].required,
                    met=worst[name].met,
                    case=worst[name].case,
                )
                for name in sorted(worst, key=_METRIC_ORDER.index)
            ]
        return tuple(records)

    def left_out(self) -> tuple[MetricRecord, ...]:
        """Return the share of each output that was left out as padding, over all cases; for outputs with padding only."""
        limit = self._criteria.max_left_out
        return tuple(
            MetricRecord(
                output=output,
                name=LEFT_OUT,
                worst=stats.padding / stats.total,
                required=f"<= {limit:g}",
                met=stats.padding / stats.total <= limit,
                case=f"{stats.padding} of {stats.total} elements are padding and were not compared",
            )
            for output, stats in self._outputs.items()
            if stats.padding
        )

    def faults(self) -> tuple[str, ...]:
        """Return the faults: what fails regardless of the limits."""
        if not self.cases:
            return ("nothing was compared: there are no cases",)
        if not self._outputs:
            return ("nothing was compared: there are no outputs",)
        faults = []
        checked = {metric.output for metric in self.metrics() if metric.required is not None}
        for output, stats in self._outputs.items():
            if stats.first_fault:
                more = f" and {stats.fault_count - 1} more" if stats.fault_count > 1 else ""
                faults.append(f"`{output}` {stats.first_fault}{more}")
            elif not stats.elements:
                faults.append(f"`{output}`: no element was compared: in every case it is empty, masked, fill or non-finite")
            elif output not in checked and (self._criteria.every_output_is_checked or not checked):
                faults.append(f"`{output}` was not checked: the criteria set no limit for any of its metrics")
        if not faults and all(stats.uninformative_cases == stats.cases for stats in self._outputs.values()):
            faults.append("nothing was compared: every output is zero in the candidate and in the baseline in every case")
        return tuple(faults)

    def notes(self) -> tuple[str, ...]:
        """Return notes on how the outputs were compared."""
        notes = [f"`{output}` {note}" for output, stats in self._outputs.items() for note in stats.notes]
        for output, stats in self._outputs.items():
            if stats.elements and stats.empty_cases:
                count = f"{stats.empty_cases} of {stats.cases} comparisons"
                notes.append(f"`{output}`: no element was compared in {count}: it was empty, masked, fill or non-finite")
            if stats.top1_near_ties:
                notes.append(
                    f"`{output}`: {stats.top1_near_ties} of {stats.top1_rows} rows have another argmax and are near ties: "
                    f"in the baseline, their margin is at most {stats.largest_tie_margin:.3g}, below the rounding error"
                )
            if stats.elements and stats.uninformative_cases == stats.cases:
                notes.append(f"`{output}` is zero in the candidate and in the baseline in every case: it proves nothing")
        return tuple(notes)

    def _add_faults(self, stats: _OutputStats, measurement: Measurement, case: str) -> None:
        for fault in measurement.faults:
            stats.fault_count += 1
            stats.first_fault = stats.first_fault or f"{fault} ({case})"

    def _update_worst(
        self, stats: _OutputStats, prefix: str, measurement: Measurement, tolerances: Tolerances, case: str
    ) -> None:
        if measurement.without_outliers is not None:
            self._update_worst(stats, prefix, measurement.without_outliers, tolerances, case)
        for metric, value, limit in _values_and_limits(measurement, tolerances):
            if metric == _DIFFERENCE_FROM_ZERO:
                fault = f"differs by up to {value:g} where the whole baseline is zero"
                self._add_faults(stats, Measurement(faults=[fault]), case)
                continue
            met = _is_met(value, limit)
            limit_ratio = value if limit is None else value / limit if limit else math.inf if value else 0.0
            kept = stats.worst.get(prefix + metric)
            if kept is not None and (not met, limit_ratio) <= (not kept.met, kept.limit_ratio):
                continue
            reported = value if math.isfinite(value) else sys.float_info.max  # JSON has no infinity
            stats.worst[prefix + metric] = _WorstValue(
                value=1.0 - reported if metric == "cosine" else reported,
                required=_format_limit(metric, limit, tolerances),
                met=met,
                case=_format_location(case, _location(metric, measurement)),
                limit_ratio=limit_ratio,
            )


_DIFFERENCE_FROM_ZERO = "difference_from_zero"
"""The largest difference from a baseline of zeros for which the criteria state no absolute limit."""


def _values_and_limits(measurement: Measurement, tolerances: Tolerances) -> list[tuple[str, float, float | None]]:
    """Return the name, value and largest allowed value of each metric that was measured; a cosine as its distance to 1."""
    if not measurement.elements:
        return []
    if measurement.exact:
        return [("unequal", measurement.unequal, 0.0)]
    limit = tolerances.max_abs_limit(measurement.magnitude)
    values: list[tuple[str, float, float | None]] = [("max_abs", measurement.max_abs, limit)]
    relative_l2 = measurement.relative_l2
    if relative_l2 is not None:
        values.append(("relative_l2", relative_l2, tolerances.relative_l2))
    elif limit is None:
        values.append((_DIFFERENCE_FROM_ZERO, measurement.max_abs, 0.0))
    if measurement.centered_l2 is not None:
        values.append(("centered_l2", measurement.centered_l2, tolerances.centered_l2))
    if measurement.cosine is not None:
        limit = None if tolerances.cosine is None else 1.0 - tolerances.cosine
        values.append(("cosine", 1.0 - measurement.cosine, limit))
    return values


def _is_met(value: float, limit: float | None) -> bool:
    return math.isfinite(value) and (limit is None or value <= limit)


def _is_top1_met(measurement: Measurement, tolerances: Tolerances) -> bool:
    if not measurement.top1_rows or tolerances.top1 is None:
        return True
    return _top1_share(measurement.top1_rows, measurement.top1_matches, measurement.top1_near_ties) >= tolerances.top1


def _top1_share(rows: int, matches: int, near_ties: int) -> float:
    """Return the share of rows with the baseline's argmax, near ties included."""
    return 1.0 - (rows - matches - near_ties) / rows


def _format_limit(metric: str, limit: float | None, tolerances: Tolerances) -> str | None:
    """Return what the criteria require of a metric: `<= 0.001`; None: nothing."""
    if limit is None:
        return None
    if metric == "unequal":
        return "== 0"
    return f">= {tolerances.cosine:.9g}" if metric == "cosine" else f"<= {limit:.9g}"


def _location(metric: str, measurement: Measurement) -> tuple[int, ...]:
    """Return the index that a metric belongs to; empty if it belongs to the whole output."""
    if metric in ("max_abs", "unequal"):
        return measurement.max_abs_at
    return measurement.cosine_at if metric == "cosine" else ()


_BATCH_INVARIANCE_PREFIX = "batch_invariance_"
_METRICS = ("max_abs", "relative_l2", "centered_l2", "cosine", "top1", "unequal")
_METRIC_ORDER = (*_METRICS, *(f"{_BATCH_INVARIANCE_PREFIX}{name}" for name in _METRICS))


def _format_location(case: str, index: tuple[int, ...]) -> str:
    return f"{case}, at {list(index)}" if index else case
