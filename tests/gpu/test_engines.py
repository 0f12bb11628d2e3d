"""What only a GPU can show: engines that load, run, agree with their baseline, and keep what they compile.

None of this has been executed yet. `make test-gpu` runs it on a machine with an NVIDIA GPU; what the machine lacks is skipped
by name, and a machine without a GPU fails.
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
    found = detect_gpus()
    assert found, "there is no NVIDIA GPU here: `make test` runs what needs none"
    return found[0]


@pytest.fixture(scope="module")
def package(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Package:
    builders = [name for name in ("tensorrt-rtx", "tensorrt") if gpu.sm in registry.find_backend(name).probe().sms]
    if not builders:
        pytest.skip(f"no installed backend builds engines for sm{gpu.sm}")
    folder = tmp_path_factory.mktemp("gpu")
    source = tiny_models.write(folder / "small.onnx")
    return rc.build(source, gpu="auto", max_shapes=["x:32x16"], min_shapes=["x:1x16"], precision="fp16", cache=False)


@pytest.mark.parametrize("batch", [1, 2, 31, 32])
def test_an_engine_computes_what_the_model_means(package: Package, batch: int) -> None:
    x = np.random.default_rng(batch).standard_normal((batch, tiny_models.WIDTH)).astype(np.float32)
    with rc.load(package.path) as engine:
        assert engine.choice.backend != "onnxruntime"
        np.testing.assert_allclose(engine(x=x), tiny_models.expected(x), rtol=2e-2, atol=2e-2)


def test_rows_of_a_batch_do_not_depend_on_each_other(package: Package) -> None:
    x = np.random.default_rng(0).standard_normal((32, tiny_models.WIDTH)).astype(np.float32)
    with rc.load(package.path) as engine:
        together = engine(x=x)
        for at in range(32):
            np.testing.assert_allclose(engine(x=x[at : at + 1])[0], together[at], rtol=1e-2, atol=1e-2)


def test_tensors_on_the_gpu_go_in_and_come_out(package: Package) -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(4, tiny_models.WIDTH, device="cuda")
    with rc.load(package.path) as engine:
        y = engine(x=x)
        np.testing.assert_allclose(y.cpu().numpy(), tiny_models.expected(x.cpu().numpy()), rtol=2e-2, atol=2e-2)


def test_what_is_compiled_on_the_first_load_is_kept(package: Package, tmp_path: Path) -> None:
    with rc.load(package.path, cache=tmp_path) as engine:
        if engine.choice.backend != "tensorrt-rtx":
            pytest.skip("only TensorRT-RTX compiles kernels when an engine is loaded")
        engine(x=np.ones((1, tiny_models.WIDTH), np.float32))
    assert any(path.is_file() and path.stat().st_size for path in tmp_path.rglob("*"))


def test_verify_makes_the_evidence_compared(package: Package) -> None:
    assert run(["verify", str(package.path), "-q"]) == 0
    (engine,) = read_package(package.path).manifest.engines
    assert [one.level for one in engine.provenance][-1] == "compared"


def test_onnx_runtime_serves_the_portable_graph_on_the_gpu(gpu: Gpu, tmp_path: Path) -> None:
    can = registry.find_backend("onnxruntime").probe()
    if gpu.sm not in can.sms:
        pytest.skip("the installed ONNX Runtime has no CUDA provider")
    built = rc.build(tiny_models.write(tmp_path / "small.onnx"), gpu="cpu", compare=False, cache=False)
    x = np.random.default_rng(3).standard_normal((8, tiny_models.WIDTH)).astype(np.float32)
    with rc.load(built.path, backend="onnxruntime") as engine:
        np.testing.assert_allclose(engine(x=x), tiny_models.expected(x), rtol=1e-3, atol=1e-3)
