"""Tests of the comparison of an exported graph with its module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.errors import AccuracyError, BackendError, RyzenError
from ryzen_compile.exporter.validation import CaseError, compare_with_module, comparison_inputs, control_inputs, sizes_hint
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.spec.interface import Inputs, InputSpec, Interface, Outputs, TensorSpec

INTERFACE = Interface(
    inputs=(InputSpec(name="x", dtype="float32", dims=("n", "m")),),
    outputs=(TensorSpec(name="y", dtype="float32", dims=("n", "m")),),
    max_sizes={"n": 2},
)
Y = np.array([[1, -20, 3]], np.float32)


def write_graph(tmp_path: Path, body: str = "y = Identity (x)", output: str = "float[n, m] y") -> Path:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[n, m] x) => ({output}) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def compare(path: Path, module_output: Any, *, max_abs: float | None = None) -> Any:
    return compare_with_module(path, lambda inputs: {"y": module_output}, [("it", {"x": Y})], INTERFACE, max_abs=max_abs)


def test_largest_difference_is_reported_with_its_case(tmp_path: Path) -> None:
    cases, (worst,) = compare(write_graph(tmp_path), Y + np.array([0, 0.25, 0], np.float32), max_abs=0.5)
    assert (cases, worst.max_abs, worst.bound, worst.case) == (1, 0.25, 0.5, "it, n=1, m=3")


def test_difference_above_the_bound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match="`y` .* differs from that of the module by 0.25, more than the accepted 0.1"):
        compare(write_graph(tmp_path), Y + 0.25, max_abs=0.1)


def test_default_bound_of_float32_is_relative_to_the_largest_magnitude(tmp_path: Path) -> None:
    _, (worst,) = compare(write_graph(tmp_path), Y)
    assert worst.bound == pytest.approx(2e-3)
    with pytest.raises(AccuracyError, match="more than the accepted 0.002"):
        compare(write_graph(tmp_path), Y + 3e-3)


def test_rounding_of_one_element_is_accepted_but_not_that_of_all(tmp_path: Path) -> None:
    """Of 1,000 elements up to 20, one may differ by 100 times the accepted root mean square, all by no more than it."""
    x = np.linspace(-20, 20, 1000, dtype=np.float32)[None]
    one = np.zeros_like(x)
    one[0, 3] = 1.9e-3
    cases = [("it", {"x": x})]
    compare_with_module(write_graph(tmp_path), lambda inputs: {"y": x + one}, cases, INTERFACE, max_abs=None)
    with pytest.raises(AccuracyError, match="by 0.0005 in the root mean square"):
        compare_with_module(write_graph(tmp_path), lambda inputs: {"y": x + np.float32(5e-4)}, cases, INTERFACE, max_abs=None)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 3e-5), (np.float64, 3e-11)])
def test_a_uniform_difference_of_a_small_output_is_bounded_by_its_root_mean_square(
    dtype: Any, bound: float, tmp_path: Path
) -> None:
    element = {np.float32: "float", np.float64: "double"}[dtype]
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({element}[n, m] x) => ({element}[n, m] y) {{ y = Identity (x) }}'
    path = tmp_path / "identity.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    interface = Interface(
        inputs=(InputSpec(name="x", dtype=np.dtype(dtype).name, dims=("n", "m")),),
        outputs=(TensorSpec(name="y", dtype=np.dtype(dtype).name, dims=("n", "m")),),
    )
    cases = [("it", {"x": np.zeros((4, 5), dtype)})]
    compare_with_module(path, lambda inputs: {"y": inputs["x"] + dtype(0.9 * bound)}, cases, interface, max_abs=None)
    with pytest.raises(AccuracyError, match="in the root mean square"):
        compare_with_module(path, lambda inputs: {"y": inputs["x"] + dtype(1.1 * bound)}, cases, interface, max_abs=None)


def test_equal_infinities_and_nans_match_but_a_single_nan_does_not(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "z = Constant <value_float = 0.0> ()  y = Div (x, z)")
    with np.errstate(divide="ignore"):
        assert compare(path, Y / 0)[1][0].max_abs == 0
    with pytest.raises(AccuracyError, match="by nan"):
        compare(write_graph(tmp_path), np.array([[1, np.nan, 3]], np.float32), max_abs=100)


def test_integers_must_be_equal_for_any_bound(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "y = Cast <to = 7> (x)", "int64[n, m] y")
    assert compare(path, Y.astype(np.int64), max_abs=5)[1][0].bound_fraction == 0
    with pytest.raises(AccuracyError, match="differs from that of the module by 1, more than the accepted 0 "):
        compare(path, Y.astype(np.int64) + 1, max_abs=5)


@pytest.mark.parametrize("module_output", [Y[0], Y.astype(np.float64)])
def test_other_shape_or_type_is_refused(tmp_path: Path, module_output: Any) -> None:
    with pytest.raises(AccuracyError, match="of the exported graph is float32 1x3, but that of the module is"):
        compare(write_graph(tmp_path), module_output, max_abs=5)


def test_comparison_without_cases_fails(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match="there are no cases"):
        compare_with_module(write_graph(tmp_path), lambda inputs: {}, [], INTERFACE, max_abs=1)


def test_graph_that_fails_on_valid_inputs_is_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "s = Constant <value_ints = [7, 7]> ()  y = Reshape (x, s)")
    with pytest.raises(AccuracyError, match=r"fails on inputs that the module accepts \(it, n=1, m=3\)"):
        compare(path, Y)


def test_failing_module_is_reported_with_its_sizes(tmp_path: Path) -> None:
    def failing_module(inputs: Any) -> Any:
        raise RyzenError("the module fails: ValueError")

    with pytest.raises(RyzenError, match=r"the module fails: ValueError \(it, n=1, m=3\)"):
        compare_with_module(write_graph(tmp_path), failing_module, [("it", {"x": Y})], INTERFACE, max_abs=1)


def test_graph_that_onnx_runtime_cannot_load_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError):
        compare(write_graph(tmp_path, "y = NoSuchOp (x)"), Y)


def test_an_error_has_the_inputs_of_an_earlier_case_without_a_search_for_sizes(tmp_path: Path) -> None:
    runs = []

    def module(inputs: Inputs) -> Outputs:
        runs.append(inputs)
        return {"y": inputs["x"] + (inputs["x"].shape[0] - 1)}

    cases = [("it", {"x": np.repeat(Y, rows, axis=0)}) for rows in (1, 2)]
    path = write_graph(tmp_path)
    for count, agreeing in ((2, cases[0][1]), (1, None)):
        runs.clear()
        with pytest.raises(CaseError, match="more than the accepted") as caught:
            compare_with_module(path, module, cases[-count:], INTERFACE, max_abs=None)
        assert caught.value.agreeing_inputs is agreeing
        assert len(runs) == count


def test_sizes_at_which_graph_and_module_agree_are_found_within_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def module(inputs: Inputs) -> Outputs:
        return {"y": inputs["x"] + (inputs["x"].shape[0] - 1)}

    path = write_graph(tmp_path)
    hint = sizes_hint(path, module, {"x": Y}, INTERFACE, max_abs=None)
    assert hint == "use --dynamic x:0=n:..1,1=m"
    monkeypatch.setattr("ryzen_compile.exporter.validation._MAX_HINT_SECONDS", 0.0)
    assert sizes_hint(path, module, {"x": Y}, INTERFACE, max_abs=None) is None


def test_cases_are_samples_and_synthetic_inputs_of_two_sets_of_shapes() -> None:
    cases = list(comparison_inputs([{"x": Y}], INTERFACE, seed=0))
    assert [(source, inputs["x"].shape) for source, inputs in cases] == [
        ("sample 0", (1, 3)),
        ("synthetic", (1, 1)),
        ("synthetic", (2, 7)),
    ]


def test_cases_have_both_values_of_flags_and_edge_values_of_counts_as_far_as_the_module_takes_them() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (bool flag, int64 n, float[N] x) => (float[N] y) {
        yes = Constant <value = bool {1}> ()
        y = Loop (n, yes, x) <body = b (int64 i, bool go, float[N] v) => (bool on, float[N] w) {
            on = Identity (go)  w = Neg (v) }>
    }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))

    def module(inputs: Inputs) -> Outputs:
        if not inputs["n"]:
            raise RyzenError("the module takes no empty loop")
        return {}

    sample = {"flag": np.array(True), "n": np.array(2), "x": np.ones(3, np.float32)}
    cases = list(control_inputs(model, interface_of(model), sample, module))
    assert [source for source, _ in cases] == [f"flag={flag}, n={n}" for flag in (False, True) for n in (1, 3)]
    assert all(inputs["x"] is sample["x"] and inputs["n"].dtype == np.int64 for _, inputs in cases)
