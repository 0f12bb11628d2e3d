"""Metrics of one output against its baseline: differences, cosine and argmax, computed block by block in float64.

Polygraphy's functions are not used: its maximum difference sorts the output twice to report medians (0.25 s for 786,432
elements, against 0.5 ms), its L2 norm and cosine accumulate in float32 over the whole output, and none supports bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ryzen_compile.spec.dtypes import UNIT_ROUNDOFF

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_BLOCK_ELEMENTS = 1 << 18
"""The number of elements that are in memory as float64 at a time, 2 MiB per array: larger blocks do not fit into the caches."""

OUTLIER_THRESHOLD = 1e4
"""The smallest magnitude of an outlier, and its smallest ratio to the median of the distinct magnitudes."""

_CONSTANT_VARIATION = 1e-12
"""The variation per element, relative to the largest magnitude, up to which a float64 output is constant."""

_TIE_DEVIATIONS = 2.0
"""The number of standard deviations of the difference of two errors within which a margin is a near tie."""
_TIE_ROUNDOFFS = 8.0
"""The largest margin of a near tie, in units of rounding of the largest magnitude of the row."""

_MIN_UNSCALED, _MAX_UNSCALED = 1e-100, 1e100
"""Within this range squares and their sums neither underflow nor overflow float64; other values are scaled before squaring."""


@dataclass
class ScaledNorm:
    """L2 norm accumulated block by block: a sum of squares with a power-of-two scale, free of overflow and underflow."""

    sum_of_squares: float = 0.0
    exponent: int | None = None

    def add(self, values: Array, max_abs: float) -> None:
        """Add a block whose largest magnitude is `max_abs`."""
        import numpy as np

        if max_abs == 0.0:
            return
        if not math.isfinite(max_abs):
            self.sum_of_squares = math.inf
            return
        exponent = 0 if _MIN_UNSCALED < max_abs < _MAX_UNSCALED else math.frexp(max_abs)[1]
        if self.exponent is None or exponent > self.exponent:
            self.sum_of_squares = math.ldexp(self.sum_of_squares, 2 * ((self.exponent or 0) - exponent))
            self.exponent = exponent
        scaled = np.ldexp(values, -self.exponent) if self.exponent else values
        self.sum_of_squares += float(np.vdot(scaled, scaled))

    def ratio_to(self, other: ScaledNorm) -> float:
        """Return this norm divided by a non-zero norm; infinity if the ratio overflows float64."""
        try:
            return math.ldexp(
                math.sqrt(self.sum_of_squares) / math.sqrt(other.sum_of_squares), (self.exponent or 0) - (other.exponent or 0)
            )
        except OverflowError:
            return math.inf


@dataclass
class Measurement:
    """Metrics of one output in one case. Sums and extremes cover the elements that count and are finite."""

    elements: int = 0
    """The number of elements compared."""
    total: int = 0
    """The number of elements of the output."""
    padding: int = 0
    """The number of elements that were left out by the mask."""
    magnitude: float = 0.0
    """The largest |baseline|."""
    max_abs: float = 0.0
    """The largest |candidate - baseline|."""
    max_abs_at: tuple[int, ...] = ()
    """The index of the largest difference."""
    difference_norm: ScaledNorm = field(default_factory=ScaledNorm)
    baseline_norm: ScaledNorm = field(default_factory=ScaledNorm)
    cosine: float | None = None
    """The smallest cosine similarity of a pair of vectors; None if no vector has a direction."""
    cosine_at: tuple[int, ...] = ()
    """The index of the first element of that vector."""
    centered_l2: float | None = None
    """||candidate - baseline|| / ||baseline - mean(baseline)||; None for a baseline that is not float64, or is constant."""
    top1_rows: int = 0
    """The number of rows or tokens whose argmax was compared."""
    top1_matches: int = 0
    """The number of rows with the baseline's argmax."""
    top1_mismatch_at: tuple[int, ...] = ()
    """The index of the first row with another argmax that is not a near tie."""
    top1_near_ties: int = 0
    """The number of rows with another argmax whose margin in the baseline is below the rounding error."""
    largest_tie_margin: float = 0.0
    """The largest margin of a near tie: the baseline's maximum minus the baseline's value at the candidate's argmax."""
    unequal: int = 0
    """The number of integers, booleans or strings that differ."""
    exact: bool = False
    """Whether the output must be equal: its elements are integers, booleans or strings."""
    excluded_outliers: int = 0
    """The number of outliers that are excluded because they are the same on both sides."""
    without_outliers: Measurement | None = None
    """The metrics without any outlier; set if some outliers differ between the two sides."""
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def relative_l2(self) -> float | None:
        """||candidate - baseline|| / ||baseline||; None if only the baseline is zero."""
        if self.baseline_norm.sum_of_squares == 0.0:
            return 0.0 if self.difference_norm.sum_of_squares == 0.0 else None
        return self.difference_norm.ratio_to(self.baseline_norm)

    @property
    def is_uninformative(self) -> bool:
        """Whether nothing was compared, or only zeros with zeros."""
        only_zeros = self.magnitude == 0.0 and self.max_abs == 0.0 and not self.excluded_outliers and not self.faults
        return self.elements == 0 or (only_zeros and not self.exact)

    def note_types(self, candidate: Array, baseline: Array, baseline_label: str) -> None:
        """Note that the two have different types, if they do."""
        if candidate.dtype != baseline.dtype:
            self.notes.insert(0, f"is {candidate.dtype}, {baseline_label} is {baseline.dtype}")


def measure(
    candidate: Array,
    baseline: Array,
    *,
    mask: Array | None = None,
    vector_axes: int | None = None,
    compare_top1: bool = False,
    unit_roundoff: float = UNIT_ROUNDOFF["fp32"],
    baseline_label: str = "the baseline",
) -> Measurement:
    """Compare `candidate` with `baseline`, arrays of the same shape.

    `mask` is a boolean array over their leading dimensions; False excludes (padding). `vector_axes` is the number of trailing
    axes that form one vector (default: 1 up to rank 3, else all but the first). `compare_top1` also compares the argmax along
    the last axis, for which `unit_roundoff` is that of the coarser precision of the two. `baseline_label` names the baseline
    in messages. Different shapes or element types are faults.

    A NaN or infinity is equal only to the same value at the same index of the baseline; otherwise it is a fault. An outlier,
    such as the fill value of a mask, would make every metric pass. An outlier that is the same on both sides is therefore
    excluded; one that differs counts, and `without_outliers` holds the metrics without it. A non-finite metric is a fault.
    """
    import numpy as np

    if candidate.shape != baseline.shape:
        return Measurement(faults=[f"has the shape {list(candidate.shape)}, {baseline_label} has {list(baseline.shape)}"])
    kind, baseline_kind = _comparison_kind(candidate), _comparison_kind(baseline)
    if kind != baseline_kind or (kind == "exact" and candidate.dtype != baseline.dtype):
        return Measurement(faults=[f"has the type {candidate.dtype}, {baseline_label} has {baseline.dtype}"])
    element_mask = None
    if mask is not None:
        element_mask = np.broadcast_to(mask.reshape(mask.shape + (1,) * (candidate.ndim - mask.ndim)), candidate.shape)
    padding = 0 if element_mask is None else element_mask.size - int(np.count_nonzero(element_mask))
    if kind in ("exact", "text"):
        measurement = _measure_equality(candidate, baseline, element_mask)
        measurement.total, measurement.padding = candidate.size, padding
        return measurement
    total = candidate.size
    if kind == "complex":
        candidate, baseline = (array.astype(np.complex128)[..., None].view(np.float64) for array in (candidate, baseline))
        element_mask = None if element_mask is None else np.broadcast_to(element_mask[..., None], candidate.shape)
    length = elements_per_vector(candidate.shape, vector_axes)
    measurement = _measure_values(candidate, baseline, element_mask, length, baseline_label)
    if measurement.magnitude >= OUTLIER_THRESHOLD:
        measurement = _exclude_outliers(measurement, candidate, baseline, element_mask, length, baseline_label)
    measurement.total, measurement.padding = total, padding
    if baseline.dtype.name == "float64" and kind == "real":
        measurement.centered_l2 = _centered_l2(candidate, baseline, element_mask)
    measurement.note_types(candidate, baseline, baseline_label)
    for name in ("max_abs", "relative_l2", "centered_l2", "cosine"):
        value = getattr(measurement, name)
        if value is not None and not math.isfinite(value):
            measurement.faults.append(f"differs from {baseline_label} so much that its {name} overflows float64")
    if compare_top1 and candidate.ndim and candidate.shape[-1] > 1:
        _measure_top1(measurement, candidate, baseline, element_mask, unit_roundoff)
    return measurement


def elements_per_vector(shape: tuple[int, ...], vector_axes: int | None) -> int:
    """Return the number of elements of a vector of an array of `shape`, for the `vector_axes` that `measure` takes."""
    if vector_axes is None:
        vector_axes = 1 if len(shape) <= 3 else len(shape) - 1
    return math.prod(shape[len(shape) - vector_axes :]) if shape else 1


def _measure_values(
    candidate: Array, baseline: Array, mask: Array | None, vector_length: int, baseline_label: str
) -> Measurement:
    """Compare arrays of real numbers, split into vectors of `vector_length` elements."""
    measurement = Measurement()
    nonfinite = _NonFiniteCounter(candidate.shape)
    for start, block, baseline_block, mask_block in _iter_blocks(candidate, baseline, mask, vector_length):
        offset = start * vector_length
        measurement.elements += nonfinite.add(offset, block, baseline_block, mask_block)
        _measure_differences(measurement, offset, block, baseline_block, candidate.shape)
        _measure_cosine(measurement, offset, block, baseline_block, candidate.shape)
    nonfinite.report(measurement, baseline_label)
    return measurement


def _exclude_outliers(
    measurement: Measurement, candidate: Array, baseline: Array, mask: Array | None, vector_length: int, baseline_label: str
) -> Measurement:
    """Return the metrics without the outliers that are the same on both sides; `measurement` includes them."""
    import numpy as np

    outliers, same = _find_outliers(candidate, baseline, mask, vector_length)
    same_count, different_count = int(np.count_nonzero(same)), int(np.count_nonzero(outliers & ~same))
    if same_count:
        largest = float(np.abs(baseline[same].astype(np.float64)).max())
        measurement = _measure_values(
            candidate, baseline, ~same if mask is None else mask & ~same, vector_length, baseline_label
        )
        measurement.excluded_outliers = same_count
        measurement.notes.append(
            f"has {same_count} outliers, up to {largest:.3g}, that are the same in {baseline_label}: they are excluded"
        )
    if different_count:
        measurement.without_outliers = _measure_values(
            candidate, baseline, ~outliers if mask is None else mask & ~outliers, vector_length, baseline_label
        )
        measurement.notes.append(
            f"differs from {baseline_label} in {different_count} outliers: the metrics are also computed without them"
        )
    return measurement


def _find_outliers(candidate: Array, baseline: Array, mask: Array | None, vector_length: int) -> tuple[Array, Array]:
    """Return where the baseline has outliers, and where the candidate has the same value there; boolean arrays.

    An outlier is at least 1e4, and also either at least 1e4 times the median of the distinct magnitudes or the largest number
    of either element type. A fill value is one distinct magnitude, so it is an outlier even if it is most of the output. Two
    values are the same if they are equal or adjacent in the coarser element type.
    """
    import ml_dtypes
    import numpy as np

    def is_finite(block: Array, baseline_block: Array, mask_block: Array | None) -> Array:
        finite = np.isfinite(block) & np.isfinite(baseline_block)
        return finite if mask_block is None else finite & mask_block

    storage = np.float64 if baseline.dtype.itemsize > 4 else np.float32
    distinct = np.unique(
        np.concatenate(
            [
                np.unique(np.abs(baseline_block[is_finite(block, baseline_block, mask_block)])).astype(storage)
                for _, block, baseline_block, mask_block in _iter_blocks(candidate, baseline, mask, vector_length)
            ]
        )
    )
    threshold = OUTLIER_THRESHOLD * max(1.0, float(distinct[(len(distinct) - 1) // 2]))
    infos = [ml_dtypes.finfo(array.dtype) for array in (candidate, baseline)]  # type: ignore[no-untyped-call]
    epsilon, largest_numbers = max(float(info.eps) for info in infos), [float(info.max) for info in infos]
    outliers, same = np.zeros(candidate.shape, bool), np.zeros(candidate.shape, bool)
    outlier_rows, same_rows = outliers.reshape(-1, vector_length), same.reshape(-1, vector_length)
    for start, block, baseline_block, mask_block in _iter_blocks(candidate, baseline, mask, vector_length):
        magnitude = np.abs(baseline_block)
        rows = slice(start, start + len(magnitude))
        outlier_rows[rows] = (
            is_finite(block, baseline_block, mask_block)
            & (magnitude >= OUTLIER_THRESHOLD)
            & ((magnitude >= threshold) | np.isin(magnitude, largest_numbers))
        )
        with np.errstate(over="ignore", invalid="ignore"):
            same_rows[rows] = outlier_rows[rows] & (np.abs(block - baseline_block) <= epsilon * magnitude)
    return outliers, same


def _comparison_kind(array: Array) -> str:
    """Return how an array is compared: `real`, `complex`, `text` or `exact`."""
    if array.dtype.kind in "USTO":
        return "text"
    if array.dtype.kind == "c":
        return "complex"
    if array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float")):  # ml_dtypes: bfloat16, float8_e4m3fn
        return "real"
    return "exact"


def _measure_equality(candidate: Array, baseline: Array, mask: Array | None) -> Measurement:
    import numpy as np

    differs = np.asarray(candidate != baseline)
    if mask is not None:
        differs = differs & mask
    measurement = Measurement(exact=True, elements=candidate.size if mask is None else int(np.count_nonzero(mask)))
    measurement.unequal = int(np.count_nonzero(differs))
    if measurement.unequal:
        measurement.max_abs_at = tuple(int(axis[0]) for axis in np.nonzero(differs)) if differs.ndim else ()
    return measurement


def _iter_blocks(
    candidate: Array, baseline: Array, mask: Array | None, vector_length: int
) -> Iterator[tuple[int, Array, Array, Array | None]]:
    """Yield blocks of vectors: the index of the first vector, then candidate and baseline in float64, and the mask.

    The two arrays may be modified, and are valid until the next block: new ones would cost as much as the metrics.
    """
    import numpy as np

    if candidate.size == 0:
        return
    vectors, baseline_vectors = candidate.reshape(-1, vector_length), baseline.reshape(-1, vector_length)
    mask_vectors = None if mask is None else mask.reshape(-1, vector_length)
    step = min(len(vectors), max(1, _BLOCK_ELEMENTS // vector_length))
    buffers = np.empty((2, step, vector_length))
    for start in range(0, len(vectors), step):
        block = slice(start, start + step)
        left, right = buffers[:, : len(vectors[block])]
        left[...], right[...] = vectors[block], baseline_vectors[block]
        yield start, left, right, None if mask_vectors is None else mask_vectors[block]


class _NonFiniteCounter:
    """Counts the NaNs and infinities of an output; sets them and masked elements to zero in both arrays."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._mismatches: dict[str, int] = {}
        self._first_mismatch = -1
        self._matching = 0

    def add(self, offset: int, candidate: Array, baseline: Array, mask: Array | None) -> int:
        """Count the non-finite values of a block, zero them in place, and return the number of elements left to compare."""
        import numpy as np

        finite = np.isfinite(candidate) & np.isfinite(baseline)
        if finite.all() and mask is None:
            return int(finite.size)
        nonfinite = ~finite if mask is None else ~finite & mask
        if nonfinite.any():
            same = nonfinite & ((np.isnan(candidate) & np.isnan(baseline)) | (candidate == baseline))
            self._matching += int(same.sum())
            different = nonfinite & ~same
            for label, where in (
                ("NaN", np.isnan(candidate)),
                ("infinity", np.isinf(candidate)),
                ("finite value", np.isfinite(candidate)),
            ):
                self._mismatches[label] = self._mismatches.get(label, 0) + int((different & where).sum())
            if self._first_mismatch < 0 and different.any():
                self._first_mismatch = offset + int(np.argmax(different))
        compared = finite if mask is None else finite & mask
        candidate[~compared] = 0.0
        baseline[~compared] = 0.0
        return int(compared.sum())

    def report(self, measurement: Measurement, baseline_label: str) -> None:
        """Add the counts to the faults and notes of `measurement`."""
        counts = [f"{count} x {label}" for label, count in self._mismatches.items() if count]
        if counts:
            first = list(_unravel_index(self._first_mismatch, self._shape))
            measurement.faults.append(f"has {', '.join(counts)} where {baseline_label} differs, first at {first}")
        if self._matching:
            measurement.notes.append(
                f"has {self._matching} x NaN or infinity, the same as {baseline_label}: they count as equal"
            )


def _measure_differences(
    measurement: Measurement, offset: int, candidate: Array, baseline: Array, shape: tuple[int, ...]
) -> None:
    import numpy as np

    with np.errstate(over="ignore"):
        difference = np.subtract(candidate, baseline)
    np.abs(difference, out=difference)
    index = int(difference.argmax())
    largest, magnitude = float(difference.flat[index]), float(np.abs(baseline).max())
    if largest > measurement.max_abs or not measurement.max_abs_at:
        measurement.max_abs, measurement.max_abs_at = largest, _unravel_index(offset + index, shape)
    measurement.magnitude = max(measurement.magnitude, magnitude)
    measurement.difference_norm.add(difference, largest)
    measurement.baseline_norm.add(baseline, magnitude)


def _centered_l2(candidate: Array, baseline: Array, mask: Array | None) -> float | None:
    """Return the difference relative to the variation of a float64 baseline around its mean.

    A float64 output may be large and vary little, as the age of timestamps does: narrower arithmetic keeps its magnitude and
    loses its variation, which no metric relative to the magnitude shows. None if the baseline varies by rounding only.
    """
    import numpy as np

    compared = np.isfinite(candidate) & np.isfinite(baseline)
    if mask is not None:
        compared &= mask
    values = baseline[compared]
    if not values.size:
        return None
    scale = float(np.abs(values).max()) or 1.0
    values = values / scale
    variation = float(np.linalg.norm(values - values.mean()))
    if variation <= _CONSTANT_VARIATION * math.sqrt(values.size):
        return None
    with np.errstate(over="ignore"):
        return float(np.linalg.norm(candidate[compared].astype(np.float64) / scale - values)) / variation


def _measure_cosine(measurement: Measurement, offset: int, candidate: Array, baseline: Array, shape: tuple[int, ...]) -> None:
    """Update the smallest cosine.

    Vectors of one element are skipped: they have a sign but no direction. So are vectors that are zero in the baseline.
    """
    import numpy as np

    if candidate.shape[1] < 2:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        products = _dots_and_norms(candidate, baseline)
    out_of_range = np.flatnonzero(~((products[1:] > _MIN_UNSCALED) & (products[1:] < _MAX_UNSCALED)).all(axis=0))
    if out_of_range.size:
        products[:, out_of_range] = _dots_and_norms(
            _scale_to_unit_exponent(candidate[out_of_range]), _scale_to_unit_exponent(baseline[out_of_range])
        )
    dots, *norms = products
    nonzero = np.flatnonzero(norms[1])
    if not nonzero.size:
        return
    scale = (norms[0] * norms[1])[nonzero]
    cosines = np.divide(dots[nonzero], scale, out=np.zeros(len(nonzero)), where=scale > 0)
    index = int(cosines.argmin())
    if measurement.cosine is None or cosines[index] < measurement.cosine:
        measurement.cosine = min(float(cosines[index]), 1.0)
        measurement.cosine_at = _unravel_index(offset + int(nonzero[index]) * candidate.shape[1], shape)


def _dots_and_norms(candidate: Array, baseline: Array) -> Array:
    """Return the dot product of each pair of vectors and both norms, (3, vectors)."""
    import numpy as np

    pairs = (candidate, baseline), (candidate, candidate), (baseline, baseline)
    products = np.stack([np.einsum("vd,vd->v", left, right) for left, right in pairs])
    products[1:] = np.sqrt(products[1:])
    return products


def _scale_to_unit_exponent(vectors: Array) -> Array:
    """Return each vector scaled by the power of two that brings its largest magnitude into [0.5, 1)."""
    import numpy as np

    scaled: Array = np.ldexp(vectors, -np.frexp(np.abs(vectors).max(axis=1, keepdims=True))[1])
    return scaled


def _measure_top1(
    measurement: Measurement, candidate: Array, baseline: Array, mask: Array | None, unit_roundoff: float
) -> None:
    """Count the rows with the baseline's argmax. If the baseline has its maximum several times, each of them matches.

    A row with another argmax is a near tie, and not a mismatch, if the margin in the baseline between the two elements is
    below the error bound of their difference: two standard deviations of the difference of two errors of that row, but at most
    eight units of rounding of its largest magnitude, so that an error larger than rounding is not excused by its own size.
    """
    import numpy as np

    length = candidate.shape[-1]
    for start, block, baseline_block, mask_block in _iter_blocks(candidate, baseline, mask, length):
        for array in (block, baseline_block):
            array[np.isnan(array) if mask_block is None else np.isnan(array) | ~mask_block] = -np.inf
        counted = np.isfinite(baseline_block).any(axis=1)
        rows = np.arange(len(block))
        chosen, largest = baseline_block[rows, block.argmax(axis=1)], baseline_block.max(axis=1)
        with np.errstate(invalid="ignore"):
            margins = largest - chosen
        matches = chosen == largest
        matches &= np.isfinite(block).any(axis=1)
        measurement.top1_rows += int(counted.sum())
        measurement.top1_matches += int((matches & counted).sum())
        for row in map(int, np.flatnonzero(counted & ~matches)):
            if margins[row] <= _tie_bound(block[row], baseline_block[row], unit_roundoff):
                measurement.top1_near_ties += 1
                measurement.largest_tie_margin = max(measurement.largest_tie_margin, float(margins[row]))
            elif not measurement.top1_mismatch_at:
                measurement.top1_mismatch_at = _unravel_index((start + row) * length, candidate.shape)[:-1]


def _tie_bound(candidate: Array, baseline: Array, unit_roundoff: float) -> float:
    """Return the margin up to which two elements of one row of `baseline` may change places by rounding; negative: never."""
    import numpy as np

    finite = np.isfinite(candidate) & np.isfinite(baseline)
    if not finite.any():
        return -1.0
    errors = candidate[finite] - baseline[finite]
    deviation = math.sqrt(2.0) * float(errors.std())
    return min(_TIE_DEVIATIONS * deviation, _TIE_ROUNDOFFS * unit_roundoff * float(np.abs(baseline[finite]).max()))


def _unravel_index(flat_index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    import numpy as np

    return tuple(int(axis) for axis in np.unravel_index(flat_index, shape)) if shape else ()
