"""Tests of range measurement for calibration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.stage_counts import StageCounts

from ryzen_compile.errors import BackendError
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save
from ryzen_compile.pipeline.range_measurement import capture, measure_ranges
from ryzen_compile.spec.passes import ValueRange


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


def floats(*values: float, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=dtype)


def test_ranges_of_float_tensors_cover_all_samples() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x, int64[N] i) => (float[N] y, int64[N] j) <float[1] k = {2.0}> { a = Mul (x, k) y = Neg (a) j = Neg (i) }
    """)
    samples = [{"x": floats(1, 3), "i": np.array([1, 2])}, {"x": floats(-2, 0), "i": np.array([3, 4])}]
    progress = StageCounts()
    assert measure_ranges(model, samples, progress=progress) == {
        "x": ValueRange(low=-2, high=3),
        "a": ValueRange(low=-4, high=6),
        "y": ValueRange(low=-6, high=4),
    }
    assert progress.texts() == ["measure value ranges: 2 of 2 samples"]


def test_no_samples_give_no_ranges() -> None:
    assert (
        measure_ranges(parse('<ir_version: 10, opset_import: ["" : 21]> g (float[N] x) => (float[N] y) { y = Neg (x) }'), [])
        == {}
    )


def test_the_model_is_not_modified() -> None:
    model = parse('<ir_version: 10, opset_import: ["" : 21]> g (float[N] x) => (float[N] y) { a = Abs (x) y = Neg (a) }')
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    measure_ranges(model, [{"x": floats(1)}])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("index", range(3))
def test_infinities_and_nan_are_ignored_at_any_index(index: int) -> None:
    model = parse('<ir_version: 10, opset_import: ["" : 21]> g (float[N] x) => (float[N] y) { y = Neg (x) }')
    for special in (np.inf, -np.inf, np.nan):
        values = floats(5, 7, -3, 2, 6)
        values[index * 2] = special
        finite = values[np.isfinite(values)]
        assert measure_ranges(model, [{"x": values}])["x"] == ValueRange(low=min(finite), high=max(finite))


def test_a_tensor_without_elements_in_all_samples_has_the_range_zero() -> None:
    model = parse('<ir_version: 10, opset_import: ["" : 21]> g (float[N, 2] x) => (float[N, 2] y) { y = Neg (x) }')
    empty = np.zeros((0, 2), np.float32)
    assert measure_ranges(model, [{"x": empty}])["y"] == ValueRange(low=0, high=0)
    assert measure_ranges(model, [{"x": empty}, {"x": np.full((1, 2), 4, np.float32)}])["y"] == ValueRange(low=-4, high=-4)


@pytest.mark.parametrize(("onnx_type", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_other_float_types_are_measured(onnx_type: str, dtype: Any) -> None:
    model = parse(f'<ir_version: 10, opset_import: ["" : 21]> g ({onnx_type}[N] x) => ({onnx_type}[N] y) {{ y = Neg (x) }}')
    assert measure_ranges(model, [{"x": floats(1, 3, dtype=dtype)}])["y"] == ValueRange(low=-3, high=-1)


def test_bf16_tensors_between_casts_are_measured() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y) { h = Cast <to: int = 16> (x) y = Cast <to: int = 1> (h) }
    """)
    assert measure_ranges(model, [{"x": floats(1.001)}])["h"] == ValueRange(low=1, high=1)


def test_inputs_and_outputs_of_control_flow_are_measured_but_not_its_subgraphs() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x, bool c) => (float[N] y) {
            a = Neg (x)
            y = If (c) <
                then_branch = t () => (float[N] s) { r = Mul (a, a) s = Neg (r) },
                else_branch = e () => (float[N] o) { o = Identity (a) }
            >
        }
    """)
    ranges = measure_ranges(model, [{"x": floats(3), "c": np.array(True)}])
    assert ranges == {"x": ValueRange(low=3, high=3), "a": ValueRange(low=-3, high=-3), "y": ValueRange(low=-9, high=-9)}


def test_external_weights_are_used(tmp_path: Path) -> None:
    model = parse('<ir_version: 10, opset_import: ["" : 21]> g (float[N,512] x) => (float[N,4] y) { y = MatMul (x, w) }')
    proto = ir.to_proto(model)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full((512, 4), 0.5, np.float32), "w"))
    save(ir.from_proto(proto), tmp_path / "m.onnx", weights="external")
    assert measure_ranges(load(tmp_path / "m.onnx"), [{"x": np.ones((1, 512), np.float32)}])["y"] == ValueRange(
        low=256, high=256
    )


def test_weights_of_types_that_numpy_lacks_are_used() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N,512] x) => (float[N,4] y) { f = Cast <to: int = 1> (w) y = MatMul (x, f) }
    """)
    proto = ir.to_proto(model)
    weight = ir.tensor(np.full((512, 4), 0.5, ml_dtypes.bfloat16), name="w")
    proto.graph.initializer.append(ir.to_proto(weight))
    ranges = measure_ranges(ir.from_proto(proto), [{"x": np.ones((1, 512), np.float32)}])
    assert ranges["y"] == ValueRange(low=256, high=256)


def test_the_error_for_an_unsupported_op_names_the_op() -> None:
    model = parse('<ir_version: 10, opset_import: ["" : 21, "odd" : 1]> g (float[N] x) => (float[N] y) { y = odd.Thing (x) }')
    with pytest.raises(BackendError, match="odd.*Thing"):
        measure_ranges(model, [{"x": floats(1)}])


def test_the_error_for_a_sample_of_wrong_shape_names_the_sample() -> None:
    model = parse('<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Neg (x) }')
    with pytest.raises(BackendError, match="sample 1.*x"):
        measure_ranges(model, [{"x": floats(1, 2)}, {"x": floats(1, 2, 3)}])
    with pytest.raises(BackendError, match="sample 0.*x"):
        measure_ranges(model, [{}])


def test_names_of_the_model_may_have_the_prefix_of_inserted_names() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y) {
            ["ryzen.observed"] "ryzen.observed" = Neg (x) ["ryzen.observed_2"] y = Neg ("ryzen.observed")
        }
    """)
    assert measure_ranges(model, [{"x": floats(1)}])["y"] == ValueRange(low=1, high=1)


def test_capture_runs_only_what_the_tensors_depend_on() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[7] y) <float[N] a> { a = Neg (x)  s = Constant <value_ints = [7]> ()  y = Reshape (a, s) }
    """)
    with capture(model, ["a"]) as run:
        assert run({"x": floats(1, 2)})["a"].tolist() == [-1, -2], "the Reshape would fail"
    assert [node.op_type for node in model.graph] == ["Neg", "Constant", "Reshape"]


CHAIN = """
import re
import numpy as np, onnx, onnx_ir as ir
from ryzen_compile.pipeline.range_measurement import measure_ranges
body = " ".join(f"a{i} = Sin (a{i - 1})" for i in range(1, 41))
text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[N] a0) => (float[N] a40) {{ {body} }}'
model = ir.from_proto(onnx.parser.parse_model(text))
measure_ranges(model, [{"a0": np.ones(10, np.float32)}])
def peak_mib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak_mib()
measure_ranges(model, [{"a0": np.ones(2_500_000, np.float32)}])
print(peak_mib() - before)
"""


def test_activations_are_freed_during_the_run() -> None:
    # 40 tensors of 10 MB each, of which a few are alive at a time.
    growth_mib = float(subprocess.run([sys.executable, "-c", CHAIN], capture_output=True, text=True, check=True).stdout)
    assert growth_mib < 150
