"""Comparison of the outputs of two implementations of an op."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.declared_op import declared_op

from ryzen_compile.ops.equivalence import find_mismatch
from ryzen_compile.spec.op import TensorParam

OP = declared_op(tolerance={"float32": 0.1, "float16": 0.2}, more_outputs=(TensorParam("n", "int32", "N"),))
INF = float("inf")


def compare(value: float, exact: float, *, dtype: str = "float32", tolerance_factor: float = 1, count: int = 3) -> str | None:
    actual = {"y": np.array([value], np.float32), "n": np.array([count], np.int32)}
    expected = {"y": np.array([exact], np.float64), "n": np.array([3], np.int32)}
    return find_mismatch(OP, {"T": dtype}, actual, expected, tolerance_factor=tolerance_factor)


@pytest.mark.parametrize(
    ("value", "exact"), [(1.0, 1.0), (1.19, 1.0), (-9.9, -9.0), (0.09, 0.0), (INF, INF), (-INF, -INF), (np.nan, np.nan)]
)
def test_values_within_the_tolerance_match(value: float, exact: float) -> None:
    assert compare(value, exact) is None


@pytest.mark.parametrize(
    ("value", "exact"),
    [(1.21, 1.0), (0.11, 0.0), (-INF, INF), (INF, -INF), (7.0, -INF), (7.0, INF), (INF, 7.0), (np.nan, 7.0), (7.0, np.nan)],
)
def test_values_outside_the_tolerance_do_not_match(value: float, exact: float) -> None:
    mismatch = compare(value, exact)
    assert mismatch is not None
    assert "`y` differs in 1 of 1 elements; at [0]" in mismatch


def test_the_tolerance_depends_on_the_type_and_is_multiplied_by_the_factor() -> None:
    assert compare(1.3, 1.0) is not None
    assert compare(1.3, 1.0, dtype="float16") is None
    assert compare(1.3, 1.0, tolerance_factor=2) is None


def test_integers_must_be_equal() -> None:
    assert compare(1.0, 1.0, count=4) == "`n` differs in 1 of 1 elements; at [0] it is 4, expected 3"


def test_shapes_must_be_equal() -> None:
    actual = {"y": np.zeros(2, np.float32), "n": np.zeros(1, np.int32)}
    expected = {"y": np.zeros(1), "n": np.zeros(1, np.int32)}
    assert find_mismatch(dataclasses.replace(OP), {"T": "float32"}, actual, expected) == "`y` has shape [2], expected [1]"
