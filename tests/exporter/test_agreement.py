"""Agreement: what counts as the same, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ryzen_compile.errors import AccuracyError, BackendError, RyzenError
from ryzen_compile.exporter.validation import compare_with_module, comparison_inputs
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec

INTERFACE = Interface(
    inputs=(InputSpec(name="x", dtype="float32", dims=("n", "m")),),
    outputs=(TensorSpec(name="y", dtype="float32", dims=("n", "m")),),
    max_sizes={"n": 2},
)
Y = np.array([[1, -20, 3]], np.float32)


def graph(tmp_path: Path, body: str = "y = Identity (x)", output: str = "float[n, m] y") -> Path:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[n, m] x) => ({output}) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def judge(path: Path, made: Any, *, max_abs: float | None = None) -> Any:
    return compare_with_module(path, lambda feed: {"y": made}, [("it", {"x": Y})], INTERFACE, max_abs=max_abs)


def test_the_worst_difference_is_told_with_its_case(tmp_path: Path) -> None:
    cases, (worst,) = judge(graph(tmp_path), Y + np.array([0, 0.25, 0], np.float32), max_abs=0.5)
    assert (cases, worst.max_abs, worst.bound, worst.case) == (1, 0.25, 0.5, "it, n=1, m=3")


def test_a_difference_above_the_bound_is_refused_with_both(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match="`y` .* differs from the module by 0.25, accepted is 0.1"):
        judge(graph(tmp_path), Y + 0.25, max_abs=0.1)


def test_without_a_bound_float32_is_held_to_its_unit_of_the_largest_magnitude(tmp_path: Path) -> None:
    _, (worst,) = judge(graph(tmp_path), Y)
    assert worst.bound == pytest.approx(2e-4)
    with pytest.raises(AccuracyError):
        judge(graph(tmp_path), Y + 3e-4)


def test_equal_infinities_and_nans_agree_and_a_lone_nan_does_not(tmp_path: Path) -> None:
    path = graph(tmp_path, "z = Constant <value_float = 0.0> ()  y = Div (x, z)")
    with np.errstate(divide="ignore"):
        assert judge(path, Y / 0)[1][0].max_abs == 0
    with pytest.raises(AccuracyError, match="by nan"):
        judge(graph(tmp_path), np.array([[1, np.nan, 3]], np.float32), max_abs=100)


def test_integers_must_be_equal_whatever_the_bound(tmp_path: Path) -> None:
    path = graph(tmp_path, "y = Cast <to = 7> (x)", "int64[n, m] y")
    assert judge(path, Y.astype(np.int64), max_abs=5)[1][0].share == 0
    with pytest.raises(AccuracyError, match="differs from the module by 1, accepted is 0"):
        judge(path, Y.astype(np.int64) + 1, max_abs=5)


@pytest.mark.parametrize("made", [Y[0], Y.astype(np.float64)])
def test_another_shape_or_type_is_refused(tmp_path: Path, made: Any) -> None:
    with pytest.raises(AccuracyError, match="of the exported graph is float32 1x3, the module's"):
        judge(graph(tmp_path), made, max_abs=5)


def test_comparing_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match="on nothing"):
        compare_with_module(graph(tmp_path), lambda feed: {}, [], INTERFACE, max_abs=1)


def test_a_graph_that_fails_where_the_module_runs_is_refused(tmp_path: Path) -> None:
    path = graph(tmp_path, "s = Constant <value_ints = [7, 7]> ()  y = Reshape (x, s)")
    with pytest.raises(AccuracyError, match=r"fails where the module runs \(it, n=1, m=3\)"):
        judge(path, Y)


def test_a_module_that_fails_is_told_with_its_sizes(tmp_path: Path) -> None:
    def broken(feed: Any) -> Any:
        raise RyzenError("the module fails: ValueError")

    with pytest.raises(RyzenError, match="the module fails: ValueError at it, n=1, m=3"):
        compare_with_module(graph(tmp_path), broken, [("it", {"x": Y})], INTERFACE, max_abs=1)


def test_a_graph_that_onnx_runtime_refuses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError):
        judge(graph(tmp_path, "y = NoSuchOp (x)"), Y)


def test_cases_are_the_samples_and_synthetic_feeds_at_one_and_at_odd_sizes() -> None:
    found = list(comparison_inputs([{"x": Y}], INTERFACE, seed=0))
    assert [(says, feed["x"].shape) for says, feed in found] == [
        ("sample 0", (1, 3)),
        ("synthetic", (1, 1)),
        ("synthetic", (2, 7)),
    ]
