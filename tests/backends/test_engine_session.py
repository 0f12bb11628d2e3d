"""How an engine is run, on a stand-in for a GPU: what is proved is the order of calls, the checks and the errors."""

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
def a_gpu_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ryzen_compile.backends.nvinfer.session.detect_gpus", lambda: (fake_gpu.FAKE_GPU,))
    monkeypatch.setattr("cuda.core.Device", fake_gpu.FakeDevice)
    monkeypatch.setattr("cuda.core.Buffer", fake_gpu.FakeBuffer)


@contextmanager
def session(folder: Path, engine: fake_gpu.FakeEngine | None, left: list[str] | None = None) -> Iterator[EngineSession]:
    path = folder / "x2.plan"
    path.write_bytes(b"a plan")

    def make_context(found: fake_gpu.FakeEngine, cache: Path | None) -> tuple[Any, Any]:
        return found.create_execution_context(), lambda: (left if left is not None else []).append("left")

    with open_session(fake_gpu.fake_bindings(engine), str(path), None, make_context) as running:
        yield running


def rows(count: int, value: float = 1) -> np.ndarray:
    return np.full((count, 4), value, np.float32)


def test_inputs_outputs_and_profiles_are_the_engines(tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as running:
        assert running.inputs == (TensorSpec(name="x", dtype="float32", dims=("x.0", 4)),)
        assert running.outputs == (TensorSpec(name="y", dtype="float32", dims=("y.0", 4)),)
        assert [profile.max["x"] for profile in running.profiles] == [(8, 4), (64, 4)]


@pytest.mark.parametrize("count", [1, 8, 9, 64, 2])
def test_the_profile_that_holds_the_shape_is_chosen(count: int, tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as running:
        for size in (count, 3, count):
            np.testing.assert_array_equal(running.run({"x": rows(size)})["y"], rows(size, 2))


def test_outputs_of_one_run_are_not_overwritten_by_the_next(tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as running:
        first = running.run({"x": rows(2, 1)})["y"]
        running.run({"x": rows(2, 5)})
        np.testing.assert_array_equal(first, rows(2, 2))


def test_tensors_on_the_host_and_views_are_taken(tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as running:
        np.testing.assert_array_equal(running.run({"x": torch.ones(2, 4)})["y"], rows(2, 2))  # type: ignore[dict-item]
        strided = np.arange(16, dtype=np.float32).reshape(4, 4).T
        np.testing.assert_array_equal(running.run({"x": strided})["y"], 2 * strided)
        swapped = strided.astype(strided.dtype.newbyteorder())
        np.testing.assert_array_equal(running.run({"x": swapped})["y"], 2 * strided)


class OnGpu:
    """A tensor on the host that says it is on the GPU: what comes through DLPack is real, strides included."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape = tensor, tensor.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **options: object) -> object:
        return self.tensor.__dlpack__()


@pytest.mark.parametrize("tensor", [torch.arange(8.0).reshape(2, 4), torch.arange(16.0)[4:12:2].as_strided((1, 4), (7, 1))])
def test_contiguous_tensors_on_the_gpu_are_read_where_they_lie(tensor: torch.Tensor, tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as running:
        found = running.run({"x": OnGpu(tensor)})["y"]  # type: ignore[dict-item]
        np.testing.assert_array_equal(found, 2 * tensor.numpy())
        assert running._context.address == tensor.data_ptr()


@pytest.mark.parametrize(
    "tensor", [torch.ones(4, 2).T, torch.ones(2, 8)[:, ::2], torch.ones(4, 4)[::2], torch.ones(1, 4).expand(2, 4)]
)
def test_a_tensor_on_the_gpu_with_gaps_or_in_another_order_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    with (
        session(tmp_path, fake_gpu.FakeEngine()) as running,
        pytest.raises(BackendError, match="`x` is not contiguous") as caught,
    ):
        running.run({"x": OnGpu(tensor)})  # type: ignore[dict-item]
    assert caught.value.hint == "pass x.contiguous()"


@pytest.mark.parametrize(
    "tensor", [torch.ones(()), torch.ones(0, 3), torch.ones(3, 0).T, torch.ones(2, 1, 3, 1), torch.ones(1, 3).T]
)
def test_scalars_empty_tensors_and_axes_of_size_1_are_contiguous(tensor: torch.Tensor) -> None:
    spec = TensorSpec(name="x", dtype="float32", dims=tuple(tensor.shape))
    assert _InputTensor(OnGpu(tensor), spec, 7).shape == tuple(tensor.shape)


@pytest.mark.parametrize(
    ("feed", "says"),
    [
        ({"x": rows(65)}, "axis 0 takes 1..8, got 65; .*axis 0 takes 9..64, got 65"),
        ({"x": rows(2).astype(np.float16)}, "`x` is float16, it takes float32"),
        ({"x": np.ones((2, 5), np.float32)}, "`x` has 5 along axis 1"),
        ({}, "missing: x"),
    ],
)
def test_a_feed_that_fits_no_profile_is_refused(feed: dict[str, np.ndarray], says: str, tmp_path: Path) -> None:
    with session(tmp_path, fake_gpu.FakeEngine()) as running, pytest.raises(ShapeError, match=says):
        running.run(feed)


def test_a_run_that_fails_is_an_error(tmp_path: Path) -> None:
    engine = fake_gpu.FakeEngine()
    engine.broken = True
    with session(tmp_path, engine) as running, pytest.raises(BackendError, match="x2.plan` failed"):
        running.run({"x": rows(2)})


def test_an_engine_for_another_gpu_is_refused_with_the_target_to_build_for(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot be loaded on this a stand-in") as caught:
        with session(tmp_path, None):
            pass
    assert caught.value.hint == "build it for this GPU: --gpu sm89"


@pytest.mark.parametrize("made", [True, False])
def test_a_file_that_is_empty_or_not_there_is_refused(made: bool, tmp_path: Path) -> None:
    path = tmp_path / "none.plan"
    if made:
        path.touch()
    with pytest.raises(BackendError, match="none.plan` cannot be read"):
        with open_session(fake_gpu.fake_bindings(None), str(path), None, lambda engine, folder: (None, lambda: None)):
            pass


def test_leaving_closes_it_and_keeps_what_loading_made(tmp_path: Path) -> None:
    left: list[str] = []
    with session(tmp_path, fake_gpu.FakeEngine(), left) as running:
        assert left == []
    assert left == ["left"]
    with pytest.raises(BackendError, match="is closed"):
        running.run({"x": rows(1)})


def test_threads_take_turns(tmp_path: Path) -> None:
    wrong = []

    def work(number: int) -> None:
        for _ in range(20):
            if not np.array_equal(running.run({"x": rows(number, number)})["y"], rows(number, 2 * number)):
                wrong.append(number)

    with session(tmp_path, fake_gpu.FakeEngine()) as running:
        threads = [threading.Thread(target=work, args=(number,)) for number in (1, 3, 8, 9, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


class KernelCache:
    """A stand-in for RTX's cache of kernels: each run adds a `+` to what it was given."""

    holds = b""

    def deserialize(self, blob: bytes) -> bool:
        self.holds = blob
        return True

    def serialize(self) -> bytes:
        return self.holds + b"+"


class KernelConfig:
    def __init__(self) -> None:
        self.cache = KernelCache()

    def create_runtime_cache(self) -> KernelCache:
        return self.cache

    def set_runtime_cache(self, cache: KernelCache) -> bool:
        return cache is self.cache


class KernelEngine:
    def create_runtime_config(self) -> KernelConfig:
        return KernelConfig()

    def create_execution_context(self, config: KernelConfig) -> str:
        return "context"


def test_the_kernels_that_rtx_compiles_are_kept_and_found_again(tmp_path: Path) -> None:
    from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND

    for expected in (b"+", b"++"):
        context, keep = BACKEND.create_execution_context(KernelEngine(), tmp_path / "kernels")
        assert context == "context"
        keep()
        (file,) = (tmp_path / "kernels").iterdir()
        assert file.read_bytes() == expected
    assert BACKEND.create_execution_context(KernelEngine(), None)[0] == "context"


def test_a_folder_for_kernels_that_cannot_be_read_or_written_is_done_without(tmp_path: Path) -> None:
    from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND

    (tmp_path / "file").touch()
    (tmp_path / "kernels" / "kernels.tensorrt-rtx").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "kernels"):
        context, keep = BACKEND.create_execution_context(KernelEngine(), folder)
        assert context == "context"
        keep()
