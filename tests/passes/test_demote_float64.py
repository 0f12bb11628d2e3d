"""The pass `demote-float64`: what a graph in float64 computes in float32, and what a build does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.ort_session import run_model

import ryzen_compile as rc
from ryzen_compile.backends.traits import find_traits
from ryzen_compile.errors import AccuracyError, PipelineError
from ryzen_compile.ir.analysis.graph_contents import graph_contents
from ryzen_compile.pipeline.pass_manager import run_passes
from ryzen_compile.registry import properties
from ryzen_compile.spec.dtypes import Precision
from ryzen_compile.spec.legalization_pass import GraphContents
from ryzen_compile.spec.pass_record import PassRecord
from ryzen_compile.spec.passes import PassContext
from ryzen_passes.demote_float64 import DemoteFloat64
from ryzen_passes.properties import TYPES_NO_FLOAT64

Array = np.ndarray[Any, np.dtype[Any]]
EPOCH = 1.7e9
MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (double[B,4] x, bool flag) => (double[B,4] y, float[B,4] z) {
    h = Mul (x, w)
    y = If (flag) <
        then_branch = a () => (double[B,4] t) { t = Add (h, big) },
        else_branch = b () => (double[B,4] e) { one = Constant <value = double[1] {1.0}> ()  e = Sub (h, one) }
    >
    z = Cast <to = 1> (x)
}
"""


def parse(text: str, **weights: Array) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    return ir.from_proto(proto)


def model() -> ir.Model:
    return parse(MODEL, w=np.array([1.5, -2.0, 0.1, 3.0]), big=np.array([1e300, -1e300, np.inf, 2.0]))


def demote(graph: ir.Model, *, synthetic: bool = False) -> PassRecord:
    context = PassContext(backend="tensorrt-rtx", samples_origin="random" if synthetic else "given")
    (record,) = run_passes(graph, [DemoteFloat64()], context, properties())
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    return record


def test_the_property_names_the_type_of_an_attribute() -> None:
    graph = parse(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[4] x) => (float[4] y) { c = Cast <to = 11> (x)  '
        "y = Cast <to = 1> (c) }"
    )
    assert TYPES_NO_FLOAT64.check(graph) == "`Cast` has the attribute to=DOUBLE"


def test_every_node_computes_in_float32_and_the_interface_stays_float64() -> None:
    graph, x = model(), np.random.default_rng(0).standard_normal((3, 4))
    demote(graph)
    inner = [value for node in graph.graph.all_nodes() for value in node.outputs if value.dtype == ir.DataType.DOUBLE]
    assert [value.name for value in inner] == ["y"]
    y, z = run_model(graph, {"x": x, "flag": np.array(False)})
    single = x.astype(np.float32)
    assert (y.dtype, z.dtype) == (np.float64, np.float32)
    np.testing.assert_array_equal(y, (single * np.float32([1.5, -2, 0.1, 3]) - 1).astype(np.float64))
    np.testing.assert_array_equal(z, single)


def test_constants_beyond_float32_are_clamped_as_tensorrt_does_and_infinities_are_kept() -> None:
    graph = model()
    demote(graph)
    (y, _) = run_model(graph, {"x": np.zeros((1, 4)), "flag": np.array(True)})
    largest = float(np.finfo(np.float32).max)
    np.testing.assert_array_equal(y, [[largest, -largest, np.inf, 2]])


def test_a_float64_input_without_real_values_is_a_warning_and_a_cast_of_the_model_itself_is_none() -> None:
    (warning,) = demote(model(), synthetic=True).warnings
    assert "`x` is rounded to float32" in warning
    assert "--data" in warning
    assert demote(model()).warnings == ()
    own_cast = parse('<ir_version: 10, opset_import: ["" : 21]> g (double[N] x) => (float[N] y) { y = Cast <to = 1> (x) }')
    assert demote(own_cast, synthetic=True).warnings == ()


def test_a_bitcast_of_float64_is_refused() -> None:
    bits = parse('<ir_version: 13, opset_import: ["" : 26]> g (double[N] x) => (int64[N] y) { [b] y = BitCast <to = 7> (x) }')
    with pytest.raises(PipelineError, match="bits of a float64"):
        run_passes(bits, [DemoteFloat64()], PassContext(backend="tensorrt-rtx"), properties())


def test_the_backends_that_compute_float64_in_float32_need_the_pass() -> None:
    with_float64, without = GraphContents(element_types=("float64",)), GraphContents(element_types=("float32", "int64"))
    needing = {name for name in ("onnxruntime", "tensorrt", "tensorrt-rtx") if needed(name, with_float64)}
    assert needing == {"tensorrt", "tensorrt-rtx"}
    assert not needed("tensorrt-rtx", without)


def needed(backend: str, contents: GraphContents) -> bool:
    return DemoteFloat64.for_backend(find_traits(backend), contents) is not None


def test_float64_is_found_in_constants_casts_and_subgraphs() -> None:
    assert graph_contents(model()).element_types == ("bool", "float32", "float64")
    cast = parse(
        '<ir_version: 10, opset_import: ["" : 21]> '
        "g (float[N] x) => (float[N] y) { d = Cast <to = 11> (x)  e = Neg (d)  y = Cast <to = 1> (e) }"
    )
    assert graph_contents(cast) == GraphContents(element_types=("float32", "float64"), ops=("::Cast", "::Neg"))


def save(
    path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], **weights: Array
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, dims) for name, dims in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, dims) for name, dims in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture
def age(tmp_path: Path) -> Path:
    """Write a model that subtracts a time from timestamps in seconds."""
    nodes = [helper.make_node("Sub", ["t", "epoch"], ["age"], name="age")]
    return save(tmp_path / "age.onnx", nodes, {"t": ["b"]}, {"age": ["b"]}, epoch=np.array(EPOCH))


def test_timestamps_that_float32_cannot_hold_are_refused_with_figures_and_a_hint(age: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", t=np.array([EPOCH + 5, EPOCH + 61]))
    with pytest.raises(AccuracyError) as caught:
        rc.build(age, gpu="cpu,sm89", data=str(tmp_path / "t.npz"), cache=False)
    first = caught.value.diagnostics[0]
    assert first.location == "graphs/model.fold+demote-float64+attention.onnx"
    assert "does not meet age max_abs <= 0.00061 after `demote-float64`: worst value 61" in first.message
    assert first.hint is not None
    assert "build it for the CPU only (--gpu cpu)" in first.hint
    package = rc.build(age, gpu="cpu", data=str(tmp_path / "t.npz"), cache=False)
    with rc.load(package.path) as engine:
        np.testing.assert_array_equal(engine(t=np.array([EPOCH + 5, EPOCH + 61])), [5, 61])


@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
def test_timestamps_are_refused_without_real_values_too(precision: Precision | None, age: Path) -> None:
    with pytest.raises(AccuracyError, match=r"age centered_l2 <= 0[.]\d+ after `demote-float64"):
        rc.build(age, gpu="sm89", precision=precision, cache=False)


def test_a_benign_model_in_float64_meets_the_criteria_and_records_the_pass(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="second"),
    ]
    weights = {"w": rng.standard_normal((32, 64)), "v": rng.standard_normal((64, 8))}
    source = save(tmp_path / "mlp.onnx", nodes, {"x": ["b", 32]}, {"y": ["b", 8]}, **weights)
    package = rc.build(source, gpu="cpu,sm89", cache=False)
    variants = {variant.backend: variant for variant in package.manifest.graphs[0].variants}
    assert [record.pass_spec for record in variants["tensorrt-rtx"].passes] == ["fold", "demote-float64", "attention"]
    assert [record.pass_spec for record in variants["onnxruntime"].passes] == ["fold"]
    assert all(accuracy.met for variant in variants.values() for accuracy in variant.accuracy)
    worst = {metric.name: metric.worst for metric in variants["tensorrt-rtx"].accuracy[0].metrics}
    assert 0 < worst["relative_l2"] < 1e-6
    assert package.manifest.graphs[0].interface.inputs[0].dtype == "float64"
    assert any("`x` is rounded to float32" in warning for warning in variants["tensorrt-rtx"].passes[1].warnings)
