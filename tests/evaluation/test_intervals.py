"""Intervals: Wilson's by its definition, the bootstrap by what it comes to for many items and by its coverage."""

from __future__ import annotations

import numpy as np
import pytest

from ryzen_compile.evaluation.intervals import bootstrap_ratio, wilson_proportion


@pytest.mark.parametrize(("hits", "of"), [(1, 3), (8, 10), (50, 200), (199, 200)])
def test_the_ends_of_a_share_are_what_it_lies_two_deviations_from(hits: int, of: int) -> None:
    found = wilson_proportion(np.arange(of) < hits)
    assert found.value == hits / of
    assert found.low is not None
    assert found.high is not None
    for end in (found.low, found.high):
        assert abs(found.value - end) == pytest.approx(1.9599639845 * np.sqrt(end * (1 - end) / of), rel=1e-9)
    assert found.low < found.value < found.high


def test_shares_of_none_and_of_all_end_there() -> None:
    for count in range(1, 60):
        none, everything = wilson_proportion(np.zeros(count, bool)), wilson_proportion(np.ones(count, bool))
        assert (none.value, none.low) == (0, 0)
        assert (everything.value, everything.high) == (1, 1)
    none = wilson_proportion(np.zeros(10, bool))
    assert none.high == pytest.approx(0.2775, abs=1e-4)


def test_a_mean_of_many_lies_where_the_normal_distribution_says() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=400)
    found, ones = bootstrap_ratio(values, np.ones(400), seed=1), np.ones(400)
    spread = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - spread, abs=0.15 * spread)
    assert found.high == pytest.approx(values.mean() + spread, abs=0.15 * spread)
    assert found == bootstrap_ratio(values, ones, seed=1) != bootstrap_ratio(values, ones, seed=2)


def test_documents_are_drawn_with_their_tokens() -> None:
    """Where loss is the same share of every document's tokens there is nothing to doubt, however different their lengths."""
    tokens = np.array([10.0, 500.0, 30.0])
    found = bootstrap_ratio(tokens * 0.7, tokens, seed=0, transform=np.exp)
    assert found.low == pytest.approx(found.value) == pytest.approx(found.high) == pytest.approx(np.exp(0.7))


def test_one_item_says_nothing_of_others() -> None:
    found = bootstrap_ratio(np.array([3.0]), np.array([2.0]), seed=0)
    assert (found.value, found.low, found.high) == (1.5, None, None)


def test_two_items_of_different_sizes_are_one_ratio_between_theirs() -> None:
    found = bootstrap_ratio(np.array([1.0, 9.0]), np.array([2.0, 3.0]), seed=0)
    assert (found.value, found.low, found.high) == (2.0, 0.5, 3.0)


def test_intervals_hold_what_they_should() -> None:
    random, inside = np.random.default_rng(5), 0
    for trial in range(200):
        found = bootstrap_ratio(random.exponential(size=60), np.ones(60), seed=trial)
        inside += (found.low or 0) <= 1.0 <= (found.high or 0)
    assert 0.88 <= inside / 200 <= 0.98
