"""Candidates by reference, and what is executed for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import onnx_samples, sample_package

from ryzen_compile import registry
from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import VariantRecord
from ryzen_compile.artifacts.package.reference import PackageReference, parse_package_reference
from ryzen_compile.artifacts.package.write import Staging
from ryzen_compile.backends.cuda_device import CudaDevice
from ryzen_compile.errors import PackageError, ShapeError, UsageError
from ryzen_compile.numerics.candidate import match_interfaces
from ryzen_compile.numerics.candidate_lookup import find_candidate, find_candidates
from ryzen_compile.numerics.comparison import Comparison, compare
from ryzen_compile.numerics.criteria import default_criteria
from ryzen_compile.numerics.grid import CaseSource
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.spec.dtypes import Precision
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


def write_model(path: Path, text: str = LINEAR, dtype: ir.DataType = ir.DataType.FLOAT) -> Path:
    """Write the model `text` with every tensor in one element type."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values(), *(output for node in graph for output in node.outputs)):
        value.type = ir.TensorType(dtype)
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), name=value.name)
    ir.save(model, path)
    return path


@pytest.fixture
def module(tmp_path: Path) -> Path:
    file = tmp_path / "module.py"
    file.write_text(MODULE)
    return file


def run_comparison(candidate: object, baseline: object, **options: Any) -> Comparison:
    options.setdefault("profiles", [UP_TO_THREE])
    return compare(
        find_candidate(str(candidate)),
        find_candidate(str(baseline)),
        criteria=default_criteria(),
        case_source=CaseSource(**options),
    )


def test_an_onnx_file_and_a_pytorch_function_are_compared_in_either_direction(tmp_path: Path, module: Path) -> None:
    graph = write_model(tmp_path / "linear.onnx")
    for function in ("bare", "with_inputs"):
        for result in (run_comparison(graph, f"{module}:{function}"), run_comparison(f"{module}:{function}", graph)):
            assert result.met
            assert result.accuracy.cases == 5
    assert not run_comparison(graph, f"{module}:wrong").met


def test_the_record_describes_what_is_executed(tmp_path: Path, module: Path) -> None:
    result = run_comparison(write_model(tmp_path / "linear.onnx"), f"{module}:bare").accuracy
    assert result.candidate.startswith("linear.onnx, by ONNX Runtime 1.")
    assert result.baseline.startswith("module.py:bare, by PyTorch 2.")
    assert result.machine != ""


@pytest.mark.parametrize("function", ["bare", "half"])
def test_the_record_contains_no_folder_of_this_machine(tmp_path: Path, module: Path, function: str) -> None:
    text = LINEAR.replace("float[batch, 4] x) => (float[batch, 3] y)", "float[2, 4] x) => (float[2, 3] y)")
    static = write_model(tmp_path / "static.onnx", text)
    two_rows = Profile(min={"x": (2, 4)}, opt={"x": (2, 4)}, max={"x": (2, 4)})
    dynamic = write_model(tmp_path / "dynamic.onnx")
    records = [
        msgspec.json.encode(run_comparison(candidate, baseline, profiles=[two_rows]).accuracy).decode()
        for candidate, baseline in ((dynamic, static), (dynamic, f"{module}:{function}"), (f"{module}:{function}", dynamic))
    ]
    assert "does not take a batch of 1" in records[0]
    assert not any(str(tmp_path) in record for record in records)


def test_two_pytorch_functions_are_compared_on_their_own_inputs(module: Path) -> None:
    assert run_comparison(f"{module}:with_inputs", f"{module}:with_inputs", profiles=()).met
    assert not run_comparison(f"{module}:wrong", f"{module}:with_inputs", profiles=()).met
    result = run_comparison(f"{module}:half", f"{module}:with_inputs", profiles=())
    assert (result.met, result.precision) == (True, "fp16")
    with pytest.raises(UsageError, match="neither .* declares its inputs"):
        run_comparison(f"{module}:bare", f"{module}:bare")


def test_inputs_are_passed_by_name_if_the_names_are_the_same(tmp_path: Path, module: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    difference (float[batch, 4] a, float[batch, 4] b) => (float[batch, 4] y) { y = Sub (a, b) }
    """
    path = tmp_path / "difference.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    profile = Profile(min={"a": (2, 4), "b": (2, 4)}, opt={"a": (2, 4), "b": (2, 4)}, max={"a": (2, 4), "b": (2, 4)})
    result = run_comparison(path, f"{module}:by_name", profiles=[profile])
    assert result.met
    assert result.accuracy.metrics[0].required == "<= 0.0001"
    baseline = find_candidate(f"{module}:by_name")
    _, named, _ = match_interfaces(find_candidate(str(path)), baseline)
    assert named.samples is not None
    assert {name: array.mean() for name, array in named.samples(0)[0].items()} == {"a": 3.0, "b": 1.0}


def test_a_half_module_receives_half_inputs(tmp_path: Path, module: Path) -> None:
    result = run_comparison(f"{module}:bare_half", write_model(tmp_path / "linear.onnx"))
    assert (result.met, result.precision) == (True, "fp16")


def test_a_module_with_a_different_number_of_outputs_is_rejected(tmp_path: Path, module: Path) -> None:
    with pytest.raises(ShapeError, match="returns 2 tensors, its interface names 1: y"):
        run_comparison(write_model(tmp_path / "linear.onnx"), f"{module}:two")


@pytest.mark.parametrize(("dtype", "precision"), [(ir.DataType.FLOAT16, "fp16"), (ir.DataType.BFLOAT16, "bf16")])
def test_a_graph_in_half_precision_is_rounded_after_every_op(tmp_path: Path, dtype: ir.DataType, precision: Precision) -> None:
    half, full = write_model(tmp_path / "half.onnx", dtype=dtype), write_model(tmp_path / "full.onnx")
    result = run_comparison(half, full)
    assert result.met
    assert result.precision == precision
    assert f"half.onnx, {precision}, rounded after every op, by ONNX Runtime" in result.accuracy.candidate
    worst = {metric.name: metric.worst for metric in result.accuracy.metrics}["max_abs"]
    assert worst > 1e-5


def test_overflow_that_onnx_runtime_hides_is_a_fault(tmp_path: Path) -> None:
    half, full = (
        write_model(tmp_path / "half.onnx", onnx_samples.OVERFLOW, ir.DataType.FLOAT16),
        write_model(tmp_path / "full.onnx", onnx_samples.OVERFLOW),
    )
    inputs = {"x": np.full(4, 300.0, np.float32)}
    with registry.find_backend("onnxruntime").open(str(half)) as session:
        hidden = session.run({"x": inputs["x"].astype(np.float16)})["y"]
    np.testing.assert_array_equal(hidden, np.full(4, 90, np.float16))
    result = run_comparison(half, full, inputs=[inputs])
    assert not result.met
    assert "`y` has 4 x infinity where the baseline differs" in result.accuracy.faults[0]
    assert run_comparison(half, full, inputs=[{"x": np.full(4, 200.0, np.float32)}]).met


def test_a_graph_with_half_tensors_inside_counts_as_half(tmp_path: Path) -> None:
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
    result = run_comparison(path, path, profiles=[Profile(min={"x": (4,)}, opt={"x": (4,)}, max={"x": (4,)})])
    assert {metric.output for metric in result.accuracy.metrics} == {"y[0]", "y[1]"}
    assert result.met


def test_an_invalid_reference_is_rejected_with_the_valid_forms(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file `nothing`") as caught:
        find_candidates("nothing")
    assert caught.value.hint is not None
    assert "recipe:NAME" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        find_candidates("minilm")
    assert caught.value.hint == "for the recipe of that name write recipe:minilm"
    with pytest.raises(PackageError, match=r"there is no .*missing\.ryzen"):
        find_candidates(str(tmp_path / "missing.ryzen"))


INTERFACE = Interface(
    inputs=(InputSpec(name="x", dtype="float32", dims=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", dims=("batch", 3)),),
    batch="batch",
)


FP32, FP16 = "fold", "fold+precision.to-fp16"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of one graph in fp32 and fp16, and one engine built from the latter."""
    path = tmp_path / "my model.ryzen"
    with Staging(path) as staging:
        manifest = sample_package.manifest()
        variants = []
        dtypes = {FP32: ir.DataType.FLOAT, FP16: ir.DataType.FLOAT16}
        for name, dtype in dtypes.items():
            write_model(staging.path(layout.graph_path("model", name)), dtype=dtype)
            variants.append(
                VariantRecord(
                    name=name,
                    path=layout.graph_path("model", name),
                    backend="onnxruntime" if name == FP32 else "tensorrt-rtx",
                    precision="fp32" if name == FP32 else "fp16",
                    portable=name == FP32,
                    weights=(),
                    passes=(),
                )
            )
        staging.path(sample_package.ENGINE_PATH).write_bytes(b"engine")
        engine = msgspec.structs.replace(manifest.engines[0], variant=FP16, profiles=(UP_TO_THREE,))
        graph = msgspec.structs.replace(
            manifest.graphs[0], interface=INTERFACE, profiles=(UP_TO_THREE,), variants=tuple(variants)
        )
        staging.commit(msgspec.structs.replace(manifest, graphs=(graph,), engines=(engine,)))
    return path


def test_a_package_refers_to_all_that_can_be_executed_and_lists_the_rest(package: Path, module: Path) -> None:
    candidates = find_candidates(str(package))
    assert [candidate.name for candidate in candidates] == [f"{package}@{FP32}", f"{package}@{FP16}"]
    assert candidates[0].not_executed == ()
    (not_executed,) = candidates[1].not_executed
    assert not_executed.startswith(
        f"{sample_package.ENGINE_PATH}: the engine needs sm86 or sm89, and no NVIDIA driver was found"
    )
    results = [compare(candidate, find_candidate(f"{module}:bare"), criteria=default_criteria()) for candidate in candidates]
    assert [result.met for result in results] == [True, True]
    assert [result.precision for result in results] == ["fp32", "fp16"]
    assert results[1].not_executed == (not_executed,)
    assert results[1].accuracy.candidate.startswith(
        "my model.ryzen: graphs/model.fold+precision.to-fp16.onnx, fp16, rounded after every op"
    )
    assert results[0].cases[-1] == "max 3x4, mixed rows"


def test_one_candidate_of_a_package_can_be_selected(package: Path) -> None:
    assert find_candidate(f"{package}@{FP16}").precision == "fp16"
    assert find_candidate(f"{package}#model@{FP32}").precision == "fp32"
    assert find_candidate(str(package)).name == f"{package}@{FP32}"
    with pytest.raises(UsageError, match="contains no graph `decode`"):
        find_candidates(f"{package}#decode")
    with pytest.raises(UsageError, match="contains no variant or engine `fold.precision`") as caught:
        find_candidates(f"{package}@fold.precision")
    assert caught.value.hint == f"did you mean `{FP16}`?"


def test_a_variant_is_selected_by_name_beginning_backend_or_file(package: Path) -> None:
    file = Path(layout.graph_path("model", FP16)).name
    for selector in (FP16, "fold+", f"{FP16}@tensorrt-rtx", file, f"graphs/{file}"):
        assert [candidate.name for candidate in find_candidates(f"{package}@{selector}")] == [f"{package}@{FP16}"]
    assert [candidate.name for candidate in find_candidates(f"{package}@onnxruntime")] == [f"{package}@{FP32}"]
    with pytest.raises(UsageError, match="several variants begin with `f`"):
        find_candidates(f"{package}@f")
    with pytest.raises(UsageError, match="contains no variant or engine"):
        find_candidates(f"{package}@{FP16}@onnxruntime")


@pytest.mark.parametrize(
    "selector",
    ["tensorrt-rtx", sample_package.ENGINE_PATH, Path(sample_package.ENGINE_PATH).name, Path(sample_package.ENGINE_PATH).stem],
)
def test_an_engine_that_cannot_run_here_is_rejected(package: Path, selector: str) -> None:
    with pytest.raises(UsageError, match="cannot be executed here: engines/.*no NVIDIA driver was found"):
        find_candidates(f"{package}@{selector}")


def test_an_engine_that_this_machine_can_run_is_a_candidate(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two GPUs of one compute capability, the record names the one that executes the engine."""
    gpus = tuple(Gpu(name=name, sm=86, memory_bytes=24 << 30, driver="580") for name in ("NVIDIA A40", "NVIDIA A10"))
    monkeypatch.setattr("ryzen_compile.numerics.package_candidates.detect_gpus", lambda: gpus)
    monkeypatch.setattr(
        "ryzen_compile.numerics.package_candidates.current_device", lambda gpus: CudaDevice(name="NVIDIA A10", sm=86)
    )
    monkeypatch.setattr("ryzen_compile.numerics.package_candidates.incompatibility", lambda engine, gpus, device: None)
    candidates = find_candidates(str(package))
    assert [candidate.name for candidate in candidates][2:] == [f"{package}@{Path(sample_package.ENGINE_PATH).stem}"]
    assert (candidates[2].machine, candidates[2].precision, candidates[2].profiles) == ("NVIDIA A10", "fp16", (UP_TO_THREE,))
    assert candidates[2].description == f"my model.ryzen: {sample_package.ENGINE_PATH}, by tensorrt-rtx 1.7"


def test_modified_files_are_never_run(package: Path, module: Path) -> None:
    graph = package / layout.graph_path("model", FP32)
    data = bytearray(graph.read_bytes())
    data[-20] ^= 1
    graph.write_bytes(data)
    candidate = find_candidate(f"{package}@{FP32}")
    with pytest.raises(PackageError, match="is damaged"):
        compare(candidate, find_candidate(f"{module}:bare"), criteria=default_criteria())


def test_separators_in_an_existing_path_belong_to_the_path(tmp_path: Path, package: Path) -> None:
    folder = tmp_path / "me@work#1"
    folder.mkdir()
    package.rename(folder / "m.ryzen")
    for text, path, graph, selector in (
        (f"{folder}/m.ryzen#model@{FP16}", folder / "m.ryzen", "model", FP16),
        (f"{folder}/m.ryzen@{FP16}@tensorrt-rtx", folder / "m.ryzen", None, f"{FP16}@tensorrt-rtx"),
        ("missing.ryzen#decode@fold", Path("missing.ryzen"), "decode", "fold"),
    ):
        assert parse_package_reference(text) == PackageReference(path=path, graph=graph, selector=selector)
    assert find_candidate(f"{folder}/m.ryzen#model@{FP16}").precision == "fp16"
