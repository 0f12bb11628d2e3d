"""The criteria that a comparison is held to: explicit, in a file, by precision and output."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec

from ryzen_compile.errors import RyzenError, UsageError, did_you_mean
from ryzen_compile.utils.record import Record

Precision = Literal["fp32", "fp16", "bf16"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
"""From the finest to the coarsest: a comparison of two precisions is held to the coarser."""

_LIMIT_RANGES: dict[str, tuple[float, float]] = {
    "max_abs": (0.0, math.inf),
    "max_abs_per_magnitude": (0.0, math.inf),
    "relative_l2": (0.0, math.inf),
    "cosine": (-1.0, 1.0),
    "top1": (0.0, 1.0),
}


class Tolerances(Record, frozen=True):
    """What one output must meet; a measure without a limit is told, not judged."""

    max_abs: float | None = None
    """The most that any element may differ by."""
    max_abs_per_magnitude: float | None = None
    """The same as a share of the baseline's largest element; where both are given the looser counts."""
    relative_l2: float | None = None
    """The most that |subject - baseline| / |baseline| may be."""
    cosine: float | None = None
    """The least cosine that a vector may have with the baseline's, in [-1, 1]."""
    top1: float | None = None
    """The least share of rows that may agree on the largest element, in [0, 1]."""

    def max_abs_limit(self, magnitude: float) -> float | None:
        """Return the largest difference allowed where the baseline's largest element is `magnitude`; None: any."""
        allowed = [] if self.max_abs is None else [self.max_abs]
        if self.max_abs_per_magnitude is not None:
            allowed.append(self.max_abs_per_magnitude * magnitude)
        return max(allowed, default=None)

    def __str__(self) -> str:
        given = {name: getattr(self, name) for name in _LIMIT_RANGES}
        return ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)


class Criteria(Record, frozen=True):
    """The limits for every precision, with exceptions by output."""

    name: str
    """Where they come from: `the defaults of ryzen-compile`, a file's name, and the flags that changed them."""
    tolerances: dict[Precision, Tolerances]
    output_tolerances: dict[Precision, dict[str, Tolerances]] = {}
    """Limits of single outputs: complete, not differences."""

    def for_output(self, precision: Precision, output: str) -> Tolerances:
        """Return what `output` is held to."""
        return self.output_tolerances.get(precision, {}).get(output, self.tolerances[precision])

    def check_outputs(self, output_names: Iterable[str]) -> None:
        """Raise UsageError where limits are set for an output that is none of `known`: the elements of a sequence count."""
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
        """Return these criteria with the given limits in every precision and for every output; None leaves a limit as it is.

        A `max_abs` that is asked for is meant as it is: it also drops `max_abs_per_magnitude`. Raises UsageError for a number
        out of range.
        """
        given: dict[str, float | None] = {name: float(value) for name, value in flags.items() if value is not None}
        if not given:
            return self
        faults = [fault for name, value in given.items() if (fault := _validate_limit(name, value))]
        if faults:
            raise UsageError("; ".join(faults))
        words = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in given.items())
        if "max_abs" in given:
            given.setdefault("max_abs_per_magnitude", None)

        def change(limits: Tolerances) -> Tolerances:
            return msgspec.structs.replace(limits, **given)

        return Criteria(
            name=f"{self.name}, with {words}",
            tolerances={precision: change(limits) for precision, limits in self.tolerances.items()},
            output_tolerances={
                precision: {output: change(limits) for output, limits in outputs.items()}
                for precision, outputs in self.output_tolerances.items()
            },
        )


def default_criteria() -> Criteria:
    """Return the project's own criteria: the `success_criteria.toml` beside this file."""
    text = files("ryzen_compile.numerics").joinpath("success_criteria.toml").read_text(encoding="utf-8")
    limits, outputs, faults = _parse_tables(tomllib.loads(text))
    if faults:
        raise RyzenError(f"the criteria shipped with ryzen-compile are spoiled: {'; '.join(faults)}", hint="install it again")
    return Criteria(name="the defaults of ryzen-compile", tolerances=limits, output_tolerances=outputs)


def load_criteria(path: Path) -> Criteria:
    """Read a criteria file; precisions that it does not name keep the defaults.

    Raises RyzenError where the file cannot be read, and UsageError that names every fault of it at once.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RyzenError(
            f"`{path}` cannot be read: {error.strerror}", hint="give the path of a success_criteria.toml"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"`{path}` is not TOML: {error}") from error
    limits, outputs, faults = _parse_tables(tables)
    if not tables:
        faults.append("it holds no table")
    if faults:
        raise UsageError(f"`{path}`: {'; '.join(faults)}", hint="write tables like [fp16] with lines like cosine = 0.9999")
    return Criteria(name=path.name, tolerances={**default_criteria().tolerances, **limits}, output_tolerances=outputs)


def coarser(one: Precision, other: Precision) -> Precision:
    """Return the precision whose limits a comparison of the two is held to."""
    return max(one, other, key=PRECISIONS.index)


def _parse_tables(
    tables: Mapping[str, Any],
) -> tuple[dict[Precision, Tolerances], dict[Precision, dict[str, Tolerances]], list[str]]:
    limits: dict[Precision, Tolerances] = {}
    outputs: dict[Precision, dict[str, Tolerances]] = {}
    faults: list[str] = []
    for word, table in tables.items():
        precision = next((known for known in PRECISIONS if known == word), None)
        if precision is None:
            faults.append(f"there is no precision `{word}`: {did_you_mean(word, list(PRECISIONS))}")
            continue
        if not isinstance(table, dict):
            faults.append(f"`{word}` is a value, it should be a table [{word}]")
            continue
        lines = {key: value for key, value in table.items() if key != "outputs"}
        limits[precision] = _parse_tolerances(Tolerances(), lines, f"[{word}]", faults)
        exceptions = table.get("outputs", {})
        if not isinstance(exceptions, dict) or not all(isinstance(value, dict) for value in exceptions.values()):
            faults.append(f"[{word}]: `outputs` should hold tables [{word}.outputs.NAME]")
            continue
        outputs[precision] = {
            output: _parse_tolerances(limits[precision], value, f"[{word}.outputs.{output}]", faults)
            for output, value in exceptions.items()
        }
    return limits, outputs, faults


def _parse_tolerances(base: Tolerances, values: Mapping[str, Any], location: str, faults: list[str]) -> Tolerances:
    good: dict[str, float] = {}
    for name, value in values.items():
        fault = _validate_limit(name, value)
        if fault:
            faults.append(f"{location} {fault}")
        else:
            good[name] = float(value)
    if not values:
        faults.append(f"{location} sets no limit, so nothing would be judged")
    return msgspec.structs.replace(base, **good)


def _validate_limit(name: str, value: object) -> str | None:
    if name not in _LIMIT_RANGES:
        return f"there is no limit `{name}`: {did_you_mean(name, list(_LIMIT_RANGES))}"
    low, high = _LIMIT_RANGES[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"`{name}` is {value!r}, it should be a number"
    if not (math.isfinite(value) and low <= value <= high):
        return f"`{name}` is {value:g}, it should be " + (
            f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"a finite number of at least {low:g}"
        )
    return None
