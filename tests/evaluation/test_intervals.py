"""Intervals: Wilson by its definition, the bootstrap by its limit for many items and by its coverage."""

from __future__ import annotations

import numpy as np
import pytest

from ryzen_compile.evaluation.intervals import bootstrap_ratio, wilson_proportion


@pytest.mark.parametrize(("hits", "count"), [(1, 3), (8, 10), (50, 200), (199, 200)])
def test_the_ends_of_a_wilson_interval_are_two_standard_deviations_from_the_share(hits: int, count: int) -> None:
    estimate = wilson_proportion(np.arange(count) < hits)
    assert estimate.value == hits / count
    assert estimate.low is not None
    assert estimate.high is not None
    for end in (estimate.low, estimate.high):
        assert abs(estimate.value - end) == pytest.approx(1.9599639845 * np.sqrt(end * (1 - end) / count), rel=1e-9)
    assert estimate.low < estimate.value < estimate.high


def test_the_intervals_of_the_shares_0_and_1_end_there() -> None:
    for count in range(1, 60):
        zero, one = wilson_proportion(np.zeros(count, bool)), wilson_proportion(np.ones(count, bool))
        assert (zero.value, zero.low) == (0, 0)
        assert (one.value, one.high) == (1, 1)
    zero = wilson_proportion(np.zeros(10, bool))
    assert zero.high == pytest.approx(0.2775, abs=1e-4)


def test_the_interval_of_a_mean_of_many_items_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=400)
    estimate, ones = bootstrap_ratio(values, np.ones(400), seed=1), np.ones(400)
    spread = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - spread, abs=0.15 * spread)
    assert estimate.high == pytest.approx(values.mean() + spread, abs=0.15 * spread)
    assert estimate == bootstrap_ratio(values, ones, seed=1) != bootstrap_ratio(values, ones, seed=2)


def test_the_tokens_of_a_document_are_resampled_together() -> None:
    """If the loss per token is the same in every document, the interval is empty, however different the lengths are."""
    tokens = np.array([10.0, 500.0, 30.0])
    estimate = bootstrap_ratio(tokens * 0.7, tokens, seed=0, transform=np.exp)
    assert estimate.low == pytest.approx(estimate.value) == pytest.approx(estimate.high) == pytest.approx(np.exp(0.7))


def test_the_interval_of_one_item_is_unknown() -> None:
    estimate = bootstrap_ratio(np.array([3.0]), np.array([2.0]), seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (1.5, None, None)


def test_the_interval_of_two_items_spans_their_ratios() -> None:
    estimate = bootstrap_ratio(np.array([1.0, 9.0]), np.array([2.0, 3.0]), seed=0)
    assert (estimate.value, estimate.low, estimate.high) == (2.0, 0.5, 3.0)


def test_the_coverage_is_close_to_95_percent() -> None:
    random, covered = np.random.default_rng(5), 0
    for trial in range(200):
        estimate = bootstrap_ratio(random.exponential(size=60), np.ones(60), seed=trial)
        covered += (estimate.low or 0) <= 1.0 <= (estimate.high or 0)
    assert 0.88 <= covered / 200 <= 0.98
