"""What a single output against its baseline shows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ryzen_compile.compare import metrics
from ryzen_compile.compare.metrics import measure


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
    found = measure(subject, baseline, counts=counts)
    assert found.faults == []
    assert (found.max_abs, found.elements) == (0.0, 20)
    assert found.cosine == pytest.approx(1.0)
    assert measure(subject, baseline).faults != []


def test_nothing_that_counts_says_nothing() -> None:
    found = measure(np.ones((1, 2, 3)), np.zeros((1, 2, 3)), counts=np.zeros((1, 2), bool))
    assert found.elements == 0
    assert found.says_nothing


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
    found = measure(subject, baseline, choices=True)
    assert (found.rows, found.agreeing, found.disagreeing_at) == (3, 2, (0,))


def test_a_choice_among_values_that_are_not_finite_is_no_agreement() -> None:
    found = measure(np.array([[np.nan, np.nan]]), np.array([[2.0, 1.0]]), choices=True)
    assert (found.rows, found.agreeing) == (1, 0)
    found = measure(np.array([[2.0, 1.0]]), np.array([[np.nan, -np.inf]]), choices=True)
    assert found.rows == 0


def test_what_does_not_count_cannot_be_chosen() -> None:
    baseline, subject = np.array([[1.0, 2.0, 0.0]]), np.array([[1.0, 2.0, 9.0]])
    found = measure(subject, baseline, counts=np.array([[True, True, False]]), choices=True)
    assert (found.rows, found.agreeing) == (1, 1)
    assert measure(subject, baseline, counts=np.array([False]), choices=True).rows == 0


def test_blocks_and_one_piece_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    baseline = rng.standard_normal((5, 7, 6)).astype(np.float32)
    subject = baseline + rng.standard_normal(baseline.shape).astype(np.float32) * 1e-3
    subject[3, 2, 1], subject[4, 6, 5] = np.nan, 77
    counts = rng.random((5, 7)) < 0.8
    counts[3, 2] = counts[4, 6] = True
    whole = measure(subject, baseline, counts=counts, choices=True)
    monkeypatch.setattr(metrics, "_BLOCK", 10)
    parts = measure(subject, baseline, counts=counts, choices=True)
    assert parts.squared_difference == pytest.approx(whole.squared_difference, rel=1e-12)
    assert parts.max_abs_at == whole.max_abs_at == (4, 6, 5)
    for name in ("elements", "magnitude", "max_abs", "cosine_at", "rows", "agreeing", "disagreeing_at", "faults"):
        assert getattr(parts, name) == getattr(whole, name), name


def test_what_is_measured_stays_as_it_was() -> None:
    subject, baseline = np.array([[1.0, np.nan]]), np.array([[1.0, 2.0]])
    measure(subject, baseline, counts=np.array([True]))
    np.testing.assert_array_equal(subject, [[1.0, np.nan]])
    np.testing.assert_array_equal(baseline, [[1.0, 2.0]])


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,)])
def test_scalars_and_empty_arrays_are_measured(shape: tuple[int, ...]) -> None:
    found = measure(np.full(shape, 2.0), np.full(shape, 1.0))
    assert found.elements == int(np.prod(shape))
    assert found.max_abs == (1.0 if found.elements else 0.0)
    assert found.says_nothing == (found.elements == 0)
