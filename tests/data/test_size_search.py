"""Tests of the search for the sizes with which a model runs."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from ryzen_compile.data.size_search import find_limits, find_running_sizes, search_ranges
from ryzen_compile.spec.interface import InputSpec, Interface


@pytest.mark.parametrize("smallest", [1, 2, 37, 100])
def test_smallest_size_is_found(smallest: int) -> None:
    def trial(sizes: Mapping[str, int]) -> str | None:
        return None if sizes["n"] >= smallest else f"too small: {sizes['n']}"

    limits = find_limits({"n": 100, "m": 3}, {"n": 1, "m": 1}, "min", trial)
    assert [(limit.dim, limit.size, limit.reason) for limit in limits] == [("n", smallest, f"too small: {smallest - 1}")] * (
        smallest > 1
    )


def test_largest_size_of_each_dim_is_found_in_few_runs() -> None:
    runs = []

    def trial(sizes: Mapping[str, int]) -> str | None:
        runs.append(dict(sizes))
        return None if sizes["n"] <= 64 and sizes["m"] <= 7 else "too large"

    limits = find_limits({"n": 10, "m": 1}, {"n": 512, "m": 8}, "max", trial)
    assert {limit.dim: limit.size for limit in limits} == {"n": 64, "m": 7}
    assert len(runs) < 20


def test_dims_that_run_alone_but_not_together_are_reduced_until_they_do() -> None:
    def trial(sizes: Mapping[str, int]) -> str | None:
        return None if sizes["n"] * sizes["m"] <= 100 else "too large together"

    limits = find_limits({"n": 2, "m": 2}, {"n": 40, "m": 40}, "max", trial)
    assert {limit.dim: limit.size for limit in limits} == {"n": 10, "m": 10}


def test_a_model_that_runs_with_known_sizes_only_keeps_them() -> None:
    known = {"n": 6, "m": 2}

    def trial(sizes: Mapping[str, int]) -> str | None:
        return None if sizes == known else "other sizes"

    for kind, bounds in (("min", {"n": 1, "m": 1}), ("max", {"n": 40, "m": 40})):
        limits = find_limits(known, bounds, kind, trial)
        assert {limit.dim: limit.size for limit in limits} == known


def test_no_sizes_are_tried_twice() -> None:
    runs: list[dict[str, int]] = []

    def trial(sizes: Mapping[str, int]) -> str | None:
        runs.append(dict(sizes))
        return None if sizes["n"] * sizes["m"] <= 30 else "too large"

    for bounds in ({"n": 64}, {"n": 16, "m": 16}):
        runs.clear()
        assert find_limits({"n": 2, "m": 2}, bounds, "max", trial)
        assert all(runs.count(sizes) == 1 for sizes in runs)


def test_a_model_runs_twice_with_the_known_sizes_and_is_not_searched_if_it_fails() -> None:
    interface = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=("n", "m")),), outputs=())
    runs: list[dict[str, int]] = []

    def trial(sizes: Mapping[str, int]) -> str | None:
        runs.append(dict(sizes))
        return failure

    known, failure = {"n": 4, "m": 4}, None
    assert search_ranges(interface, known, trial) == ()
    assert runs.count(known) == 2
    runs.clear()
    failure = "wrong type"
    assert search_ranges(interface, known, trial) == ()
    assert runs == [known]


def test_dims_that_must_be_equal_are_moved_together() -> None:
    def trial(sizes: Mapping[str, int]) -> str | None:
        return None if sizes["a"] == sizes["b"] and sizes["n"] <= 50 else "refused"

    limits = find_limits({"a": 1, "b": 1, "n": 32}, {"a": 8, "b": 512, "n": 512}, "max", trial)
    assert {limit.dim: (limit.size, limit.reason) for limit in limits} == {
        "b": (8, "it must equal `a`"),
        "n": (50, "refused"),
    }
    minima = find_limits({"a": 8, "b": 8, "n": 32}, {"a": 1, "b": 1, "n": 1}, "min", trial)
    assert minima == ()


def test_sizes_are_those_with_which_the_most_cases_run() -> None:
    def trial(sizes: Mapping[str, int], case: int) -> str | None:
        smallest, largest = ((1, 40), (10, 512), (600, 900))[case]
        return None if smallest <= sizes["n"] <= largest and sizes["b"] == 1 else "refused"

    interface = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=(2, "b", "n")),), outputs=())
    found = find_running_sizes(interface, [], 3, trial, is_too_large=lambda sizes: None)
    assert found is not None
    assert (found.sizes, found.cases) == ({"b": 1, "n": 32}, (0, 1))
    first = find_running_sizes(interface, [{"b": 1, "n": 20}], 2, trial, is_too_large=lambda sizes: None)
    assert first is not None
    assert first.sizes == {"b": 1, "n": 20}
    assert find_running_sizes(interface, [], 1, trial, is_too_large=lambda sizes: "too large") is None
    limited = Interface(inputs=interface.inputs, outputs=(), min_sizes={"n": 12}, max_sizes={"n": 20})
    within = find_running_sizes(limited, [], 2, trial, is_too_large=lambda sizes: None)
    assert within is not None
    assert within.sizes == {"b": 1, "n": 20}
