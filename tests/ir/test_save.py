"""Tests of saving: files are equal for every reader, atomic, and written without holding the weights in memory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from support import onnx_samples

from ryzen_compile.errors import ModelError, RyzenError
from ryzen_compile.ir import save as save_module
from ryzen_compile.ir.fingerprint import fingerprint
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import StoredGraph, save, save_to_store

Weights = Literal["inline", "external", "auto"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return onnx_samples.write(onnx_samples.linear(), tmp_path / "source" / "linear.onnx")


def _run_onnxruntime(path: Path) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    output: np.ndarray[Any, Any] = session.run(None, {"x": np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)})[0]
    return output


def _tensorrt_reads(path: Path) -> bool:
    import tensorrt_rtx_bindings as trt

    class Log(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: object, message: str) -> None:
            pass

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    return bool(trt.OnnxParser(network, log).parse_from_file(os.fspath(path)))


@pytest.mark.parametrize("weights", ["inline", "external", "auto"])
@pytest.mark.parametrize("name", ["m.onnx", "with space/Mödell 模型.onnx"])
def test_saved_model_is_read_by_all_runtimes(tmp_path: Path, source: Path, weights: Weights, name: str) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    model = load(source)
    save(model, path, weights=weights)
    onnx.checker.check_model(os.fspath(path), full_check=True)
    np.testing.assert_array_equal(_run_onnxruntime(path), _run_onnxruntime(source))
    assert _tensorrt_reads(path)
    assert fingerprint(load(path)) == fingerprint(model)
    data = [path.name + ".data"] if weights == "external" else []
    assert sorted(os.listdir(path.parent)) == [path.name, *data]


@pytest.mark.parametrize(
    "text",
    [onnx_samples.BRANCHES, onnx_samples.IR_VERSION_3, onnx_samples.STRINGS_AND_SEQUENCES],
    ids=["branches", "ir-version-3", "strings"],
)
@pytest.mark.parametrize("weights", ["inline", "external"])
def test_subgraphs_functions_and_strings_survive_saving(tmp_path: Path, text: str, weights: Weights) -> None:
    path = onnx_samples.write(onnx_samples.model(text), tmp_path / "m.onnx")
    expected = fingerprint(load(path))
    save(load(path), tmp_path / "n.onnx", weights=weights)
    assert fingerprint(load(tmp_path / "n.onnx")) == expected
    onnx.checker.check_model(os.fspath(tmp_path / "n.onnx"))


def test_large_constants_of_nodes_are_written_inline(tmp_path: Path) -> None:
    value = np.arange(16384, dtype=np.float32)
    proto = onnx_samples.model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[16384] x) => (float[16384] y) { y = Add (x, c) }'
    )
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(value)))
    model = load(onnx_samples.write(proto, tmp_path / "m.onnx"))
    for weights in ("inline", "external"):
        save(model, tmp_path / "n.onnx", weights=weights)
        (constant, _) = onnx.load(tmp_path / "n.onnx", load_external_data=False).graph.node
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(constant.attribute[0].t), value)


def test_linked_weights_are_those_of_the_source_file(tmp_path: Path, source: Path) -> None:
    external = tmp_path / "source" / "external.onnx"
    save(load(source), external, weights="external")
    for origin in (source, external):
        path = tmp_path / origin.stem / "linked.onnx"
        path.parent.mkdir()
        save(load(origin), path, weights="linked")
        np.testing.assert_array_equal(_run_onnxruntime(path), _run_onnxruntime(source))
        inodes = {file.stat().st_ino for file in path.parent.iterdir()}
        assert origin.with_name(f"{origin.name}.data" if origin == external else origin.name).stat().st_ino in inodes
        assert sum(file.stat().st_size for file in path.parent.glob("*.onnx.data")) == 0


def test_weights_are_copied_if_their_file_cannot_be_linked(tmp_path: Path, source: Path) -> None:
    model = load(source)
    path = tmp_path / "out" / "m.onnx"
    path.parent.mkdir()
    path.with_name("m.onnx.0.data").mkdir()  # the name of the link is taken
    save(model, path, weights="linked")
    np.testing.assert_array_equal(_run_onnxruntime(path), _run_onnxruntime(source))
    assert path.with_name("m.onnx.data").stat().st_size > 0


def test_weights_of_a_changed_file_are_not_linked(tmp_path: Path, source: Path) -> None:
    model = load(source)
    os.utime(source, ns=(1, 1))
    path = tmp_path / "m.onnx"
    with pytest.raises(ModelError, match="changed since the model was loaded"):
        save(model, path, weights="linked")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_saving_does_not_change_the_model(tmp_path: Path, source: Path) -> None:
    model = load(source)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    save(model, tmp_path / "m.onnx", weights="external")
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before


def test_model_can_overwrite_its_own_file(source: Path) -> None:
    model = load(source)
    expected = fingerprint(model)
    save(model, source)
    assert fingerprint(load(source)) == expected
    save(load(source), source, weights="external")
    save(load(source), source, weights="external")
    assert fingerprint(load(source)) == expected


def test_lazy_tensors_are_computed_once_per_file(tmp_path: Path, source: Path) -> None:
    model = load(source)
    expected = np.asfortranarray(np.random.default_rng(1).random((64, 32), np.float32))
    calls: list[int] = []

    def compute() -> ir.TensorProtocol:
        calls.append(1)
        return ir.Tensor(expected)

    model.graph.initializers["w"].const_value = ir.LazyTensor(compute, ir.DataType.FLOAT, ir.Shape([64, 32]))
    save(model, tmp_path / "inline.onnx", weights="inline")
    stored = save_to_store(model, tmp_path / "m.onnx", tmp_path / "weights", threshold_bytes=1024)
    assert len(calls) == 2
    assert [weight.sha256 for weight in stored.weights] == [hashlib.sha256(expected.tobytes()).hexdigest()]
    for name in ("inline.onnx", "m.onnx"):
        tensor = load(tmp_path / name).graph.initializers["w"].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), expected)


@pytest.mark.parametrize("element", ["INT4", "BFLOAT16"])
def test_packed_tensors_are_written_packed(tmp_path: Path, source: Path, element: str) -> None:
    dtype = ir.DataType[element]
    model = load(source)
    values = ir.Tensor(np.arange(4096).astype(dtype.numpy()), dtype=dtype)
    model.graph.register_initializer(
        ir.Value(name="extra", const_value=values, type=ir.TensorType(dtype), shape=ir.Shape([4096]))
    )
    save(model, tmp_path / "m.onnx")
    tensor = load(tmp_path / "m.onnx").graph.initializers["extra"].const_value
    assert tensor is not None
    assert tensor.tobytes() == values.tobytes()


def test_bytes_are_copied_in_user_space_if_the_kernel_cannot(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    save(load(source), tmp_path / "m.onnx", weights="external")
    assert fingerprint(load(tmp_path / "m.onnx")) == fingerprint(load(source))


@pytest.mark.parametrize("count", [2047, 2049])
def test_lazy_tensor_of_another_size_than_declared_is_refused(tmp_path: Path, source: Path, count: int) -> None:
    model = load(source)
    computed = ir.Tensor(np.zeros(count, np.float32))
    model.graph.initializers["w"].const_value = ir.LazyTensor(lambda: computed, ir.DataType.FLOAT, ir.Shape([64, 32]), name="w")
    for weights in ("inline", "external"):
        with pytest.raises(ModelError, match=rf"tensor `w` of type FLOAT\[64, 32\] must have 8192 bytes \(got {count * 4}\)"):
            save(model, tmp_path / "m.onnx", weights=weights)
    with pytest.raises(ModelError, match="8192 bytes"):
        save_to_store(model, tmp_path / "m.onnx", tmp_path / "weights", threshold_bytes=1024)
    assert os.listdir(tmp_path / "weights") == []


def test_auto_is_external_above_the_inline_limit(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "MAX_INLINE_BYTES", 8191)
    save(load(source), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size == 8192


def test_weights_in_a_data_file_are_aligned(tmp_path: Path) -> None:
    proto = onnx_samples.linear()
    proto.graph.initializer.insert(0, onnx.numpy_helper.from_array(np.zeros(1025, np.int8), "odd"))
    save(load(onnx_samples.write(proto, tmp_path / "m.onnx")), tmp_path / "n.onnx", weights="external")
    written = onnx.load(tmp_path / "n.onnx", load_external_data=False).graph.initializer
    offsets = [int(entry.value) for tensor in written for entry in tensor.external_data if entry.key == "offset"]
    assert sorted(offsets) == [0, 1088]


def test_inline_weights_above_the_protobuf_limit_are_refused(tmp_path: Path) -> None:
    def compute() -> ir.TensorProtocol:
        raise AssertionError("the weight was read before the model was refused")

    model = load(onnx_samples.write(onnx_samples.linear(), tmp_path / "m.onnx"))
    model.graph.initializers["w"].const_value = ir.LazyTensor(compute, ir.DataType.FLOAT, ir.Shape([2**29 + 1]))
    with pytest.raises(ModelError, match=r"needs 2\.1 GB in one file"):
        save(model, tmp_path / "n.onnx", weights="inline", check=False)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx"]


def test_failed_save_leaves_existing_files_unchanged(tmp_path: Path, source: Path) -> None:
    model = load(source)
    out = tmp_path / "out"
    out.mkdir()
    save(model, out / "m.onnx", weights="external")
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}

    def fail() -> ir.TensorProtocol:
        raise OSError(28, "No space left on device")

    model.graph.initializers["w"].const_value = ir.LazyTensor(fail, ir.DataType.FLOAT, ir.Shape([64, 32]))
    for weights in ("inline", "external"):
        with pytest.raises(RyzenError, match="No space left on device") as caught:
            save(model, out / "m.onnx", weights=weights)
        assert caught.value.hint == "free some disk space"
    with pytest.raises(RyzenError):
        save_to_store(model, out / "m.onnx", out, threshold_bytes=1024)
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_process_that_dies_between_two_renames_leaves_no_mixture(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    save(load(source), path, weights="external")
    replace = os.replace

    def die_before_the_graph(source_path: Path, target_path: Path) -> None:
        if target_path == path:
            raise KeyboardInterrupt
        replace(source_path, target_path)

    monkeypatch.setattr(os, "replace", die_before_the_graph)
    with pytest.raises(KeyboardInterrupt):
        save(load(source), path, weights="external")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx.data", "source"]


def test_missing_folder_is_an_error(tmp_path: Path, source: Path) -> None:
    with pytest.raises(RyzenError, match="cannot write .*No such file"):
        save(load(source), tmp_path / "missing" / "m.onnx")


def test_unserializable_model_is_refused(tmp_path: Path, source: Path) -> None:
    model = load(source)
    model.graph.node(0).attributes["odd"] = ir.Attr("odd", ir.AttributeType.UNDEFINED, None)
    with pytest.raises(ModelError, match="cannot be serialized"):
        save(model, tmp_path / "m.onnx")


def _save_to_store(folder: Path, graph: str, model: ir.Model) -> StoredGraph:
    return save_to_store(model, folder / graph, folder / "weights", threshold_bytes=128)


@pytest.mark.parametrize("name", ["p.onnx", "Mödell 模型 x.onnx"])
def test_graph_with_a_weight_store_is_read_by_all_runtimes(tmp_path: Path, source: Path, name: str) -> None:
    folder = tmp_path / "päckage x"
    folder.mkdir()
    stored = _save_to_store(folder, name, load(source))
    assert stored.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert stored.size_bytes == (folder / name).stat().st_size
    for weight, value in zip(stored.weights, sorted(onnx_samples.linear_weights().values(), key=_digest), strict=True):
        assert weight.path == f"weights/{weight.sha256}"
        assert (weight.sha256, weight.size_bytes) == (_digest(value), value.nbytes)
        assert (folder / weight.path).read_bytes() == value.tobytes()
    assert sorted(os.listdir(folder)) == sorted([name, "weights"])
    assert len(os.listdir(folder / "weights")) == 2
    onnx.checker.check_model(os.fspath(folder / name), full_check=True)
    np.testing.assert_array_equal(_run_onnxruntime(folder / name), _run_onnxruntime(source))
    assert _tensorrt_reads(folder / name)
    assert fingerprint(load(folder / name)) == fingerprint(load(source))


def _digest(value: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(value.tobytes()).hexdigest()


def test_two_graphs_share_equal_weights_in_a_store(tmp_path: Path, source: Path) -> None:
    first = _save_to_store(tmp_path, "a.onnx", load(source))
    written = {weight.path: (tmp_path / weight.path).stat().st_mtime_ns for weight in first.weights}
    model = load(source)
    model.graph.initializers["b"].const_value = ir.Tensor(np.zeros(32, np.float32))
    second = _save_to_store(tmp_path, "b.onnx", model)
    assert len({weight.path for weight in (*first.weights, *second.weights)}) == 3
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in written} == written


def test_equal_weights_of_one_graph_are_stored_once(tmp_path: Path) -> None:
    proto = onnx_samples.linear()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(onnx_samples.linear_weights()["w"], "same"))
    stored = _save_to_store(tmp_path, "a.onnx", load(onnx_samples.write(proto, tmp_path / "m.onnx")))
    assert len(stored.weights) == 2


def test_weights_below_the_threshold_stay_in_the_graph(tmp_path: Path, source: Path) -> None:
    stored = save_to_store(load(source), tmp_path / "m.onnx", tmp_path / "weights", threshold_bytes=129)
    assert [weight.size_bytes for weight in stored.weights] == [8192]


def test_store_in_a_nested_folder_is_referred_to_by_its_relative_path(tmp_path: Path, source: Path) -> None:
    stored = save_to_store(load(source), tmp_path / "m.onnx", tmp_path / "deep" / "store", threshold_bytes=1024)
    assert stored.weights[0].path.startswith("deep/store/")
    assert fingerprint(load(tmp_path / "m.onnx")) == fingerprint(load(source))


def test_store_outside_the_folder_of_the_graph_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ValueError, match="outside the graph's folder"):
        save_to_store(load(source), tmp_path / "a" / "m.onnx", tmp_path / "weights", threshold_bytes=0)


_MEASURE = """
import sys
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save, save_to_store
from ryzen_compile.ir.fingerprint import fingerprint
from pathlib import Path
def peak():
    return int(next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1]) // 1024
model = load(sys.argv[1])
before = peak()
path = Path(sys.argv[1])
save(model, path.with_name("inline.onnx"), weights="inline")
save(model, path.with_name("external.onnx"), weights="external")
save_to_store(model, path.with_name("stored.onnx"), path.with_name("weights"), threshold_bytes=1024)
fingerprint(model)
print(before, peak())
"""


def test_saving_needs_no_memory_for_weights(tmp_path: Path) -> None:
    """Save 120 MB of weights in two tensors in all formats, and compute the fingerprint."""
    proto = onnx_samples.model('<ir_version: 10, opset_import: ["" : 21]> g (float[1] x) => (float[1] y) { y = Sum (x, v, w) }')
    for name in "vw":
        tensor = onnx.TensorProto(name=name, data_type=1, dims=[15_000_000], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=name)
        proto.graph.initializer.append(tensor)
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 60_000_000)
    path = onnx_samples.write(proto, tmp_path / "m.onnx")
    completed = subprocess.run([sys.executable, "-c", _MEASURE, path], capture_output=True, text=True, check=True)
    before, after = map(int, completed.stdout.split())
    assert after - before < 40
