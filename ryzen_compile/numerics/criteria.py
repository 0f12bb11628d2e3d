"""Criteria of a comparison: explicit limits by precision and output, read from a file."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ryzen_compile.errors import RyzenError, UsageError, did_you_mean
from ryzen_compile.spec.dtypes import Precision
from ryzen_compile.spec.fidelity import COMPARISON_METRICS
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.numerics.candidate import Candidate

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
"""From finest to coarsest. A comparison of two precisions uses the limits of the coarser one."""

DEFAULT_MAX_LEFT_OUT = 0.9
"""The largest share of an output that may be padding, which is not compared, if the criteria state none."""

_LIMIT_RANGES: dict[str, tuple[float, float]] = {
    "max_abs": (0.0, math.inf),
    "max_abs_per_magnitude": (0.0, math.inf),
    "relative_l2": (0.0, math.inf),
    "centered_l2": (0.0, math.inf),
    "cosine": (-1.0, 1.0),
    "top1": (0.0, 1.0),
}


class Tolerances(Record, frozen=True):
    """The limits for one output; a metric without a limit is reported but not checked."""

    max_abs: float | None = None
    """The largest allowed absolute difference of an element, at least 0."""
    max_abs_per_magnitude: float | None = None
    """The same relative to the largest |baseline| of the output, at least 0; if both are set, the looser one applies."""
    relative_l2: float | None = None
    """The largest allowed ||candidate - baseline|| / ||baseline||, at least 0."""
    centered_l2: float | None = None
    """The largest allowed ||candidate - baseline|| / ||baseline - mean(baseline)|| of an output in float64, at least 0."""
    cosine: float | None = None
    """The smallest allowed cosine similarity of a vector with the baseline's, in [-1, 1]."""
    top1: float | None = None
    """The smallest allowed share of rows with the baseline's argmax, in [0, 1]."""

    def max_abs_limit(self, magnitude: float) -> float | None:
        """Return the allowed absolute difference for an output whose largest |baseline| is `magnitude`; None: no limit."""
        limits = [] if self.max_abs is None else [self.max_abs]
        if self.max_abs_per_magnitude is not None:
            limits.append(self.max_abs_per_magnitude * magnitude)
        return max(limits, default=None)

    def __str__(self) -> str:
        limits = {name: getattr(self, name) for name in _LIMIT_RANGES}
        return ", ".join(f"{name} {value:g}" for name, value in limits.items() if value is not None)


class Criteria(Record, frozen=True):
    """The limits for every precision, with exceptions by output."""

    name: str
    """Their origin: `the defaults of ryzen-compile` or a file name, with the flags that override them."""
    tolerances: dict[Precision, Tolerances]
    output_tolerances: dict[Precision, dict[str, Tolerances]] = {}
    """Complete limits (not only the differences) of single outputs."""
    every_output_is_checked: bool = True
    """Whether an output for which no limited metric was measured is a fault; otherwise one checked output suffices."""
    max_left_out: float = DEFAULT_MAX_LEFT_OUT
    """The largest allowed share of an output that is left out as padding, in [0, 1]."""

    def for_output(self, precision: Precision, output: str) -> Tolerances:
        """Return the limits that apply to `output`."""
        return self.output_tolerances.get(precision, {}).get(output, self.tolerances[precision])

    def of_any_share(self) -> Criteria:
        """Return these criteria without the limit of the share that is left out, for a comparison of single cases."""
        return msgspec.structs.replace(self, max_left_out=1.0)

    def check_outputs(self, output_names: Iterable[str]) -> None:
        """Raise UsageError if limits are set for an output not in `output_names`.

        `y[0]`, an element of a sequence, is checked as `y`.
        """
        names = sorted(set(output_names))
        faults = {
            f"[{precision}.outputs.{output}] names no output: {did_you_mean(output, names)}": None
            for precision, outputs in self.output_tolerances.items()
            for output in outputs
            if output not in names and output.rpartition("[")[0] not in names
        }
        if faults:
            raise UsageError(f"`{self.name}`: {'; '.join(faults)}")

    def override(self, **flags: float | None) -> Criteria:
        """Return these criteria with the given limits in every precision and for every output; None keeps a limit.

        `max_abs` also removes `max_abs_per_magnitude`, so that the given number is the limit. Raises UsageError for a number
        out of range.
        """
        limits: dict[str, float | None] = {name: float(value) for name, value in flags.items() if value is not None}
        if not limits:
            return self
        faults = [fault for name, value in limits.items() if (fault := _validate_limit(name, value))]
        if faults:
            raise UsageError("; ".join(faults))
        options = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in limits.items())
        if "max_abs" in limits:
            limits.setdefault("max_abs_per_magnitude", None)

        def change(tolerances: Tolerances) -> Tolerances:
            return msgspec.structs.replace(tolerances, **limits)

        return msgspec.structs.replace(
            self,
            name=f"{self.name}, with {options}",
            tolerances={precision: change(tolerances) for precision, tolerances in self.tolerances.items()},
            output_tolerances={
                precision: {output: change(tolerances) for output, tolerances in outputs.items()}
                for precision, outputs in self.output_tolerances.items()
            },
        )


def default_criteria() -> Criteria:
    """Return the default criteria: `success_criteria.toml` next to this file."""
    text = files("ryzen_compile.numerics").joinpath("success_criteria.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    max_left_out, faults = _parse_max_left_out(tables)
    tolerances, outputs = _parse_tables(tables, faults)
    if faults:
        raise RyzenError(
            f"the criteria shipped with ryzen-compile are invalid: {'; '.join(faults)}", hint="reinstall ryzen-compile"
        )
    name = "the defaults of ryzen-compile"
    return Criteria(name=name, tolerances=tolerances, output_tolerances=outputs, max_left_out=max_left_out)


def floor_criteria(metric: str, floor: float, origin: str) -> Criteria:
    """Return criteria that check only a floor of `metric`, a key of `COMPARISON_METRICS`, in every precision.

    The floor applies to every output that has the metric, which at least one output must have: `top1` is measured for the
    logits of a decoder and not for its states. `origin` states whose floor it is. Raises ValueError if a comparison does not
    measure the metric.
    """
    if metric not in COMPARISON_METRICS:
        raise ValueError(f"a comparison does not measure `{metric}`")
    if metric == "snr_db":
        tolerances = Tolerances(relative_l2=10 ** (-floor / 20))
    else:
        tolerances = Tolerances(**{metric: floor})
    return Criteria(
        name=f"the floor of {origin}: {metric} >= {floor:g}",
        tolerances=dict.fromkeys(PRECISIONS, tolerances),
        every_output_is_checked=False,
    )


def criteria_between(candidate: Candidate, baseline: Candidate, given: Criteria | None) -> Criteria:
    """Return the criteria of a comparison: `given`, otherwise the floor of a lossy candidate, otherwise the defaults.

    The floor does not apply against a baseline with the same lossy passes, which differs from the candidate by other passes.
    """
    if given is not None:
        return given
    floor, other = candidate.accuracy_floor, baseline.accuracy_floor
    if floor is None or (other is not None and other.passes == floor.passes):
        return default_criteria()
    return floor_criteria(floor.metric, floor.value, floor.origin)


def load_criteria(path: Path) -> Criteria:
    """Read a criteria file; a precision without a table in the file keeps the defaults.

    Raises RyzenError if the file cannot be read, and UsageError with all faults of its content.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RyzenError(
            f"`{path}` cannot be read: {error.strerror}", hint="give the path of a success_criteria.toml"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"`{path}` is not TOML: {error}") from error
    is_empty = not tables
    max_left_out, faults = _parse_max_left_out(tables)
    tolerances, outputs = _parse_tables(tables, faults)
    if is_empty:
        faults.append("it contains no table")
    if faults:
        raise UsageError(f"`{path}`: {'; '.join(faults)}", hint="write tables like [fp16] with lines like cosine = 0.9999")
    return Criteria(
        name=path.name,
        tolerances={**default_criteria().tolerances, **tolerances},
        output_tolerances=outputs,
        max_left_out=max_left_out,
    )


def coarser(one: Precision, other: Precision) -> Precision:
    """Return the coarser of two precisions; its limits apply to a comparison of the two."""
    return max(one, other, key=PRECISIONS.index)


def _parse_max_left_out(tables: dict[str, Any]) -> tuple[float, list[str]]:
    """Remove `max_left_out` from `tables` and return it, or its default, with the faults of its value."""
    value = tables.pop("max_left_out", DEFAULT_MAX_LEFT_OUT)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        return DEFAULT_MAX_LEFT_OUT, [f"`max_left_out` must be a number in [0, 1] (got {value!r})"]
    return float(value), []


def _parse_tables(
    tables: Mapping[str, Any], faults: list[str]
) -> tuple[dict[Precision, Tolerances], dict[Precision, dict[str, Tolerances]]]:
    """Return the limits by precision and those by precision and output; add the faults of the tables to `faults`."""
    tolerances: dict[Precision, Tolerances] = {}
    outputs: dict[Precision, dict[str, Tolerances]] = {}
    for name, table in tables.items():
        precision = next((precision for precision in PRECISIONS if precision == name), None)
        if precision is None:
            faults.append(f"there is no precision `{name}`: {did_you_mean(name, list(PRECISIONS))}")
            continue
        if not isinstance(table, dict):
            faults.append(f"`{name}` is a value; it must be a table [{name}]")
            continue
        limits = {key: value for key, value in table.items() if key != "outputs"}
        tolerances[precision] = _parse_tolerances(Tolerances(), limits, f"[{name}]", faults)
        output_tables = table.get("outputs", {})
        if not isinstance(output_tables, dict) or not all(isinstance(value, dict) for value in output_tables.values()):
            faults.append(f"[{name}]: `outputs` must contain tables [{name}.outputs.NAME]")
            continue
        outputs[precision] = {
            output: _parse_tolerances(tolerances[precision], value, f"[{name}.outputs.{output}]", faults)
            for output, value in output_tables.items()
        }
    return tolerances, outputs


def _parse_tolerances(base: Tolerances, values: Mapping[str, Any], location: str, faults: list[str]) -> Tolerances:
    limits: dict[str, float] = {}
    for name, value in values.items():
        fault = _validate_limit(name, value)
        if fault:
            faults.append(f"{location} {fault}")
        else:
            limits[name] = float(value)
    if not values:
        faults.append(f"{location} sets no limit, so nothing would be checked")
    return msgspec.structs.replace(base, **limits)


def _validate_limit(name: str, value: object) -> str | None:
    """Return why `value` is not a valid limit `name`, or None."""
    if name not in _LIMIT_RANGES:
        return f"there is no limit `{name}`: {did_you_mean(name, list(_LIMIT_RANGES))}"
    low, high = _LIMIT_RANGES[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"`{name}` must be a number (got {value!r})"
    if not (math.isfinite(value) and low <= value <= high):
        bounds = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"a finite number of at least {low:g}"
        return f"`{name}` must be {bounds} (got {value:g})"
    return None
