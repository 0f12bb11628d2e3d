"""What a single output against its baseline shows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ryzen_compile.numerics import metrics
from ryzen_compile.numerics.metrics import measure


def test_the_largest_difference_is_found_with_its_place() -> None:
    baseline = np.zeros((2, 3, 4), np.float32)
    baseline[:] = 5
    subject = baseline.copy()
    subject[1, 2, 0] = 5.25
    found = measure(subject, baseline)
    assert (found.max_abs, found.max_abs_at, found.magnitude, found.elements) == (0.25, (1, 2, 0), 5.0, 24)


def test_relative_l2_is_the_norm_of_the_difference_over_the_norm_of_the_baseline() -> None:
    assert measure(np.array([3.0, 4.5]), np.array([3.0, 4.0])).relative_l2 == pytest.approx(0.5 / 5.0, rel=1e-12)


def test_relative_l2_is_undefined_where_only_the_baseline_is_zero() -> None:
    assert measure(np.array([0.0, 1.0]), np.array([0.0, 0.0])).relative_l2 is None
    assert measure(np.array([0.0, 0.0]), np.array([0.0, 0.0])).relative_l2 == 0.0


def test_one_turned_vector_shows_in_the_cosine_however_many_others_agree() -> None:
    baseline = np.random.default_rng(0).standard_normal((4, 50, 16)).astype(np.float32)
    subject = baseline.copy()
    subject[2, 7] = subject[2, 7, ::-1]
    found = measure(subject, baseline)
    expected = float(baseline[2, 7] @ baseline[2, 7, ::-1] / (baseline[2, 7] @ baseline[2, 7]))
    assert found.cosine == pytest.approx(expected, rel=1e-5)
    assert found.cosine_at == (2, 7, 0)


def test_a_feature_map_is_one_vector_a_row_and_a_state_one_a_token() -> None:
    baseline = np.ones((2, 3, 4, 5), np.float32)
    subject = baseline.copy()
    subject[1, 2, 3] = [1, -1, 1, -1, 1]
    assert measure(subject, baseline).cosine == pytest.approx((60 - 4) / 60, rel=1e-6)
    assert measure(subject, baseline, vector_axes=1).cosine == pytest.approx(1 / 5, rel=1e-6)


def test_vectors_without_direction_are_left_to_the_other_measures() -> None:
    baseline = np.array([[0.0, 0.0], [1.0, 1.0]])
    subject = np.array([[1.0, 0.0], [1.0, 1.0]])
    found = measure(subject, baseline)
    assert found.cosine == pytest.approx(1.0)
    assert found.max_abs == 1.0
    assert measure(np.array([[1.0], [-1.0]]), np.array([[1.0], [1.0]])).cosine is None


def test_a_vector_that_vanished_has_the_cosine_zero() -> None:
    assert measure(np.array([[0.0, 0.0]]), np.array([[1.0, 1.0]])).cosine == 0.0


def test_padding_does_not_count() -> None:
    baseline = np.ones((2, 3, 4), np.float32)
    subject = baseline.copy()
    subject[1, 2] = [9, -9, np.nan, np.inf]
    counts = np.array([[1, 1, 1], [1, 1, 0]], bool)
    found = measure(subject, baseline, mask=counts)
    assert found.faults == []
    assert (found.max_abs, found.elements) == (0.0, 20)
    assert found.cosine == pytest.approx(1.0)
    assert measure(subject, baseline).faults != []


def test_nothing_that_counts_says_nothing() -> None:
    found = measure(np.ones((1, 2, 3)), np.zeros((1, 2, 3)), mask=np.zeros((1, 2), bool))
    assert found.elements == 0
    assert found.is_uninformative


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_fails_in_one_and_not_in_the_other(value: float) -> None:
    finite = np.ones((2, 3), np.float32)
    odd = finite.copy()
    odd[1, 1] = value
    for subject, baseline in ((odd, finite), (finite, odd)):
        (fault,) = measure(subject, baseline).faults
        assert "unlike the baseline, first at [1, 1]" in fault
    same = measure(odd, odd.copy())
    assert same.faults == []
    assert same.elements == 5
    assert same.notes == ["holds the same 1 x NaN or infinity as the baseline: they count as equal"]


def test_infinities_of_opposite_signs_differ() -> None:
    assert "1 x infinity" in measure(np.array([np.inf, 1.0]), np.array([-np.inf, 1.0])).faults[0]


def test_integers_and_booleans_and_strings_must_be_equal() -> None:
    for subject, baseline in (
        (np.array([1, 2, 3]), np.array([1, 2, 4])),
        (np.array([True, False, True]), np.array([True, False, False])),
        (np.array(["a", "b", "c"]), np.array(["a", "b", "cc"])),
        (np.array(["a", "b", "c"], object), np.array(["a", "b", "d"])),
        (np.array([1, 2, 3], ml_dtypes.int4), np.array([1, 2, 4], ml_dtypes.int4)),
    ):
        found = measure(subject, baseline)
        assert (found.exact, found.unequal, found.elements, found.faults) == (True, 1, 3, [])
        assert measure(subject, subject).unequal == 0


def test_other_shapes_and_other_kinds_of_types_are_named() -> None:
    assert measure(np.ones((2, 3)), np.ones((3, 2))).faults == ["has the shape [2, 3], the baseline [3, 2]"]
    assert measure(np.ones(3, np.int64), np.ones(3, np.int32)).faults == ["has the type int64, the baseline int32"]
    assert measure(np.ones(3, np.float32), np.ones(3, np.int64)).faults == ["has the type float32, the baseline int64"]


def test_floats_of_another_width_are_compared_by_value_and_told() -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        found = measure(np.array([1.0, 2.5], dtype), np.array([1.0, 2.0], np.float32))
        assert found.max_abs == 0.5
        assert found.notes == [f"is {np.dtype(dtype).name}, the baseline float32"]


def test_complex_numbers_are_compared_by_their_parts() -> None:
    assert measure(np.array([1 + 2j, 1j]), np.array([1 + 2.5j, 1j])).max_abs == 0.5


def test_choices_are_counted_by_the_largest_element_and_a_tie_of_the_baseline_is_free() -> None:
    baseline = np.array([[1.0, 2.0, 0.0], [3.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    subject = np.array([[2.0, 1.0, 0.0], [2.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    found = measure(subject, baseline, compare_top1=True)
    assert (found.top1_rows, found.top1_matches, found.top1_mismatch_at) == (3, 2, (0,))


def test_a_choice_among_values_that_are_not_finite_is_no_agreement() -> None:
    found = measure(np.array([[np.nan, np.nan]]), np.array([[2.0, 1.0]]), compare_top1=True)
    assert (found.top1_rows, found.top1_matches) == (1, 0)
    found = measure(np.array([[2.0, 1.0]]), np.array([[np.nan, -np.inf]]), compare_top1=True)
    assert found.top1_rows == 0


def test_what_does_not_count_cannot_be_chosen() -> None:
    baseline, subject = np.array([[1.0, 2.0, 0.0]]), np.array([[1.0, 2.0, 9.0]])
    found = measure(subject, baseline, mask=np.array([[True, True, False]]), compare_top1=True)
    assert (found.top1_rows, found.top1_matches) == (1, 1)
    assert measure(subject, baseline, mask=np.array([False]), compare_top1=True).top1_rows == 0


def test_blocks_and_one_piece_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    baseline = rng.standard_normal((5, 7, 6)).astype(np.float32)
    subject = baseline + rng.standard_normal(baseline.shape).astype(np.float32) * 1e-3
    subject[3, 2, 1], subject[4, 6, 5] = np.nan, 77
    counts = rng.random((5, 7)) < 0.8
    counts[3, 2] = counts[4, 6] = True
    whole = measure(subject, baseline, mask=counts, compare_top1=True)
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 10)
    parts = measure(subject, baseline, mask=counts, compare_top1=True)
    assert parts.relative_l2 == pytest.approx(whole.relative_l2, rel=1e-12)
    assert parts.max_abs_at == whole.max_abs_at == (4, 6, 5)
    for name in ("elements", "magnitude", "max_abs", "cosine_at", "rows", "agreeing", "disagreeing_at", "faults"):
        assert getattr(parts, name) == getattr(whole, name), name


def test_what_is_measured_stays_as_it_was() -> None:
    subject, baseline = np.array([[1.0, np.nan]]), np.array([[1.0, 2.0]])
    measure(subject, baseline, mask=np.array([True]))
    np.testing.assert_array_equal(subject, [[1.0, np.nan]])
    np.testing.assert_array_equal(baseline, [[1.0, 2.0]])


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,)])
def test_scalars_and_empty_arrays_are_measured(shape: tuple[int, ...]) -> None:
    found = measure(np.full(shape, 2.0), np.full(shape, 1.0))
    assert found.elements == int(np.prod(shape))
    assert found.max_abs == (1.0 if found.elements else 0.0)
    assert found.is_uninformative == (found.elements == 0)


def logits(seed: int, fill: float, dtype: Any = np.float32, masked: int = 1) -> np.ndarray[Any, Any]:
    """Return (4, 128, 8) random values, of which the last `masked` columns are a fill."""
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
def test_a_fill_that_both_hold_is_left_out_and_told(fill: float, dtype: Any, masked: int) -> None:
    subject, baseline = logits(1, fill, dtype, masked), logits(2, fill, dtype, masked)
    found = measure(subject, baseline)
    plain = measure(subject[..., : 8 - masked], baseline[..., : 8 - masked])
    assert (found.elements, found.excluded_outliers) == (4 * 128 * (8 - masked), 4 * 128 * masked)
    assert (found.max_abs, found.magnitude, found.faults) == (plain.max_abs, plain.magnitude, [])
    assert found.relative_l2 == pytest.approx(plain.relative_l2, rel=1e-12)
    assert found.cosine is not None
    assert found.cosine < 0
    (note,) = found.notes
    assert note.startswith(f"holds {512 * masked} x enormous values, up to {abs(float(dtype(fill))):.3g}, ")
    assert note.endswith("that the baseline holds too: they are left out")


def test_a_fill_that_is_a_rounding_apart_is_the_same_and_a_larger_difference_counts() -> None:
    baseline = logits(2, -1e9)
    assert measure(logits(1, -1e9 + 64), baseline).excluded_outliers == 512
    found = measure(logits(1, -1e9 + 512), baseline)
    assert (found.excluded_outliers, found.max_abs, found.magnitude) == (0, 512.0, 1e9)
    assert found.without_outliers is not None
    assert found.without_outliers.max_abs == measure(logits(1, -1e9), baseline).max_abs
    assert found.notes == ["is unlike the baseline in 512 x enormous values: the rest is also measured without them"]


def test_an_enormous_value_of_one_side_only_counts() -> None:
    baseline = logits(2, 0.0)
    assert measure(logits(2, -1e9), baseline).max_abs == 1e9
    assert measure(baseline, logits(2, -1e9)).max_abs == 1e9


def test_a_fill_beside_zeros_is_left_out_and_says_something() -> None:
    baseline = np.where(np.arange(8) < 4, np.float32(0), np.float32(-1e9))[None]
    found = measure(baseline.copy(), baseline)
    assert (found.elements, found.excluded_outliers, found.is_uninformative) == (4, 4, False)
    assert measure(baseline + np.float32(5) * (baseline == 0), baseline).magnitude == 0.0


def test_large_values_without_smaller_ones_beside_them_are_measured() -> None:
    for baseline in (
        np.full((2, 4), 1e9, np.float32),
        np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32) * 1e6,
        np.exp(np.random.default_rng(0).standard_normal((100, 64)) * 2).astype(np.float32) * 100,
    ):
        found = measure(baseline.copy(), baseline)
        assert (found.elements, found.excluded_outliers, found.notes) == (baseline.size, 0, [])


def test_a_fill_that_is_all_that_counts_leaves_nothing() -> None:
    lowest = np.full((2, 3), np.finfo(np.float32).min)
    found = measure(lowest, lowest.copy())
    assert (found.elements, found.excluded_outliers, found.is_uninformative) == (0, 6, True)


def test_padding_says_nothing_of_what_is_enormous() -> None:
    baseline = np.full((1, 2, 4), 1e5, np.float32)
    baseline[0, 0] = 1.0
    found = measure(baseline.copy(), baseline, mask=np.array([[False, True]]))
    assert (found.elements, found.excluded_outliers, found.magnitude) == (4, 0, 1e5)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 5e-324])
def test_measures_of_the_largest_and_the_smallest_numbers_are_right(scale: float) -> None:
    baseline = np.array([[3.0, 4.0], [4.0, 3.0]]) * scale
    found = measure(-baseline, baseline)
    assert (found.relative_l2, found.faults) == (pytest.approx(2.0, rel=1e-12), [])
    assert found.cosine == pytest.approx(-1.0, rel=1e-12)
    found = measure(baseline[:, ::-1], baseline)
    assert found.cosine == pytest.approx(24 / 25, rel=1e-12)
    assert found.relative_l2 == pytest.approx(2**0.5 / 5, rel=1e-12)


def test_norms_of_every_size_add_up_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.array([1e-200, 1.0, 1e200, 3e200, 1.0, 1e-200])
    whole = measure(sizes * 1.5, sizes)
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 1)
    parts = measure((sizes * 1.5)[:, None], sizes[:, None])
    assert parts.relative_l2 == pytest.approx(whole.relative_l2, rel=1e-12) == pytest.approx(0.5)


def test_a_measure_that_overflows_is_a_fault() -> None:
    found = measure(np.array([1.7e308, 1.0]), np.array([-1.7e308, 1.0]))
    assert found.cosine == -1.0
    assert "differs so much from the baseline that its max_abs overflows float64" in found.faults
    (fault,) = measure(np.array([1e300, 1.0]), np.array([1e-300, 1e-300])).faults
    assert fault == "differs so much from the baseline that its relative_l2 overflows float64"
