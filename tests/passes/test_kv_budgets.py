"""Budgets of the kv passes: how they are written, and how a pyramid divides them among the layers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ryzen_passes.kv.budgets import parse_budget, pyramid_budgets


@pytest.mark.parametrize(
    ("budget", "slots"),
    [
        ("100", 100),
        ("25%", 1024),
        ("12.5%", 512),
        ("1MB", 976),
        ("1MiB", 1024),
        ("8MiB/8", 1024),
        ("0.5KB", 0),
        ("80GB", 4096),
        ("2GB/0", None),
        ("half", None),
        ("1mb", None),
        ("25", 25),
    ],
)
def test_budget_formats(budget: str, slots: int | None) -> None:
    assert parse_budget(budget, 4096, lambda slots: 1024 * slots) == slots


def test_a_budget_in_bytes_counts_what_each_number_of_slots_takes() -> None:
    """One layer with a window of 100 tokens, and one without."""
    assert parse_budget("300KB", 4096, lambda slots: 1000 * (slots + min(slots, 100))) == 200
    assert parse_budget("300KB", 4096, lambda slots: 1000 * (slots + min(slots, 100)), append_slots=50) == 150


def bytes_with_rings(slots: int, windows: list[int]) -> int:
    """Return the bytes of layers with rings of `windows` slots of 1,000 bytes, and 8 bytes of score and position in others."""
    return sum(1000 * window if window <= slots else 1008 * slots for window in (*windows, 5000))


@given(budget=st.integers(1, 12_000), windows=st.lists(st.integers(2, 1000), max_size=3))
@example(budget=199, windows=[100])
@example(budget=201, windows=[100])
def test_a_budget_in_bytes_is_the_largest_number_of_slots_that_fits(budget: int, windows: list[int]) -> None:
    """A layer that keeps its ring has no scores: 100 slots of a ring take fewer bytes than 99 slots of an evicting layer."""
    found = parse_budget(f"{budget}KB", 1024, lambda slots: bytes_with_rings(slots, windows), ring_slots=windows)
    expected = [slots for slots in range(1, 1025) if bytes_with_rings(slots, windows) <= 1000 * budget]
    assert found == max(expected, default=0)


@given(
    slots=st.integers(8, 4096),
    layers=st.integers(1, 80),
    steepness=st.floats(1, 20),
    extra=st.integers(0, 4096),
    spare=st.integers(0, 4),
)
def test_a_pyramid_has_the_requested_mean(slots: int, layers: int, steepness: float, extra: int, spare: int) -> None:
    least, most = min(8, slots), slots + extra
    sizes = pyramid_budgets(slots, layers * 4, steepness, least, most)
    assert len(sizes) == layers * 4
    assert all(least <= size <= most for size in sizes)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert abs(np.mean(sizes) - slots) <= 0.5
    assert len(set(sizes)) <= 4


def test_pyramids_of_different_steepness() -> None:
    assert pyramid_budgets(100, 8, 1.0, 10, 1000) == (100,) * 8
    assert pyramid_budgets(100, 8, 4.0, 10, 1000) == (175, 175, 125, 125, 75, 75, 25, 25)
    assert pyramid_budgets(100, 8, 4.0, 10, 150) == (150, 150, 117, 117, 83, 83, 50, 50)
