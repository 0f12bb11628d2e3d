"""Engine tests that need a GPU: loading, running, agreement with the reference, and caching of compiled kernels.

None of these tests has been executed yet. `make test-gpu` runs them on a machine with an NVIDIA GPU. Tests whose requirements
are missing are skipped with a reason; without a GPU they fail.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

import ryzen_compile as rc
from ryzen_compile import registry
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.cli.main import run
from ryzen_compile.spec.target import Gpu, detect_gpus

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    gpus = detect_gpus()
    assert gpus, "no NVIDIA GPU was found; `make test` runs the tests that need none"
    return gpus[0]


@pytest.fixture(scope="module")
def package(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Package:
    builders = [name for name in ("tensorrt-rtx", "tensorrt") if gpu.sm in registry.find_backend(name).probe().sms]
    if not builders:
        pytest.skip(f"no installed backend builds engines for sm{gpu.sm}")
    folder = tmp_path_factory.mktemp("gpu")
    source = tiny_models.write(folder / "small.onnx")
    return rc.build(source, gpu="auto", max_shapes=["x:32x16"], min_shapes=["x:1x16"], precision="fp16", cache=False)


@pytest.mark.parametrize("batch", [1, 2, 31, 32])
def test_an_engine_matches_the_model(package: Package, batch: int) -> None:
    x = np.random.default_rng(batch).standard_normal((batch, tiny_models.WIDTH)).astype(np.float32)
    with rc.load(package.path) as engine:
        assert engine.choice.backend != "onnxruntime"
        np.testing.assert_allclose(engine(x=x), tiny_models.expected(x), rtol=2e-2, atol=2e-2)


def test_rows_of_a_batch_are_independent(package: Package) -> None:
    x = np.random.default_rng(0).standard_normal((32, tiny_models.WIDTH)).astype(np.float32)
    with rc.load(package.path) as engine:
        together = engine(x=x)
        for row in range(32):
            np.testing.assert_allclose(engine(x=x[row : row + 1])[0], together[row], rtol=1e-2, atol=1e-2)


def test_inputs_and_outputs_may_be_tensors_on_the_gpu(package: Package) -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(4, tiny_models.WIDTH, device="cuda")
    with rc.load(package.path) as engine:
        y = engine(x=x)
        np.testing.assert_allclose(y.cpu().numpy(), tiny_models.expected(x.cpu().numpy()), rtol=2e-2, atol=2e-2)


def test_kernels_compiled_on_the_first_load_are_cached(package: Package, tmp_path: Path) -> None:
    with rc.load(package.path, cache=tmp_path) as engine:
        if engine.choice.backend != "tensorrt-rtx":
            pytest.skip("only TensorRT-RTX compiles kernels when an engine is loaded")
        engine(x=np.ones((1, tiny_models.WIDTH), np.float32))
    assert any(path.is_file() and path.stat().st_size for path in tmp_path.rglob("*"))


def test_verify_adds_the_provenance_level_compared(package: Package) -> None:
    assert run(["verify", str(package.path), "-q"]) == 0
    (engine,) = read_package(package.path).manifest.engines
    assert [entry.level for entry in engine.provenance][-1] == "compared"


def test_onnx_runtime_serves_the_portable_graph_on_the_gpu(gpu: Gpu, tmp_path: Path) -> None:
    probe = registry.find_backend("onnxruntime").probe()
    if gpu.sm not in probe.sms:
        pytest.skip("the installed ONNX Runtime has no CUDA provider")
    built = rc.build(tiny_models.write(tmp_path / "small.onnx"), gpu="cpu", compare=False, cache=False)
    x = np.random.default_rng(3).standard_normal((8, tiny_models.WIDTH)).astype(np.float32)
    with rc.load(built.path, backend="onnxruntime") as engine:
        np.testing.assert_allclose(engine(x=x), tiny_models.expected(x), rtol=1e-3, atol=1e-3)
