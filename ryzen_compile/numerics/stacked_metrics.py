"""Metrics of many outputs at once: small ones of equal shape and type are stacked and reduced together.

A detector of 1,000 outputs has thousands of pairs of a few elements, for each of which `metrics.measure` takes 0.1 ms, more
than the model needs to compute it. Stacked, a pair takes a few microseconds and has the same metrics to rounding in float64.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.data.array_files import release_array
from ryzen_compile.numerics.metrics import OUTLIER_THRESHOLD, Measurement, ScaledNorm, elements_per_vector, measure
from ryzen_compile.spec.dtypes import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from ryzen_compile.numerics.metrics import Array

MAX_STACKED_ELEMENTS = 4096
"""The largest number of elements of an output that is stacked: for larger ones the time is that of their elements."""
_MIN_STACK = 4
_STACK_ELEMENTS = 1 << 20
"""The number of elements that are stacked at a time: 8 MiB as float64."""


@dataclass(frozen=True, slots=True)
class OutputPair:
    """An output, the baseline's and how they are compared; see `metrics.measure` for the fields."""

    candidate: Array
    baseline: Array
    mask: Array | None = None
    vector_axes: int | None = None
    compare_top1: bool = False
    unit_roundoff: float = UNIT_ROUNDOFF["fp32"]
    baseline_label: str = "the baseline"

    def measure(self) -> Measurement:
        """Return the metrics of this pair, and release the memory of a baseline that is mapped from a file."""
        measurement = measure(
            self.candidate,
            self.baseline,
            mask=self.mask,
            vector_axes=self.vector_axes,
            compare_top1=self.compare_top1,
            unit_roundoff=self.unit_roundoff,
            baseline_label=self.baseline_label,
        )
        release_array(self.baseline)
        return measurement


def measure_all(pairs: Sequence[OutputPair]) -> list[Measurement]:
    """Return the metrics of each pair, in order.

    Pairs with a mask, of other types than float16 and float32, with a NaN, an infinity or an element as large as an outlier
    are measured one by one.
    """
    stacks = defaultdict[Any, list[int]](list)
    for index, pair in enumerate(pairs):
        if _is_stackable(pair):
            stacks[pair.candidate.shape, pair.candidate.dtype, pair.baseline.dtype, pair.vector_axes].append(index)
    measurements: dict[int, Measurement] = {}
    for indices in stacks.values():
        rows = max(_MIN_STACK, _STACK_ELEMENTS // pairs[indices[0]].candidate.size)
        for start in range(0, len(indices), rows):
            chunk = indices[start : start + rows]
            if len(chunk) >= _MIN_STACK:
                measurements.update(zip(chunk, _measure_stack([pairs[index] for index in chunk]), strict=True))
    return [measurements[index] if index in measurements else pair.measure() for index, pair in enumerate(pairs)]


def _is_stackable(pair: OutputPair) -> bool:
    candidate, baseline = pair.candidate, pair.baseline
    return (
        0 < candidate.size <= MAX_STACKED_ELEMENTS
        and pair.mask is None
        and not pair.compare_top1
        and candidate.shape == baseline.shape
        and _is_stackable_type(candidate.dtype)
        and _is_stackable_type(baseline.dtype)
    )


def _is_stackable_type(dtype: np.dtype[Any]) -> bool:
    """Return whether elements are float16 or float32, whose squares neither overflow nor underflow in float64."""
    return dtype.kind == "f" and dtype.itemsize <= 4


def _measure_stack(pairs: Sequence[OutputPair]) -> Iterator[Measurement]:
    """Yield the metrics of pairs of one shape and type."""
    shape, count = pairs[0].candidate.shape, len(pairs)
    length = elements_per_vector(shape, pairs[0].vector_axes)
    candidates = np.stack([pair.candidate.reshape(-1) for pair in pairs]).astype(np.float64)
    baselines = np.stack([pair.baseline.reshape(-1) for pair in pairs]).astype(np.float64)
    magnitudes = np.abs(baselines).max(axis=1)
    is_common = np.isfinite(candidates).all(axis=1) & (magnitudes < OUTLIER_THRESHOLD)  # false also for NaN and infinity
    candidates[~is_common] = baselines[~is_common] = 0.0
    differences = np.abs(candidates - baselines)
    largest_at = differences.argmax(axis=1)
    largest = differences[np.arange(count), largest_at]
    squares = (np.einsum("ne,ne->n", array, array) for array in (differences, baselines))
    cosines, cosines_at = _smallest_cosines(candidates.reshape(count, -1, length), baselines.reshape(count, -1, length))
    columns = zip(
        pairs,
        is_common.tolist(),
        magnitudes.tolist(),
        largest.tolist(),
        _unravel(largest_at, shape),
        *(array.tolist() for array in squares),
        cosines.tolist(),
        _unravel(cosines_at * length, shape),
        strict=True,
    )
    for pair, common, magnitude, max_abs, max_abs_at, difference_square, baseline_square, cosine, cosine_at in columns:
        if not common:
            yield pair.measure()
            continue
        has_direction = not math.isnan(cosine)
        measurement = Measurement(
            elements=pair.candidate.size,
            total=pair.candidate.size,
            magnitude=magnitude,
            max_abs=max_abs,
            max_abs_at=max_abs_at,
            difference_norm=ScaledNorm(difference_square, 0 if difference_square else None),
            baseline_norm=ScaledNorm(baseline_square, 0 if baseline_square else None),
            cosine=cosine if has_direction else None,
            cosine_at=cosine_at if has_direction else (),
        )
        measurement.note_types(pair.candidate, pair.baseline, pair.baseline_label)
        yield measurement


def _smallest_cosines(candidates: Array, baselines: Array) -> tuple[Array, Array]:
    """Return the smallest cosine of the vectors (outputs, vectors, length) of each output, NaN without one, and its vector."""
    count, _, length = candidates.shape
    if length < 2:
        return np.full(count, np.nan), np.zeros(count, np.int64)
    dots = np.einsum("nvd,nvd->nv", candidates, baselines)
    norms = [np.sqrt(np.einsum("nvd,nvd->nv", array, array)) for array in (candidates, baselines)]
    scale = norms[0] * norms[1]
    cosines = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
    cosines[norms[1] == 0] = np.inf
    at = cosines.argmin(axis=1)
    smallest = cosines[np.arange(count), at]
    return np.where(np.isinf(smallest), np.nan, np.minimum(smallest, 1.0)), at


def _unravel(indices: Array, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Return the index in an array of `shape` of each flat index."""
    if not shape:
        return iter([()] * len(indices))
    return zip(*(axis.tolist() for axis in np.unravel_index(indices, shape)), strict=True)
