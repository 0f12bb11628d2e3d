"""What can be compared, by its spelling, and what is really executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import sample_package

from ryzen_compile import registry
from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import VariantRecord
from ryzen_compile.artifacts.package.write import Staging
from ryzen_compile.errors import PackageError, ShapeError, UsageError
from ryzen_compile.numerics.candidate import match_interfaces
from ryzen_compile.numerics.candidate_lookup import find_candidate, find_candidates, split_package_reference
from ryzen_compile.numerics.comparison import Comparison, compare
from ryzen_compile.numerics.criteria import Precision, default_criteria
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import Gpu

LINEAR = """
<ir_version: 10, opset_import: ["" : 21]>
linear (float[batch, 4] x) => (float[batch, 3] y)
<float[4, 3] w = {1.0, 0.0, 2.0, 0.0, 1.0, 0.0, 3.0, 0.0, 1.0, 0.5, 0.25, 0.125}> {
  [product] y = MatMul (x, w)
}
"""

SPECIMEN = """
<ir_version: 10, opset_import: ["" : 21]>
overflow (float[batch, 4] x) => (float[batch, 4] y) <float thousand = {1000.0}> {
  [square] q = Mul (x, x)
  [shrink] y = Div (q, thousand)
}
"""

MODULE = """
import torch

class Linear(torch.nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        w = torch.tensor([[1, 0, 2], [0, 1, 0], [3, 0, 1], [0.5, 0.25, 0.125]])
        self.w = torch.nn.Parameter(w * scale)

    def forward(self, features):
        return features @ self.w

def bare():
    return Linear()

def with_inputs():
    return Linear(), (torch.ones(2, 4),)

def wrong():
    return Linear(1.5), (torch.ones(2, 4),)

def half():
    return Linear().half(), (torch.ones(2, 4).half(),)

def bare_half():
    return Linear().half()

class Difference(torch.nn.Module):
    def forward(self, b, a):
        return a - b

def by_name():
    return Difference(), {"b": torch.ones(2, 4), "a": torch.full((2, 4), 3.0)}

def two():
    class Two(Linear):
        def forward(self, features):
            return super().forward(features), features
    return Two()
"""

UP_TO_THREE = Profile(min={"x": (1, 4)}, opt={"x": (2, 4)}, max={"x": (3, 4)})


def write(path: Path, text: str = LINEAR, element: ir.DataType = ir.DataType.FLOAT) -> Path:
    """Write the model of `text`, all in one element type."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values(), *(made for node in graph for made in node.outputs)):
        value.type = ir.TensorType(element)
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(element.numpy()), name=value.name)
    ir.save(model, path)
    return path


@pytest.fixture
def module(tmp_path: Path) -> Path:
    file = tmp_path / "module.py"
    file.write_text(MODULE)
    return file


def run(one: object, other: object, **options: Any) -> Comparison:
    options.setdefault("profiles", [UP_TO_THREE])
    return compare(find_candidate(str(one)), find_candidate(str(other)), criteria=default_criteria(), **options)


def test_an_onnx_file_and_a_pytorch_function_meet_in_either_direction(tmp_path: Path, module: Path) -> None:
    graph = write(tmp_path / "linear.onnx")
    for function in ("bare", "with_inputs"):
        for found in (run(graph, f"{module}:{function}"), run(f"{module}:{function}", graph)):
            assert found.met
            assert found.accuracy.cases == 5
    assert not run(graph, f"{module}:wrong").met


def test_what_is_executed_is_told(tmp_path: Path, module: Path) -> None:
    found = run(write(tmp_path / "linear.onnx"), f"{module}:bare").accuracy
    assert found.candidate.startswith("linear.onnx, by ONNX Runtime 1.")
    assert found.baseline.startswith(f"{module}:bare, by PyTorch 2.")
    assert found.machine != ""


def test_two_pytorch_functions_are_compared_on_the_inputs_that_they_bring(module: Path) -> None:
    assert run(f"{module}:with_inputs", f"{module}:with_inputs", profiles=()).met
    assert not run(f"{module}:wrong", f"{module}:with_inputs", profiles=()).met
    found = run(f"{module}:half", f"{module}:with_inputs", profiles=())
    assert (found.met, found.precision) == (True, "fp16")
    with pytest.raises(UsageError, match="neither .* says what its inputs are"):
        run(f"{module}:bare", f"{module}:bare")


def test_inputs_go_by_name_where_the_names_are_the_same(tmp_path: Path, module: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    difference (float[batch, 4] a, float[batch, 4] b) => (float[batch, 4] y) { y = Sub (a, b) }
    """
    path = tmp_path / "difference.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    profile = Profile(min={"a": (2, 4), "b": (2, 4)}, opt={"a": (2, 4), "b": (2, 4)}, max={"a": (2, 4), "b": (2, 4)})
    seen = run(path, f"{module}:by_name", profiles=[profile])
    assert seen.met
    assert seen.accuracy.metrics[0].required == "<= 0.0001"
    baseline = find_candidate(f"{module}:by_name")
    _, named, _ = match_interfaces(find_candidate(str(path)), baseline)
    assert named.samples is not None
    assert {name: array.mean() for name, array in named.samples(0)[0].items()} == {"a": 3.0, "b": 1.0}


def test_a_half_module_gets_half_inputs(tmp_path: Path, module: Path) -> None:
    found = run(f"{module}:bare_half", write(tmp_path / "linear.onnx"))
    assert (found.met, found.precision) == (True, "fp16")


def test_a_module_with_another_number_of_outputs_is_refused(tmp_path: Path, module: Path) -> None:
    with pytest.raises(ShapeError, match="returns 2 tensors, its interface names 1: y"):
        run(write(tmp_path / "linear.onnx"), f"{module}:two")


@pytest.mark.parametrize(("element", "precision"), [(ir.DataType.FLOAT16, "fp16"), (ir.DataType.BFLOAT16, "bf16")])
def test_a_graph_in_half_precision_is_rounded_after_every_op(
    tmp_path: Path, element: ir.DataType, precision: Precision
) -> None:
    half, full = write(tmp_path / "half.onnx", element=element), write(tmp_path / "full.onnx")
    found = run(half, full)
    assert found.met
    assert found.precision == precision
    assert f"half.onnx, {precision}, rounded after every op, by ONNX Runtime" in found.accuracy.candidate
    worst = {metric.name: metric.worst for metric in found.accuracy.metrics}["max_abs"]
    assert worst > 1e-5


def test_the_overflow_that_onnx_runtime_hides_is_red(tmp_path: Path) -> None:
    half, full = write(tmp_path / "half.onnx", SPECIMEN, ir.DataType.FLOAT16), write(tmp_path / "full.onnx", SPECIMEN)
    feed = {"x": np.full((1, 4), 300.0, np.float32)}
    with registry.find_backend("onnxruntime").open(str(half)) as session:
        hidden = session.run({"x": feed["x"].astype(np.float16)})["y"]
    np.testing.assert_array_equal(hidden, np.full((1, 4), 90, np.float16))
    found = run(half, full, inputs=[feed])
    assert not found.met
    assert "`y` holds 4 x infinity, unlike the baseline" in found.accuracy.faults[0]
    assert run(half, full, inputs=[{"x": np.full((1, 4), 200.0, np.float32)}]).met


def test_a_graph_that_turns_to_half_inside_counts_as_half(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    inner (float[batch, 4] x) => (float[batch, 4] y) { h = Cast <to = 10> (x)  s = Mul (h, h)  y = Cast <to = 1> (s) }
    """
    path = tmp_path / "inner.onnx"
    ir.save(ir.from_proto(onnx.parser.parse_model(text)), path)
    assert onnx_candidate(path).precision == "fp16"


def test_sequences_are_compared_element_by_element(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    cut (float[4] x) => (seq(float[2]) y) <int64 two = {2}> { y = SplitToSequence <axis = 0> (x, two) }
    """
    path = tmp_path / "cut.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    found = run(path, path, profiles=[Profile(min={"x": (4,)}, opt={"x": (4,)}, max={"x": (4,)})])
    assert {metric.output for metric in found.accuracy.metrics} == {"y[0]", "y[1]"}
    assert found.met


def test_what_is_no_subject_is_refused_with_the_spellings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file `nothing`") as caught:
        find_candidates("nothing")
    assert caught.value.hint is not None
    assert "recipe:NAME" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        find_candidates("minilm")
    assert caught.value.hint == "the recipe of that name is spelt recipe:minilm"
    with pytest.raises(PackageError, match=r"there is no .*missing\.ryzen"):
        find_candidates(str(tmp_path / "missing.ryzen"))


INTERFACE = Interface(
    inputs=(InputSpec(name="x", dtype="float32", dims=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", dims=("batch", 3)),),
    batch="batch",
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of one graph in fp32 and fp16, and one engine of the latter."""
    path = tmp_path / "my model.ryzen"
    with Staging(path) as staging:
        sketch = sample_package.manifest()
        variants = []
        for name, element in (("fp32", ir.DataType.FLOAT), ("fp16", ir.DataType.FLOAT16)):
            write(staging.path(layout.graph_path("model", name)), element=element)
            variants.append(
                VariantRecord(
                    name=name,
                    path=layout.graph_path("model", name),
                    backend="onnxruntime" if name == "fp32" else "tensorrt-rtx",
                    precision=name,  # type: ignore[arg-type]
                    portable=name == "fp32",
                    weights=(),
                    passes=(),
                )
            )
        staging.path(sample_package.ENGINE_PATH).write_bytes(b"engine")
        engine = msgspec.structs.replace(sketch.engines[0], variant="fp16", profiles=(UP_TO_THREE,))
        graph = msgspec.structs.replace(
            sketch.graphs[0], interface=INTERFACE, profiles=(UP_TO_THREE,), variants=tuple(variants)
        )
        staging.commit(msgspec.structs.replace(sketch, graphs=(graph,), engines=(engine,)))
    return path


def test_a_package_stands_for_all_that_can_be_executed_and_names_the_rest(package: Path, module: Path) -> None:
    found = find_candidates(str(package))
    assert [one.name for one in found] == [f"{package}@fp32", f"{package}@fp16"]
    assert found[0].not_executed == ()
    (waiting,) = found[1].not_executed
    assert waiting.startswith("engines/model.tensorrt-rtx-sm86-sm89.plan: built for sm86, sm89, and no GPU driver is here")
    results = [compare(one, find_candidate(f"{module}:bare"), criteria=default_criteria()) for one in found]
    assert [one.met for one in results] == [True, True]
    assert [one.precision for one in results] == ["fp32", "fp16"]
    assert results[1].not_executed == (waiting,)
    assert results[1].accuracy.candidate.startswith("my model.ryzen: graphs/model.fp16.onnx, fp16, rounded after every op")
    assert results[0].cases[-1] == "max 3x4, mixed rows"


def test_one_thing_of_a_package_can_be_named(package: Path) -> None:
    assert find_candidate(f"{package}@fp16").precision == "fp16"
    assert find_candidate(f"{package}#model@fp32").precision == "fp32"
    assert find_candidate(str(package)).name == f"{package}@fp32"
    with pytest.raises(UsageError, match="holds no graph `decode`"):
        find_candidates(f"{package}#decode")
    with pytest.raises(UsageError, match="holds no variant or engine `fp17`") as caught:
        find_candidates(f"{package}@fp17")
    assert caught.value.hint == "did you mean `fp16`?"


@pytest.mark.parametrize(
    "which",
    ["tensorrt-rtx", sample_package.ENGINE_PATH, Path(sample_package.ENGINE_PATH).name, Path(sample_package.ENGINE_PATH).stem],
)
def test_an_engine_that_cannot_run_here_is_no_subject(package: Path, which: str) -> None:
    with pytest.raises(UsageError, match="cannot be executed here: engines/.*no GPU driver is here"):
        find_candidates(f"{package}@{which}")


def test_an_engine_that_fits_a_gpu_is_a_subject_of_its_own(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(name="NVIDIA A10", sm=86, memory_bytes=24 << 30, driver="580")
    monkeypatch.setattr("ryzen_compile.numerics.package_candidates.detect_gpus", lambda: (gpu,))
    monkeypatch.setattr("ryzen_compile.numerics.package_candidates.incompatibility", lambda engine, gpus: None)
    found = find_candidates(str(package))
    assert [one.name for one in found][2:] == [f"{package}@model.tensorrt-rtx-sm86-sm89"]
    assert (found[2].machine, found[2].precision, found[2].profiles) == ("NVIDIA A10", "fp16", (UP_TO_THREE,))
    assert found[2].description == "my model.ryzen: engines/model.tensorrt-rtx-sm86-sm89.plan, by tensorrt-rtx 1.7"


def test_bytes_that_are_not_the_shipped_ones_are_never_run(package: Path, module: Path) -> None:
    graph = package / layout.graph_path("model", "fp32")
    data = bytearray(graph.read_bytes())
    data[-20] ^= 1
    graph.write_bytes(data)
    subject = find_candidate(f"{package}@fp32")
    with pytest.raises(PackageError, match="is damaged"):
        compare(subject, find_candidate(f"{module}:bare"), criteria=default_criteria())


def test_signs_in_a_path_that_exists_belong_to_the_path(tmp_path: Path, package: Path) -> None:
    folder = tmp_path / "me@work#1"
    folder.mkdir()
    package.rename(folder / "m.ryzen")
    assert split_package_reference(f"{folder}/m.ryzen#model@fp16") == (folder / "m.ryzen", "model", "fp16")
    assert split_package_reference(f"{folder}/m.ryzen@fp16") == (folder / "m.ryzen", None, "fp16")
    assert split_package_reference("missing.ryzen#decode@fp16") == (Path("missing.ryzen"), "decode", "fp16")
    assert find_candidate(f"{folder}/m.ryzen#model@fp16").precision == "fp16"
    assert find_candidate(str(write(tmp_path / "a#b@c.onnx"))).name.endswith("a#b@c.onnx")
