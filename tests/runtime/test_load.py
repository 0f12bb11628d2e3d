"""A package is loaded by what fits this machine, checked before it is read, and safe to share between threads."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import small

import ryzen_compile as rc
from ryzen_compile import registry
from ryzen_compile.errors import PackageError, ShapeError, UsageError
from ryzen_compile.package.read import Package
from ryzen_compile.runtime.choose import choose, misfit
from ryzen_compile.target import Gpu


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("runtime")
    return rc.build(
        small.write(folder / "small.onnx"),
        gpu="cpu,sm89",
        max_shapes=["x:8x16"],
        min_shapes=["x:1x16"],
        compare=False,
        cache=False,
    )


def test_without_a_gpu_the_portable_graph_serves_and_the_choice_says_why(package: Package) -> None:
    with rc.load(package.path) as engine:
        assert engine.choice.backend == "onnxruntime"
        assert "because no engine fits: engines/model.tensorrt-rtx-sm89.plan: built for sm89" in engine.choice.says
        assert engine.load_seconds > 0
        assert "graphs/model.fp32.onnx" in repr(engine)


def test_an_engine_for_the_gpu_that_is_here_comes_first(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = Gpu(name="NVIDIA L4", sm=89, memory_bytes=24 * 10**9, driver="580.1")
    (engine,) = package.manifest.engines
    assert misfit(engine, ()) == "built for sm89, and no GPU driver is here"
    assert "this machine has NVIDIA L4 (sm86)" in str(misfit(engine, (msgspec.structs.replace(ada, sm=86),)))
    older = msgspec.structs.replace(engine, backend_version="1.2.0.1")
    rtx = registry.find_backend("tensorrt-rtx")
    capabilities = msgspec.structs.replace(rtx.probe(), can_run=True)
    monkeypatch.setattr(type(rtx), "probe", lambda self: capabilities)
    monkeypatch.setattr("ryzen_compile.runtime.choose.detect", lambda: (ada,))
    assert misfit(engine, (ada,)) is None
    assert "built by tensorrt-rtx 1.2.0.1" in str(misfit(older, (ada,)))
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
    x = np.ones((2, small.WIDTH), np.float32)
    with rc.load(package.path) as engine:
        named = engine.run(x=x)
        assert list(named) == ["y"]
        np.testing.assert_array_equal(named["y"], engine({"x": x}))
        np.testing.assert_allclose(named["y"], small.expected(x), rtol=1e-5, atol=1e-5)


def test_torch_in_is_torch_out_without_a_copy(package: Package) -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(2, small.WIDTH)
    with rc.load(package.path) as engine:
        y = engine(x=x)
        assert isinstance(y, torch.Tensor)
        np.testing.assert_allclose(y.numpy(), small.expected(x.numpy()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("feed", "says"),
    [
        ({"x": np.ones((9, 16), np.float32)}, r"`x` is 9x16: axis 0 takes 1..8, got 9"),
        ({"x": np.ones((1, 15), np.float32)}, "axis 1 takes 16..16, got 15"),
        ({"x": np.ones((1, 16), np.float64)}, "`x` is float64, it takes float32"),
        ({"x": np.ones((16,), np.float32)}, "`x` has 1 dimensions, it takes 2"),
        ({}, "missing: x"),
        ({"x": np.ones((1, 16), np.float32), "z": np.ones(1)}, "no input `z`"),
    ],
)
def test_what_does_not_fit_is_named(package: Package, feed: dict[str, np.ndarray], says: str) -> None:
    with rc.load(package.path) as engine, pytest.raises(ShapeError, match=says):
        engine.run(feed)


def test_a_closed_engine_says_so(package: Package) -> None:
    engine = rc.load(package.path)
    engine.close()
    engine.close()
    with pytest.raises(rc.RyzenError, match="closed"):
        engine.run(x=np.ones((1, small.WIDTH), np.float32))


def test_threads_share_an_engine(package: Package) -> None:
    feeds = [np.full((at % 8 + 1, small.WIDTH), at / 10, np.float32) for at in range(24)]
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
        np.testing.assert_allclose(found[at], small.expected(feed), rtol=1e-5, atol=1e-5)


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
