"""How far two lives of an op may be from each other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ryzen_compile.ops.equivalence import find_mismatch
from ryzen_compile.spec.op import Op, TensorParam

OP = Op(
    domain="tests",
    name="Two",
    version=1,
    description="a number and a count",
    inputs=(TensorParam("x", "T", "N"),),
    outputs=(TensorParam("y", "T", "N"), TensorParam("n", "int32", "N")),
    type_constraints={"T": ("float32", "float16")},
    reference="nowhere:nothing",
    tolerance={"float32": 0.1, "float16": 0.2},
)
INF = float("inf")


def says(found: float, exact: float, *, element: str = "float32", slack: float = 1, count: int = 3) -> str | None:
    one = {"y": np.array([found], np.float32), "n": np.array([count], np.int32)}
    other = {"y": np.array([exact], np.float64), "n": np.array([3], np.int32)}
    return find_mismatch(OP, {"T": element}, one, other, tolerance_factor=slack)


@pytest.mark.parametrize(
    ("found", "exact"), [(1.0, 1.0), (1.19, 1.0), (-9.9, -9.0), (0.09, 0.0), (INF, INF), (-INF, -INF), (np.nan, np.nan)]
)
def test_what_is_near_agrees(found: float, exact: float) -> None:
    assert says(found, exact) is None


@pytest.mark.parametrize(
    ("found", "exact"),
    [(1.21, 1.0), (0.11, 0.0), (-INF, INF), (INF, -INF), (7.0, -INF), (7.0, INF), (INF, 7.0), (np.nan, 7.0), (7.0, np.nan)],
)
def test_what_is_far_does_not(found: float, exact: float) -> None:
    said = says(found, exact)
    assert said is not None
    assert "`y` differs in 1 of 1 elements; at [0]" in said


def test_a_type_has_its_own_tolerance_and_slack_widens_it() -> None:
    assert says(1.3, 1.0) is not None
    assert says(1.3, 1.0, element="float16") is None
    assert says(1.3, 1.0, slack=2) is None


def test_integers_must_be_equal() -> None:
    assert says(1.0, 1.0, count=4) == "`n` differs in 1 of 1 elements; at [0] it is 4, not 3"


def test_shapes_must_be_equal() -> None:
    one = {"y": np.zeros(2, np.float32), "n": np.zeros(1, np.int32)}
    other = {"y": np.zeros(1), "n": np.zeros(1, np.int32)}
    assert find_mismatch(dataclasses.replace(OP), {"T": "float32"}, one, other) == "`y` is of shape [2], not [1]"
