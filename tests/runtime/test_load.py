"""Loading packages: the choice of the engine, digest checks, input validation and thread safety."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import tiny_models

import ryzen_compile as rc
from ryzen_compile.artifacts.package.read import Package
from ryzen_compile.errors import PackageError, ShapeError, UsageError
from ryzen_compile.runtime.load import Engine


def test_without_a_gpu_the_portable_graph_is_chosen_with_the_reason(package: Package) -> None:
    with rc.load(package.path) as engine:
        assert engine.choice.backend == "onnxruntime"
        reason = "engines/model.fold+attention@tensorrt-rtx.sm89.plan: the engine needs sm89, and no NVIDIA driver was found"
        assert f"as no engine can run here: {reason}" in engine.choice.summary
        assert engine.load_seconds > 0
        assert "graphs/model.fold.onnx" in repr(engine)


def test_a_backend_without_a_usable_engine_is_rejected_with_every_reason(package: Package) -> None:
    with pytest.raises(
        PackageError, match="nothing in this package can run `model` on this machine; .*no NVIDIA driver was found"
    ):
        rc.load(package.path, backend="tensorrt-rtx")
    with pytest.raises(UsageError, match="no backend `tensorflow`"):
        rc.load(package.path, backend="tensorflow")
    with pytest.raises(UsageError, match="no graph `decode`"):
        rc.load(package.path, graph="decode")


def test_inputs_may_be_passed_by_keyword_or_as_a_mapping(package: Package) -> None:
    x = np.ones((2, tiny_models.WIDTH), np.float32)
    with rc.load(package.path) as engine:
        outputs = engine.run(x=x)
        assert list(outputs) == ["y"]
        np.testing.assert_array_equal(outputs["y"], engine({"x": x}))
        np.testing.assert_allclose(outputs["y"], tiny_models.expected(x), rtol=1e-5, atol=1e-5)


def test_torch_inputs_return_torch_outputs_without_a_copy(package: Package) -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(2, tiny_models.WIDTH)
    with rc.load(package.path) as engine:
        recorder = RecordingBackendSession(engine)
        y = engine(x=x)
        assert isinstance(y, torch.Tensor)
        np.testing.assert_allclose(y.numpy(), tiny_models.expected(x.numpy()), rtol=1e-5, atol=1e-5)
        assert y.data_ptr() == recorder.outputs["y"].ctypes.data
        assert recorder.inputs["x"] is x


class RecordingBackendSession:
    """A wrapper of the session of an engine that records the inputs and outputs of the last run."""

    def __init__(self, engine: Engine) -> None:
        (step_graph,) = engine._step_graphs
        self._session = step_graph.session
        engine._step_graphs = (dataclasses.replace(step_graph, session=self),)  # type: ignore[arg-type]
        self.inputs: Any = None
        self.outputs: Any = None

    def run(self, inputs: Any) -> Any:
        self.inputs, self.outputs = inputs, self._session.run(inputs)
        return self.outputs


ELEMENT_TYPES = """
<ir_version: 10, opset_import: ["" : 21]>
kinds (float[N] x) => (bfloat16[N] half, float8e5m2[N] quarter, float sum, bool[N] is_nan) {
  half = Cast <to = 16> (x)  quarter = Cast <to = 19> (x)  is_nan = IsNaN (x)  sum = ReduceSum <keepdims = 0> (x) }
"""


def test_outputs_that_dlpack_does_not_support_become_torch_tensors_over_the_same_memory(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor([1.0, -2.0, 0.5])
    with rc.load(build_package(ELEMENT_TYPES, tmp_path, min_shapes=["x:0"], max_shapes=["x:4"])) as engine:
        recorder = RecordingBackendSession(engine)
        outputs = engine.run(x=x)
        dtypes = {"half": torch.bfloat16, "quarter": torch.float8_e5m2, "sum": torch.float32, "is_nan": torch.bool}
        assert {name: value.dtype for name, value in outputs.items()} == dtypes
        assert {name: value.data_ptr() for name, value in outputs.items()} == {
            name: array.ctypes.data for name, array in recorder.outputs.items()
        }
        assert torch.equal(outputs["half"].float(), x)
        assert torch.equal(outputs["quarter"].float(), x)
        assert outputs["sum"].shape == ()
        empty = engine.run(x=torch.ones(0))["half"]
        assert (empty.dtype, empty.shape) == (torch.bfloat16, (0,))


def test_sequences_become_lists_of_torch_tensors_and_strings_are_unchanged(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    graph = """
    <ir_version: 10, opset_import: ["" : 21]>
    many (float[N] x, string[M] words) => (seq(float[N]) items, string[M] same) {
      twice = Add (x, x)  items = SequenceConstruct (x, twice)  same = Identity (words) }
    """
    x = torch.tensor([1.0, 2.0])
    with rc.load(build_package(graph, tmp_path)) as engine:
        recorder = RecordingBackendSession(engine)
        outputs = engine.run(x=x, words=["a", "b"])
        assert all(isinstance(item, torch.Tensor) for item in outputs["items"])
        assert [item.tolist() for item in outputs["items"]] == [[1, 2], [2, 4]]
        assert [item.data_ptr() for item in outputs["items"]] == [array.ctypes.data for array in recorder.outputs["items"]]
        assert outputs["same"].tolist() == ["a", "b"]


def test_a_missing_optional_output_is_none(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    with rc.load(package.path) as engine:
        monkeypatch.setattr(engine._step_graphs[0].session, "run", lambda inputs: {"y": None})
        assert engine(x=torch.ones(2, tiny_models.WIDTH)) is None


def build_package(graph: str, folder: Path, **options: Any) -> str:
    """Build a model in ONNX text syntax and return the path of its package."""
    onnx.save(onnx.parser.parse_model(graph), folder / "model.onnx")
    return rc.build(folder / "model.onnx", gpu="cpu", compare=False, cache=False, **options).path


def test_lists_are_checked_against_the_profiles_like_arrays(tmp_path: Path) -> None:
    graph = """
    <ir_version: 10, opset_import: ["" : 21]>
    two (float[N] x, float[M] z, seq(float[K]) items) => (float[P] y) {
      h = ConcatFromSequence <axis = 0> (items)  y = Concat <axis = 0> (x, z, h) }
    """
    ranges = {"min_shapes": ["x:1,z:1"], "max_shapes": ["x:4,z:4"]}
    short, long, items = np.ones(2, np.float32), np.ones(9, np.float32), [np.ones(3, np.float32)]
    with rc.load(build_package(graph, tmp_path, **ranges)) as engine:
        engine._step_graphs = (dataclasses.replace(engine._step_graphs[0], bounded=True),)  # as an engine is
        assert engine(x=[1.0, 1.0], z=short, items=items).shape == (7,)
        for x, z, name in ((short.tolist(), long, "z"), (long.tolist(), short, "x"), (long.tolist(), short.tolist(), "x")):
            with pytest.raises(ShapeError, match=f"`{name}` is 9: axis 0 takes 1..4, got 9"):
                engine(x=x, z=z, items=items)
        with pytest.raises(ShapeError, match="`x` is 9: axis 0 takes 1..4, got 9"):
            engine(x=long, z=[[1.0], [1.0, 2.0]], items=items)
        with pytest.raises(ShapeError, match="missing inputs: z"):
            engine(x=short.tolist(), items=items)
        with pytest.raises(ShapeError, match="`x` cannot be read as float32"):
            engine(x=[[1.0], [1.0, 2.0]], z=short, items=items)


def test_a_portable_variant_takes_shapes_outside_the_profiles(package: Package) -> None:
    rows = np.random.default_rng(0).random((9, tiny_models.WIDTH), np.float32)
    with rc.load(package.path) as engine:
        assert engine.profiles[0].max["x"][0] == 8
        np.testing.assert_allclose(engine(x=rows)[:4], engine(x=rows[:4]), rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.ones((1, 15), np.float32)}, r"axis 1 of the input x: float32\[batch, 16\] is 16, got 15"),
        ({"x": np.ones((1, 16), np.float64)}, "`x` is float64, expected float32"),
        ({"x": np.ones((16,), np.float32)}, r"the input x: float32\[batch, 16\] has 2 dimensions, got 16"),
        ({}, "missing inputs: x"),
        ({"x": np.ones((1, 16), np.float32), "z": np.ones(1)}, "no input `z`"),
    ],
)
def test_invalid_inputs_are_rejected_by_name(package: Package, inputs: dict[str, np.ndarray], message: str) -> None:
    with rc.load(package.path) as engine, pytest.raises(ShapeError, match=message):
        engine.run(inputs)


def test_inputs_that_share_a_dim_must_have_the_same_size(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    scaled (float[batch, 4] x, float[batch, 1] scale) => (float[batch, 4] y) { y = Mul (x, scale) }
    """
    path = tmp_path / "scaled.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    with rc.load(rc.build(path, gpu="cpu", compare=False, cache=False).path) as engine:
        with pytest.raises(ShapeError, match="`batch` is 3 in `x` and 1 in `scale`"):
            engine(x=np.ones((3, 4), np.float32), scale=np.ones((1, 1), np.float32))
        assert engine(x=np.ones((3, 4), np.float32), scale=np.ones((3, 1), np.float32)).shape == (3, 4)


def test_a_closed_engine_is_an_error(package: Package) -> None:
    engine = rc.load(package.path)
    engine.close()
    engine.close()
    with pytest.raises(rc.RyzenError, match="closed"):
        engine.run(x=np.ones((1, tiny_models.WIDTH), np.float32))


def test_several_threads_share_an_engine(package: Package) -> None:
    inputs = [np.full((index % 8 + 1, tiny_models.WIDTH), index / 10, np.float32) for index in range(24)]
    outputs: dict[int, np.ndarray] = {}
    with rc.load(package.path) as engine:

        def run_every_fourth(start: int) -> None:
            for index in range(start, len(inputs), 4):
                outputs[index] = engine(x=inputs[index])

        threads = [threading.Thread(target=run_every_fourth, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outputs) == len(inputs)
    for index, x in enumerate(inputs):
        np.testing.assert_allclose(outputs[index], tiny_models.expected(x), rtol=1e-5, atol=1e-5)


def test_a_modified_file_is_detected_before_it_is_read(package: Package, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ryzen"
    shutil.copytree(package.path, copy)
    graph = copy / "graphs" / "model.fold.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(bytes(data))
    with pytest.raises(PackageError, match="sha256"):
        rc.load(copy)
