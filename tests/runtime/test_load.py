"""A package is loaded by what fits this machine, checked before it is read, and safe to share between threads."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from support import tiny_models

import ryzen_compile as rc
from ryzen_compile import registry
from ryzen_compile.artifacts.package.read import Package
from ryzen_compile.errors import PackageError, ShapeError, UsageError
from ryzen_compile.runtime.choose import choose, incompatibility
from ryzen_compile.runtime.load import Engine
from ryzen_compile.spec.target import Gpu


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("runtime")
    return rc.build(
        tiny_models.write(folder / "small.onnx"),
        gpu="cpu,sm89",
        max_shapes=["x:8x16"],
        min_shapes=["x:1x16"],
        compare=False,
        cache=False,
    )


def test_without_a_gpu_the_portable_graph_serves_and_the_choice_says_why(package: Package) -> None:
    with rc.load(package.path) as engine:
        assert engine.choice.backend == "onnxruntime"
        assert "because no engine fits: engines/model.tensorrt-rtx-sm89.plan: built for sm89" in engine.choice.summary
        assert engine.load_seconds > 0
        assert "graphs/model.fp32.onnx" in repr(engine)


def test_an_engine_for_the_gpu_that_is_here_comes_first(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = Gpu(name="NVIDIA L4", sm=89, memory_bytes=24 * 10**9, driver="580.1")
    (engine,) = package.manifest.engines
    assert incompatibility(engine, ()) == "built for sm89, and no GPU driver is here"
    assert "this machine has NVIDIA L4 (sm86)" in str(incompatibility(engine, (msgspec.structs.replace(ada, sm=86),)))
    older = msgspec.structs.replace(engine, backend_version="1.2.0.1")
    rtx = registry.find_backend("tensorrt-rtx")
    capabilities = msgspec.structs.replace(rtx.probe(), can_run=True)
    monkeypatch.setattr(type(rtx), "probe", lambda self: capabilities)
    monkeypatch.setattr("ryzen_compile.runtime.choose.detect_gpus", lambda: (ada,))
    assert incompatibility(engine, (ada,)) is None
    assert "built by tensorrt-rtx 1.2.0.1" in str(incompatibility(older, (ada,)))
    _, choice = choose(package.manifest, None, None)
    assert (choice.backend, choice.path) == ("tensorrt-rtx", engine.path)
    assert choice.files == (engine.path,)


def test_a_backend_that_has_nothing_here_is_refused_with_every_reason(package: Package) -> None:
    with pytest.raises(PackageError, match="nothing in this package can run `model` here; .*no GPU driver is here"):
        rc.load(package.path, backend="tensorrt-rtx")
    with pytest.raises(UsageError, match="no backend `tensorflow`"):
        rc.load(package.path, backend="tensorflow")
    with pytest.raises(UsageError, match="no graph `decode`"):
        rc.load(package.path, graph="decode")


def test_inputs_may_be_given_by_keyword_or_by_mapping(package: Package) -> None:
    x = np.ones((2, tiny_models.WIDTH), np.float32)
    with rc.load(package.path) as engine:
        named = engine.run(x=x)
        assert list(named) == ["y"]
        np.testing.assert_array_equal(named["y"], engine({"x": x}))
        np.testing.assert_allclose(named["y"], tiny_models.expected(x), rtol=1e-5, atol=1e-5)


def test_torch_in_is_torch_out_without_a_copy(package: Package) -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(2, tiny_models.WIDTH)
    with rc.load(package.path) as engine:
        served = Remembers(engine)
        y = engine(x=x)
        assert isinstance(y, torch.Tensor)
        np.testing.assert_allclose(y.numpy(), tiny_models.expected(x.numpy()), rtol=1e-5, atol=1e-5)
        assert y.data_ptr() == served.outputs["y"].ctypes.data
        assert served.feed["x"] is x


class Remembers:
    """Stands before the session of an engine and keeps what went in and came out last."""

    def __init__(self, engine: Engine) -> None:
        (part,) = engine._step_graphs
        self._session, engine._step_graphs = part.session, (dataclasses.replace(part, session=self),)  # type: ignore[arg-type]
        self.feed: Any = None
        self.outputs: Any = None

    def run(self, feed: Any) -> Any:
        self.feed, self.outputs = feed, self._session.run(feed)
        return self.outputs


EVERY_KIND = """
<ir_version: 10, opset_import: ["" : 21]>
kinds (float[N] x) => (bfloat16[N] half, float8e5m2[N] quarter, float sum, bool[N] is_nan) {
  half = Cast <to = 16> (x)  quarter = Cast <to = 19> (x)  is_nan = IsNaN (x)  sum = ReduceSum <keepdims = 0> (x) }
"""


def test_outputs_that_dlpack_cannot_carry_are_torch_tensors_over_the_same_memory(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor([1.0, -2.0, 0.5])
    with rc.load(built(EVERY_KIND, tmp_path, min_shapes=["x:0"], max_shapes=["x:4"])) as engine:
        served = Remembers(engine)
        found = engine.run(x=x)
        kinds = {"half": torch.bfloat16, "quarter": torch.float8_e5m2, "sum": torch.float32, "is_nan": torch.bool}
        assert {name: value.dtype for name, value in found.items()} == kinds
        assert {name: value.data_ptr() for name, value in found.items()} == {
            name: array.ctypes.data for name, array in served.outputs.items()
        }
        assert torch.equal(found["half"].float(), x)
        assert torch.equal(found["quarter"].float(), x)
        assert found["sum"].shape == ()
        empty = engine.run(x=torch.ones(0))["half"]
        assert (empty.dtype, empty.shape) == (torch.bfloat16, (0,))


def test_sequences_come_out_as_lists_of_torch_tensors_and_strings_as_they_are(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    graph = """
    <ir_version: 10, opset_import: ["" : 21]>
    many (float[N] x, string[M] words) => (seq(float[N]) items, string[M] same) {
      twice = Add (x, x)  items = SequenceConstruct (x, twice)  same = Identity (words) }
    """
    x = torch.tensor([1.0, 2.0])
    with rc.load(built(graph, tmp_path)) as engine:
        served = Remembers(engine)
        found = engine.run(x=x, words=["a", "b"])
        assert all(isinstance(item, torch.Tensor) for item in found["items"])
        assert [item.tolist() for item in found["items"]] == [[1, 2], [2, 4]]
        assert [item.data_ptr() for item in found["items"]] == [array.ctypes.data for array in served.outputs["items"]]
        assert found["same"].tolist() == ["a", "b"]


def test_an_output_that_is_not_there_stays_none(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    with rc.load(package.path) as engine:
        monkeypatch.setattr(engine._step_graphs[0].session, "run", lambda feed: {"y": None})
        assert engine(x=torch.ones(2, tiny_models.WIDTH)) is None


def built(graph: str, folder: Path, **options: Any) -> str:
    """Build the graph and return its package."""
    onnx.save(onnx.parser.parse_model(graph), folder / "model.onnx")
    return rc.build(folder / "model.onnx", gpu="cpu", compare=False, cache=False, **options).path


def test_lists_are_held_to_the_profiles_as_arrays_are(tmp_path: Path) -> None:
    graph = """
    <ir_version: 10, opset_import: ["" : 21]>
    two (float[N] x, float[M] z, seq(float[K]) items) => (float[P] y) {
      h = ConcatFromSequence <axis = 0> (items)  y = Concat <axis = 0> (x, z, h) }
    """
    ranges = {"min_shapes": ["x:1,z:1"], "max_shapes": ["x:4,z:4"]}
    few, many, items = np.ones(2, np.float32), np.ones(9, np.float32), [np.ones(3, np.float32)]
    with rc.load(built(graph, tmp_path, **ranges)) as engine:
        assert engine(x=[1.0, 1.0], z=few, items=items).shape == (7,)
        for x, z, wrong in ((few.tolist(), many, "z"), (many.tolist(), few, "x"), (many.tolist(), few.tolist(), "x")):
            with pytest.raises(ShapeError, match=f"`{wrong}` is 9: axis 0 takes 1..4, got 9"):
                engine(x=x, z=z, items=items)
        with pytest.raises(ShapeError, match="`x` is 9: axis 0 takes 1..4, got 9"):
            engine(x=many, z=[[1.0], [1.0, 2.0]], items=items)
        with pytest.raises(ShapeError, match="missing: z"):
            engine(x=few.tolist(), items=items)
        with pytest.raises(ShapeError, match="`x` cannot be read as float32"):
            engine(x=[[1.0], [1.0, 2.0]], z=few, items=items)


@pytest.mark.parametrize(
    ("feed", "says"),
    [
        ({"x": np.ones((9, 16), np.float32)}, r"`x` is 9x16: axis 0 takes 1..8, got 9"),
        ({"x": np.ones((1, 15), np.float32)}, r"axis 1 of the input x: float32\[batch, 16\] is 16, got 15"),
        ({"x": np.ones((1, 16), np.float64)}, "`x` is float64, it takes float32"),
        ({"x": np.ones((16,), np.float32)}, r"the input x: float32\[batch, 16\] has 2 dimensions, got 16"),
        ({}, "missing: x"),
        ({"x": np.ones((1, 16), np.float32), "z": np.ones(1)}, "no input `z`"),
    ],
)
def test_what_does_not_fit_is_named(package: Package, feed: dict[str, np.ndarray], says: str) -> None:
    with rc.load(package.path) as engine, pytest.raises(ShapeError, match=says):
        engine.run(feed)


def test_inputs_that_share_a_dimension_have_one_size_of_it(tmp_path: Path) -> None:
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


def test_a_closed_engine_says_so(package: Package) -> None:
    engine = rc.load(package.path)
    engine.close()
    engine.close()
    with pytest.raises(rc.RyzenError, match="closed"):
        engine.run(x=np.ones((1, tiny_models.WIDTH), np.float32))


def test_threads_share_an_engine(package: Package) -> None:
    feeds = [np.full((at % 8 + 1, tiny_models.WIDTH), at / 10, np.float32) for at in range(24)]
    found: dict[int, np.ndarray] = {}
    with rc.load(package.path) as engine:

        def work(start: int) -> None:
            for at in range(start, len(feeds), 4):
                found[at] = engine(x=feeds[at])

        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == len(feeds)
    for at, feed in enumerate(feeds):
        np.testing.assert_allclose(found[at], tiny_models.expected(feed), rtol=1e-5, atol=1e-5)


def test_a_swapped_weight_is_found_before_anything_is_read(package: Package, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy.ryzen"
    shutil.copytree(package.path, copy)
    graph = copy / "graphs" / "model.fp32.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(bytes(data))
    with pytest.raises(PackageError, match="sha256"):
        rc.load(copy)
