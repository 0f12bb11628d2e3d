"""Metrics of stacked outputs: the same as those of each output alone."""

import dataclasses

import numpy as np
import pytest

from ryzen_compile.numerics.metrics import Measurement
from ryzen_compile.numerics.stacked_metrics import MAX_STACKED_ELEMENTS, OutputPair, measure_all


def make_pairs(shape: tuple[int, ...], count: int = 6, dtype: str = "float32", **fields: object) -> list[OutputPair]:
    rng = np.random.default_rng(0)
    baselines = [rng.standard_normal(shape).astype(dtype) for _ in range(count)]
    return [OutputPair((array + rng.normal(0, 1e-3, shape)).astype(dtype), array, **fields) for array in baselines]  # type: ignore[arg-type]


def assert_same(stacked: Measurement, alone: Measurement) -> None:
    for field in dataclasses.fields(Measurement):
        left, right = getattr(stacked, field.name), getattr(alone, field.name)
        if field.name in ("difference_norm", "baseline_norm"):
            assert left.exponent == right.exponent
            assert left.sum_of_squares == pytest.approx(right.sum_of_squares, rel=1e-12)
        elif field.name == "cosine" and right is not None:
            assert left == pytest.approx(right, rel=1e-12)
        else:
            assert left == right, field.name


def assert_stacks(pairs: list[OutputPair], *, stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the metrics are those of each pair alone, and that the pairs were stacked or measured one by one."""
    expected = [pair.measure() for pair in pairs]
    alone: list[OutputPair] = []
    measure_alone = OutputPair.measure

    def record(pair: OutputPair) -> Measurement:
        alone.append(pair)
        return measure_alone(pair)

    monkeypatch.setattr(OutputPair, "measure", record)
    for measurement, right in zip(measure_all(pairs), expected, strict=True):
        assert_same(measurement, right)
    assert len(alone) == (0 if stacked else len(pairs))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [(), (1,), (8,), (3, 8), (2, 3, 4), (2, 3, 4, 5)])
def test_stacked_outputs_have_the_metrics_of_each_alone(
    shape: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_stacks(make_pairs(shape, dtype=dtype), stacked=True, monkeypatch=monkeypatch)


def test_vectors_of_a_state_are_those_of_its_last_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_stacks(make_pairs((1, 2, 3, 4), vector_axes=1), stacked=True, monkeypatch=monkeypatch)


def test_different_float_types_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [dataclasses.replace(pair, candidate=pair.candidate.astype("float16")) for pair in make_pairs((8,))]
    assert measure_all(pairs)[0].notes == ["is float16, the baseline is float32"]
    assert_stacks(pairs, stacked=True, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("candidate", "baseline"),
    [
        ([0.0, 0.0], [0.0, 0.0]),
        ([0.0, 0.0], [1.0, 0.0]),
        ([1.0, 0.0], [0.0, 0.0]),
        ([1.0, 0.0], [0.0, 1.0]),
        ([-1.0, 2.0], [1.0, -2.0]),
        ([1e-45, 0.0], [1e-45, 1e-45]),
        ([3e38, -3e38], [1.0, 1.0]),
    ],
)
def test_zeros_and_extremes_in_a_stack(candidate: list[float], baseline: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    extreme = OutputPair(np.array([candidate], np.float32), np.array([baseline], np.float32))
    assert_stacks([*make_pairs((1, 2)), extreme], stacked=True, monkeypatch=monkeypatch)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
@pytest.mark.parametrize("side", ["candidate", "baseline"])
def test_an_output_with_a_special_element_is_measured_alone(value: float, side: str) -> None:
    pairs = make_pairs((2, 8))
    special = getattr(pairs[2], side).copy()
    special[1, 3] = value
    pairs[2] = dataclasses.replace(pairs[2], **{side: special})
    for measurement, pair in zip(measure_all(pairs), pairs, strict=True):
        assert_same(measurement, pair.measure())


@pytest.mark.parametrize(
    "pairs",
    [
        make_pairs((8,), dtype="float64"),
        make_pairs((8,), compare_top1=True),
        make_pairs((2, 8), mask=np.array([True, False])),
        make_pairs((MAX_STACKED_ELEMENTS + 1,)),
        make_pairs((8,), count=3),
        [OutputPair(np.arange(3), np.array([0, 1, 3]))] * 6,
        [OutputPair(np.zeros((2, 0), np.float32), np.zeros((2, 0), np.float32))] * 6,
        [OutputPair(np.zeros((2, 1), np.float32), np.zeros((2,), np.float32))] * 6,
    ],
    ids=["float64", "top1", "mask", "large", "few", "int64", "empty", "shapes"],
)
def test_other_outputs_are_measured_alone(pairs: list[OutputPair], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_stacks(pairs, stacked=False, monkeypatch=monkeypatch)


def test_outputs_of_several_shapes_keep_their_order() -> None:
    pairs = [pair for couple in zip(make_pairs((8,)), make_pairs((4,)), make_pairs((2, 4)), strict=True) for pair in couple]
    for measurement, pair in zip(measure_all(pairs), pairs, strict=True):
        assert_same(measurement, pair.measure())
