"""Metrics of a single output against its baseline."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ryzen_compile.numerics import metrics
from ryzen_compile.numerics.metrics import measure
from ryzen_compile.spec.dtypes import UNIT_ROUNDOFF, Precision


def test_the_largest_difference_is_found_with_its_index() -> None:
    baseline = np.zeros((2, 3, 4), np.float32)
    baseline[:] = 5
    candidate = baseline.copy()
    candidate[1, 2, 0] = 5.25
    result = measure(candidate, baseline)
    assert (result.max_abs, result.max_abs_at, result.magnitude, result.elements) == (0.25, (1, 2, 0), 5.0, 24)


def test_relative_l2_is_the_norm_of_the_difference_over_the_norm_of_the_baseline() -> None:
    assert measure(np.array([3.0, 4.5]), np.array([3.0, 4.0])).relative_l2 == pytest.approx(0.5 / 5.0, rel=1e-12)


def test_relative_l2_is_undefined_if_only_the_baseline_is_zero() -> None:
    assert measure(np.array([0.0, 1.0]), np.array([0.0, 0.0])).relative_l2 is None
    assert measure(np.array([0.0, 0.0]), np.array([0.0, 0.0])).relative_l2 == 0.0


def test_one_wrong_vector_determines_the_cosine_however_many_others_match() -> None:
    baseline = np.random.default_rng(0).standard_normal((4, 50, 16)).astype(np.float32)
    candidate = baseline.copy()
    candidate[2, 7] = candidate[2, 7, ::-1]
    result = measure(candidate, baseline)
    expected = float(baseline[2, 7] @ baseline[2, 7, ::-1] / (baseline[2, 7] @ baseline[2, 7]))
    assert result.cosine == pytest.approx(expected, rel=1e-5)
    assert result.cosine_at == (2, 7, 0)


def test_a_feature_map_is_one_vector_per_row_and_a_state_one_per_token() -> None:
    baseline = np.ones((2, 3, 4, 5), np.float32)
    candidate = baseline.copy()
    candidate[1, 2, 3] = [1, -1, 1, -1, 1]
    assert measure(candidate, baseline).cosine == pytest.approx((60 - 4) / 60, rel=1e-6)
    assert measure(candidate, baseline, vector_axes=1).cosine == pytest.approx(1 / 5, rel=1e-6)


def test_vectors_without_direction_are_excluded_from_the_cosine() -> None:
    baseline = np.array([[0.0, 0.0], [1.0, 1.0]])
    candidate = np.array([[1.0, 0.0], [1.0, 1.0]])
    result = measure(candidate, baseline)
    assert result.cosine == pytest.approx(1.0)
    assert result.max_abs == 1.0
    assert measure(np.array([[1.0], [-1.0]]), np.array([[1.0], [1.0]])).cosine is None


def test_a_zero_vector_against_a_nonzero_baseline_has_cosine_0() -> None:
    assert measure(np.array([[0.0, 0.0]]), np.array([[1.0, 1.0]])).cosine == 0.0


def test_padding_does_not_count() -> None:
    baseline = np.ones((2, 3, 4), np.float32)
    candidate = baseline.copy()
    candidate[1, 2] = [9, -9, np.nan, np.inf]
    mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
    result = measure(candidate, baseline, mask=mask)
    assert result.faults == []
    assert (result.max_abs, result.elements) == (0.0, 20)
    assert result.cosine == pytest.approx(1.0)
    assert measure(candidate, baseline).faults != []


def test_a_measurement_without_unmasked_elements_is_uninformative() -> None:
    result = measure(np.ones((1, 2, 3)), np.zeros((1, 2, 3)), mask=np.zeros((1, 2), bool))
    assert result.elements == 0
    assert result.is_uninformative


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_value_is_a_fault_unless_both_sides_have_it(value: float) -> None:
    finite = np.ones((2, 3), np.float32)
    nonfinite = finite.copy()
    nonfinite[1, 1] = value
    for candidate, baseline in ((nonfinite, finite), (finite, nonfinite)):
        (fault,) = measure(candidate, baseline).faults
        assert "where the baseline differs, first at [1, 1]" in fault
    same = measure(nonfinite, nonfinite.copy())
    assert same.faults == []
    assert same.elements == 5
    assert same.notes == ["has 1 x NaN or infinity, the same as the baseline: they count as equal"]


def test_infinities_of_opposite_signs_differ() -> None:
    assert "1 x infinity" in measure(np.array([np.inf, 1.0]), np.array([-np.inf, 1.0])).faults[0]


def test_integers_and_booleans_and_strings_must_be_equal() -> None:
    for candidate, baseline in (
        (np.array([1, 2, 3]), np.array([1, 2, 4])),
        (np.array([True, False, True]), np.array([True, False, False])),
        (np.array(["a", "b", "c"]), np.array(["a", "b", "cc"])),
        (np.array(["a", "b", "c"], object), np.array(["a", "b", "d"])),
        (np.array([1, 2, 3], ml_dtypes.int4), np.array([1, 2, 4], ml_dtypes.int4)),
    ):
        result = measure(candidate, baseline)
        assert (result.exact, result.unequal, result.elements, result.faults) == (True, 1, 3, [])
        assert measure(candidate, candidate).unequal == 0


def test_different_shapes_and_kinds_of_types_are_faults() -> None:
    assert measure(np.ones((2, 3)), np.ones((3, 2))).faults == ["has the shape [2, 3], the baseline has [3, 2]"]
    assert measure(np.ones(3, np.int64), np.ones(3, np.int32)).faults == ["has the type int64, the baseline has int32"]
    assert measure(np.ones(3, np.float32), np.ones(3, np.int64)).faults == ["has the type float32, the baseline has int64"]


def test_floats_of_different_widths_are_compared_by_value_with_a_note() -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        result = measure(np.array([1.0, 2.5], dtype), np.array([1.0, 2.0], np.float32))
        assert result.max_abs == 0.5
        assert result.notes == [f"is {np.dtype(dtype).name}, the baseline is float32"]


def test_complex_numbers_are_compared_by_real_and_imaginary_part() -> None:
    assert measure(np.array([1 + 2j, 1j]), np.array([1 + 2.5j, 1j])).max_abs == 0.5


def test_top1_counts_equal_argmaxes_and_accepts_any_maximum_of_a_tie_in_the_baseline() -> None:
    baseline = np.array([[1.0, 2.0, 0.0], [3.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    candidate = np.array([[2.0, 1.0, 0.0], [2.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    result = measure(candidate, baseline, compare_top1=True)
    assert (result.top1_rows, result.top1_matches, result.top1_mismatch_at) == (3, 2, (0,))


def test_the_argmax_of_non_finite_values_does_not_match() -> None:
    result = measure(np.array([[np.nan, np.nan]]), np.array([[2.0, 1.0]]), compare_top1=True)
    assert (result.top1_rows, result.top1_matches) == (1, 0)
    result = measure(np.array([[2.0, 1.0]]), np.array([[np.nan, -np.inf]]), compare_top1=True)
    assert result.top1_rows == 0


def test_a_masked_element_is_never_the_argmax() -> None:
    baseline, candidate = np.array([[1.0, 2.0, 0.0]]), np.array([[1.0, 2.0, 9.0]])
    result = measure(candidate, baseline, mask=np.array([[True, True, False]]), compare_top1=True)
    assert (result.top1_rows, result.top1_matches) == (1, 1)
    assert measure(candidate, baseline, mask=np.array([False]), compare_top1=True).top1_rows == 0


def test_the_result_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    baseline = rng.standard_normal((5, 7, 6)).astype(np.float32)
    candidate = baseline + rng.standard_normal(baseline.shape).astype(np.float32) * 1e-3
    candidate[3, 2, 1], candidate[4, 6, 5] = np.nan, 77
    mask = rng.random((5, 7)) < 0.8
    mask[3, 2] = mask[4, 6] = True
    single = measure(candidate, baseline, mask=mask, compare_top1=True)
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 10)
    blocks = measure(candidate, baseline, mask=mask, compare_top1=True)
    assert blocks.relative_l2 == pytest.approx(single.relative_l2, rel=1e-12)
    assert blocks.max_abs_at == single.max_abs_at == (4, 6, 5)
    for name in ("elements", "magnitude", "max_abs", "cosine_at", "top1_rows", "top1_matches", "top1_mismatch_at", "faults"):
        assert getattr(blocks, name) == getattr(single, name), name


def test_the_arrays_are_not_modified() -> None:
    candidate, baseline = np.array([[1.0, np.nan]]), np.array([[1.0, 2.0]])
    measure(candidate, baseline, mask=np.array([True]))
    np.testing.assert_array_equal(candidate, [[1.0, np.nan]])
    np.testing.assert_array_equal(baseline, [[1.0, 2.0]])


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,)])
def test_scalars_and_empty_arrays_are_measured(shape: tuple[int, ...]) -> None:
    result = measure(np.full(shape, 2.0), np.full(shape, 1.0))
    assert result.elements == int(np.prod(shape))
    assert result.max_abs == (1.0 if result.elements else 0.0)
    assert result.is_uninformative == (result.elements == 0)


def logits(seed: int, fill: float, dtype: Any = np.float32, masked: int = 1) -> np.ndarray[Any, Any]:
    """Return (4, 128, 8) random values; the last `masked` columns hold the value `fill`."""
    values = np.random.default_rng(seed).standard_normal((4, 128, 8)).astype(dtype)
    values[..., 8 - masked :] = fill
    return values


FILLS = [
    (-1e9, np.float32),
    (float(np.finfo(np.float32).min), np.float32),
    (-65504.0, np.float16),
    (-3e38, ml_dtypes.bfloat16),
    (-1e300, np.float64),
]


@pytest.mark.parametrize(("fill", "dtype"), FILLS)
@pytest.mark.parametrize("masked", [1, 7])
def test_a_fill_value_on_both_sides_is_excluded_with_a_note(fill: float, dtype: Any, masked: int) -> None:
    candidate, baseline = logits(1, fill, dtype, masked), logits(2, fill, dtype, masked)
    result = measure(candidate, baseline)
    plain = measure(candidate[..., : 8 - masked], baseline[..., : 8 - masked])
    assert (result.elements, result.excluded_outliers) == (4 * 128 * (8 - masked), 4 * 128 * masked)
    assert (result.max_abs, result.magnitude, result.faults) == (plain.max_abs, plain.magnitude, [])
    assert result.relative_l2 == pytest.approx(plain.relative_l2, rel=1e-12)
    assert result.cosine is not None
    assert result.cosine < 0
    (note,) = result.notes
    assert note.startswith(f"has {512 * masked} outliers, up to {abs(float(dtype(fill))):.3g}, ")
    assert note.endswith("that are the same in the baseline: they are excluded")


def test_fill_values_within_rounding_are_the_same_and_larger_differences_count() -> None:
    baseline = logits(2, -1e9)
    assert measure(logits(1, -1e9 + 64), baseline).excluded_outliers == 512
    result = measure(logits(1, -1e9 + 512), baseline)
    assert (result.excluded_outliers, result.max_abs, result.magnitude) == (0, 512.0, 1e9)
    assert result.without_outliers is not None
    assert result.without_outliers.max_abs == measure(logits(1, -1e9), baseline).max_abs
    assert result.notes == ["differs from the baseline in 512 outliers: the metrics are also computed without them"]


def test_an_outlier_on_one_side_only_counts() -> None:
    baseline = logits(2, 0.0)
    assert measure(logits(2, -1e9), baseline).max_abs == 1e9
    assert measure(baseline, logits(2, -1e9)).max_abs == 1e9


def test_a_fill_value_among_zeros_is_excluded_and_informative() -> None:
    baseline = np.where(np.arange(8) < 4, np.float32(0), np.float32(-1e9))[None]
    result = measure(baseline.copy(), baseline)
    assert (result.elements, result.excluded_outliers, result.is_uninformative) == (4, 4, False)
    assert measure(baseline + np.float32(5) * (baseline == 0), baseline).magnitude == 0.0


def test_large_values_without_small_ones_are_no_outliers() -> None:
    for baseline in (
        np.full((2, 4), 1e9, np.float32),
        np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32) * 1e6,
        np.exp(np.random.default_rng(0).standard_normal((100, 64)) * 2).astype(np.float32) * 100,
    ):
        result = measure(baseline.copy(), baseline)
        assert (result.elements, result.excluded_outliers, result.notes) == (baseline.size, 0, [])


def test_an_output_of_only_a_fill_value_has_nothing_left_to_compare() -> None:
    lowest = np.full((2, 3), np.finfo(np.float32).min)
    result = measure(lowest, lowest.copy())
    assert (result.elements, result.excluded_outliers, result.is_uninformative) == (0, 6, True)


def test_padding_does_not_affect_the_outlier_threshold() -> None:
    baseline = np.full((1, 2, 4), 1e5, np.float32)
    baseline[0, 0] = 1.0
    result = measure(baseline.copy(), baseline, mask=np.array([[False, True]]))
    assert (result.elements, result.excluded_outliers, result.magnitude) == (4, 0, 1e5)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 5e-324])
def test_metrics_of_the_largest_and_the_smallest_numbers_are_correct(scale: float) -> None:
    baseline = np.array([[3.0, 4.0], [4.0, 3.0]]) * scale
    result = measure(-baseline, baseline)
    assert (result.relative_l2, result.faults) == (pytest.approx(2.0, rel=1e-12), [])
    assert result.cosine == pytest.approx(-1.0, rel=1e-12)
    result = measure(baseline[:, ::-1], baseline)
    assert result.cosine == pytest.approx(24 / 25, rel=1e-12)
    assert result.relative_l2 == pytest.approx(2**0.5 / 5, rel=1e-12)


def test_norms_of_very_different_magnitudes_accumulate_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.array([1e-200, 1.0, 1e200, 3e200, 1.0, 1e-200])
    single = measure(sizes * 1.5, sizes)
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 1)
    blocks = measure((sizes * 1.5)[:, None], sizes[:, None])
    assert blocks.relative_l2 == pytest.approx(single.relative_l2, rel=1e-12) == pytest.approx(0.5)


def test_a_metric_that_overflows_is_a_fault() -> None:
    result = measure(np.array([1.7e308, 1.0]), np.array([-1.7e308, 1.0]))
    assert result.cosine == -1.0
    assert "differs from the baseline so much that its max_abs overflows float64" in result.faults
    (fault,) = measure(np.array([1e300, 1.0]), np.array([1e-300, 1e-300])).faults
    assert fault == "differs from the baseline so much that its relative_l2 overflows float64"


def near_tie(margin: float, error: float, *, precision: Precision = "fp16") -> metrics.Measurement:
    """Compare 64 rows of 1,000 logits up to 20, one of which has a margin of `margin` and another argmax in the candidate."""
    rng = np.random.default_rng(3)
    baseline = rng.standard_normal((64, 1000)).astype(np.float32)
    baseline[np.arange(64), np.arange(64)] = 20
    baseline[5, 900] = 20 - margin
    candidate = baseline + rng.standard_normal(baseline.shape).astype(np.float32) * error
    candidate[:, :64] = baseline[:, :64]
    candidate[5, 900] = 20.0 + margin
    return measure(candidate, baseline, compare_top1=True, unit_roundoff=UNIT_ROUNDOFF[precision])


def test_a_changed_argmax_below_the_rounding_error_is_a_near_tie() -> None:
    result = near_tie(0.005, 0.004)
    assert (result.top1_rows, result.top1_matches, result.top1_near_ties, result.top1_mismatch_at) == (64, 63, 1, ())
    assert result.largest_tie_margin == pytest.approx(0.005, rel=1e-3)


@pytest.mark.parametrize(
    ("margin", "error", "precision"),
    [
        pytest.param(0.02, 0.004, "fp16", id="the margin is above the error of the row"),
        pytest.param(0.5, 1.0, "fp16", id="a large error does not excuse a large margin"),
        pytest.param(0.005, 0.004, "fp32", id="the margin is above the rounding error of fp32"),
    ],
)
def test_a_changed_argmax_above_the_rounding_error_is_a_mismatch(margin: float, error: float, precision: Precision) -> None:
    result = near_tie(margin, error, precision=precision)
    assert (result.top1_near_ties, result.top1_mismatch_at) == (0, (5,))


def test_the_variation_of_a_float64_output_counts_beside_its_magnitude() -> None:
    baseline = 1.7e9 + np.linspace(-1, 1, 9)
    rounded = measure(baseline.astype(np.float32).astype(np.float64), baseline)
    assert rounded.relative_l2 is not None
    assert rounded.relative_l2 < 1e-8
    assert rounded.centered_l2 == pytest.approx(1, rel=0.1)
    assert measure(baseline.copy(), baseline).centered_l2 == 0
    assert measure(np.full(9, 0.1), np.full(9, 0.1) + 1e-17).centered_l2 is None
    assert measure(baseline.astype(np.float32), baseline.astype(np.float32)).centered_l2 is None
    masked = measure(np.array([[1.0], [9.0]]), np.array([[1.0], [2.0]]), mask=np.array([True, False]))
    assert masked.centered_l2 is None
