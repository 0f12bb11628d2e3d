"""`EngineSession` on a fake GPU: the order of calls, the input checks and the errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import fake_gpu

from ryzen_compile.backends.nvinfer.session import EngineSession, _InputTensor, open_session
from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.spec.interface import TensorSpec


@pytest.fixture(autouse=True)
def gpu_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ryzen_compile.backends.nvinfer.session.detect_gpus", lambda: (fake_gpu.FAKE_GPU,))
    monkeypatch.setattr("cuda.core.Device", fake_gpu.FakeDevice)
    monkeypatch.setattr("cuda.core.Buffer", fake_gpu.FakeBuffer)


@contextmanager
def session(folder: Path, engine: fake_gpu.FakeEngine | None, closed: list[str] | None = None) -> Iterator[EngineSession]:
    path = folder / "x2.plan"
    path.write_bytes(b"a plan")

    def make_context(loaded: fake_gpu.FakeEngine, cache_dir: Path | None) -> tuple[Any, Any]:
        return loaded.create_execution_context(), lambda: (closed if closed is not None else []).append("closed")

    with open_session(fake_gpu.fake_bindings(engine), str(path), None, make_context) as engine_session:
        yield engine_session


def rows(count: int, value: float = 1) -> np.ndarray:
    return np.full((count, 4), value, np.float32)


def test_inputs_outputs_and_profiles_are_read_from_the_engine(tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as engine_session:
        assert engine_session.inputs == (TensorSpec(name="x", dtype="float32", dims=("x.0", 4)),)
        assert engine_session.outputs == (TensorSpec(name="y", dtype="float32", dims=("y.0", 4)),)
        assert [profile.max["x"] for profile in engine_session.profiles] == [(8, 4), (64, 4)]


@pytest.mark.parametrize("count", [1, 8, 9, 64, 2])
def test_the_profile_that_contains_the_shape_is_selected(count: int, tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as engine_session:
        for size in (count, 3, count):
            np.testing.assert_array_equal(engine_session.run({"x": rows(size)})["y"], rows(size, 2))


def test_outputs_of_one_run_are_not_overwritten_by_the_next(tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as engine_session:
        first = engine_session.run({"x": rows(2, 1)})["y"]
        engine_session.run({"x": rows(2, 5)})
        np.testing.assert_array_equal(first, rows(2, 2))


def test_host_tensors_and_strided_views_are_supported(tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as engine_session:
        np.testing.assert_array_equal(engine_session.run({"x": torch.ones(2, 4)})["y"], rows(2, 2))  # type: ignore[dict-item]
        strided = np.arange(16, dtype=np.float32).reshape(4, 4).T
        np.testing.assert_array_equal(engine_session.run({"x": strided})["y"], 2 * strided)
        swapped = strided.astype(strided.dtype.newbyteorder())
        np.testing.assert_array_equal(engine_session.run({"x": swapped})["y"], 2 * strided)


class FakeGpuTensor:
    """A host tensor that reports the GPU as its device; its DLPack export is real, including strides."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape = tensor, tensor.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **options: object) -> object:
        return self.tensor.__dlpack__()


@pytest.mark.parametrize("tensor", [torch.arange(8.0).reshape(2, 4), torch.arange(16.0)[4:12:2].as_strided((1, 4), (7, 1))])
def test_contiguous_tensors_on_the_gpu_are_read_without_a_copy(tensor: torch.Tensor, tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as engine_session:
        y = engine_session.run({"x": FakeGpuTensor(tensor)})["y"]  # type: ignore[dict-item]
        np.testing.assert_array_equal(y, 2 * tensor.numpy())
        assert engine_session._context.address == tensor.data_ptr()


@pytest.mark.parametrize(
    "tensor", [torch.ones(4, 2).T, torch.ones(2, 8)[:, ::2], torch.ones(4, 4)[::2], torch.ones(1, 4).expand(2, 4)]
)
def test_a_non_contiguous_tensor_on_the_gpu_is_rejected(tensor: torch.Tensor, tmp_path: Path) -> None:
    with (
        session(tmp_path, fake_gpu.FakeEngine()) as engine_session,
        pytest.raises(BackendError, match="`x` is not contiguous") as caught,
    ):
        engine_session.run({"x": FakeGpuTensor(tensor)})  # type: ignore[dict-item]
    assert caught.value.hint == "pass x.contiguous()"


@pytest.mark.parametrize(
    "tensor", [torch.ones(()), torch.ones(0, 3), torch.ones(3, 0).T, torch.ones(2, 1, 3, 1), torch.ones(1, 3).T]
)
def test_scalars_empty_tensors_and_axes_of_size_1_are_contiguous(tensor: torch.Tensor) -> None:
    spec = TensorSpec(name="x", dtype="float32", dims=tuple(tensor.shape))
    assert _InputTensor(FakeGpuTensor(tensor), spec, 7).shape == tuple(tensor.shape)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": rows(65)}, "axis 0 takes 1..8, got 65; .*axis 0 takes 9..64, got 65"),
        ({"x": rows(2).astype(np.float16)}, "`x` is float16, expected float32"),
        ({"x": np.ones((2, 5), np.float32)}, "`x` has size 5 along axis 1"),
        ({}, "missing inputs: x"),
    ],
)
def test_inputs_that_match_no_profile_are_rejected(inputs: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as engine_session, pytest.raises(ShapeError, match=message):
        engine_session.run(inputs)


def test_a_failing_run_is_an_error(tmp_path: Path) -> None:
    engine = fake_gpu.FakeEngine()
    engine.broken = True
    with session(tmp_path, engine) as engine_session, pytest.raises(BackendError, match="x2.plan` failed"):
        engine_session.run({"x": rows(2)})


def test_an_engine_for_another_gpu_is_rejected_with_the_target_to_build_for(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot be loaded on fake GPU") as caught:
        with session(tmp_path, None):
            pass
    assert caught.value.hint == "build an engine for this GPU: --gpu sm89"


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_or_missing_file_is_rejected(exists: bool, tmp_path: Path) -> None:
    path = tmp_path / "none.plan"
    if exists:
        path.touch()
    with pytest.raises(BackendError, match="none.plan` cannot be read"):
        with open_session(fake_gpu.fake_bindings(None), str(path), None, lambda engine, folder: (None, lambda: None)):
            pass


def test_leaving_the_context_closes_the_session_and_its_execution_context(tmp_path: Path) -> None:
    closed: list[str] = []
    with session(tmp_path, fake_gpu.FakeEngine(), closed) as engine_session:
        assert closed == []
    assert closed == ["closed"]
    with pytest.raises(BackendError, match="is closed"):
        engine_session.run({"x": rows(1)})


def test_runs_in_several_threads_are_serialized(tmp_path: Path) -> None:
    failures = []

    def run_repeatedly(number: int) -> None:
        for _ in range(20):
            if not np.array_equal(engine_session.run({"x": rows(number, number)})["y"], rows(number, 2 * number)):
                failures.append(number)

    with session(tmp_path, fake_gpu.FakeEngine()) as engine_session:
        threads = [threading.Thread(target=run_repeatedly, args=(number,)) for number in (1, 3, 8, 9, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


class FakeRuntimeCache:
    """A fake kernel cache of TensorRT-RTX: `serialize` appends `+` to the deserialized content."""

    content = b""

    def deserialize(self, blob: bytes) -> bool:
        self.content = blob
        return True

    def serialize(self) -> bytes:
        return self.content + b"+"


class FakeRuntimeConfig:
    def __init__(self) -> None:
        self.cache = FakeRuntimeCache()

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return self.cache

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        return cache is self.cache


class FakeRTXEngine:
    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig()

    def create_execution_context(self, config: FakeRuntimeConfig) -> str:
        return "context"


def test_kernels_compiled_by_rtx_are_saved_and_loaded_again(tmp_path: Path) -> None:
    from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND

    for expected in (b"+", b"++"):
        context, save_kernels = BACKEND.create_execution_context(FakeRTXEngine(), tmp_path / "kernels")
        assert context == "context"
        save_kernels()
        (file,) = (tmp_path / "kernels").iterdir()
        assert file.read_bytes() == expected
    assert BACKEND.create_execution_context(FakeRTXEngine(), None)[0] == "context"


def test_a_kernel_cache_folder_that_cannot_be_read_or_written_is_ignored(tmp_path: Path) -> None:
    from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND

    (tmp_path / "file").touch()
    (tmp_path / "kernels" / "kernels.tensorrt-rtx").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "kernels"):
        context, save_kernels = BACKEND.create_execution_context(FakeRTXEngine(), folder)
        assert context == "context"
        save_kernels()
