"""Budgets of the kv passes: how they are written, and how a pyramid divides them among the layers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
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
