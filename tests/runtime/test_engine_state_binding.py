"""`EngineStateBinding` on a fake GPU: the addresses that are bound, and the order of calls."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tensorrt_rtx_bindings as trt
from support import fake_gpu

from ryzen_compile.backends.nvinfer.session import EngineSession, EngineStateBinding, open_session
from ryzen_compile.errors import BackendError, RyzenError, ShapeError
from ryzen_compile.runtime.generation.session import DecodeSession
from ryzen_compile.runtime.generation.step_graphs import StepGraph
from ryzen_compile.spec import profile
from ryzen_compile.spec.interface import InputSpec, Interface, StateSpec, TensorSpec

VOCABULARY = 3
"""The logits of a token: its id, the number of earlier tokens in its row, and the sum of their ids."""


class StrictBuffer(fake_gpu.FakeBuffer):
    """A buffer that only copies between equal sizes, as in cuda.core."""

    def copy_to(self, other: fake_gpu.FakeBuffer, *, stream: fake_gpu.FakeStream) -> None:
        assert other.size == self.size
        super().copy_to(other, stream=stream)

    def copy_from(self, other: fake_gpu.FakeBuffer, *, stream: fake_gpu.FakeStream) -> None:
        assert other.size == self.size
        super().copy_from(other, stream=stream)


class StrictDevice(fake_gpu.FakeDevice):
    def allocate(self, size: int, *, stream: fake_gpu.FakeStream) -> StrictBuffer:
        return StrictBuffer(size)


class FakeDecoderEngine:
    """A fake decoder: the state `sums` (batch, 1) is aliased by its output, the state `counts` (batch,) is not."""

    tensors = {
        "ids": (trt.DataType.INT64, (-1, -1)),
        "mask": (trt.DataType.INT64, (-1, -1)),
        "sums": (trt.DataType.FLOAT, (-1, 1)),
        "counts": (trt.DataType.INT64, (-1,)),
        "sums_next": (trt.DataType.FLOAT, (-1, 1)),
        "logits": (trt.DataType.FLOAT, (-1, -1, VOCABULARY)),
        "counts_next": (trt.DataType.INT64, (-1,)),
    }
    num_io_tensors = len(tensors)
    num_optimization_profiles = 2
    broken = False
    aliases = True

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name in ("ids", "mask", "sums", "counts") else trt.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name][0]

    def get_tensor_location(self, name: str) -> Any:
        return trt.TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return "sums" if name == "sums_next" and self.aliases else None

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        sizes = [(1, 1), (1, 1), (4, 1)] if index == 0 else [(1, 2), (2, 8), (4, 8)]
        return [
            {1: (batch,), 2: (batch, seq)}[len(self.tensors[name][1])] if name != "sums" else (batch, 1) for batch, seq in sizes
        ]

    def create_execution_context(self) -> FakeDecoderContext:
        self.context = FakeDecoderContext(self)
        return self.context


class FakeDecoderContext:
    def __init__(self, engine: FakeDecoderEngine) -> None:
        self.engine = engine
        self.active_optimization_profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}
        self.bound: list[dict[str, int]] = []
        self.profiles: list[int] = []

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active_optimization_profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        self.shapes[name] = shape
        return all(minimum <= size <= maximum for minimum, size, maximum in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def _array(self, name: str, address: int, shape: tuple[int, ...]) -> np.ndarray:
        element_type = ctypes.c_int64 if self.engine.tensors[name][0] == trt.DataType.INT64 else ctypes.c_float
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(element_type)), shape)

    def _write(self, name: str, value: np.ndarray, stream: int) -> None:
        address = self.addresses.get(name, 0)
        if (allocator := self.allocators.get(name)) is not None:
            allocator.notify_shape(name, value.shape)
            size = value.size * (8 if self.engine.tensors[name][0] == trt.DataType.INT64 else 4)
            address = allocator.reallocate_output_async(name, 0, size, 256, stream)
        self._array(name, address, value.shape)[...] = value

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.broken:
            return False
        self.bound.append(dict(self.addresses))
        self.profiles.append(self.active_optimization_profile)
        ids, mask, sums, counts = (
            self._array(name, self.addresses[name], self.shapes[name]).copy() for name in ("ids", "mask", "sums", "counts")
        )
        before = np.cumsum(ids * mask, axis=1) - ids * mask + sums
        logits = np.stack([ids, counts[:, None] + np.arange(ids.shape[1]), before], axis=-1)
        self._write("sums_next", sums + (ids * mask).sum(axis=1, keepdims=True), stream)
        self._write("counts_next", counts + mask.sum(axis=1), stream)
        self._write("logits", logits.astype(np.float32), stream)
        return True


TOKENS = ("batch", "seq")
INTERFACE = Interface(
    inputs=(
        InputSpec(name="ids", dtype="int64", dims=TOKENS, role="ids"),
        InputSpec(name="mask", dtype="int64", dims=TOKENS, role="mask", padding_value=0),
        InputSpec(name="sums", dtype="float32", dims=("batch", 1), role="state"),
        InputSpec(name="counts", dtype="int64", dims=("batch",), role="state"),
    ),
    outputs=(
        TensorSpec(name="sums_next", dtype="float32", dims=("batch", 1)),
        TensorSpec(name="logits", dtype="float32", dims=(*TOKENS, VOCABULARY)),
        TensorSpec(name="counts_next", dtype="int64", dims=("batch",)),
    ),
    states=(
        StateSpec(name="sums", input="sums", output="sums_next", initial_value=0.5),
        StateSpec(name="counts", input="counts", output="counts_next", initial_value=-1, in_place=True),
    ),
    batch="batch",
    max_sizes={"batch": 4, "seq": 8},
)


@contextmanager
def open_fake_session(folder: Path, engine: FakeDecoderEngine) -> Iterator[EngineSession]:
    path = folder / "m.plan"
    path.write_bytes(b"a plan")
    with open_session(
        fake_gpu.fake_bindings(engine),  # type: ignore[arg-type]
        str(path),
        None,
        lambda loaded, cache_dir: (loaded.create_execution_context(), lambda: None),
    ) as session:
        yield session


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeDecoderEngine:
    monkeypatch.setattr("ryzen_compile.backends.nvinfer.session.detect_gpus", lambda: (fake_gpu.FAKE_GPU,))
    monkeypatch.setattr("cuda.core.Device", StrictDevice)
    monkeypatch.setattr("cuda.core.Buffer", StrictBuffer)
    return FakeDecoderEngine()


def decode_session(session: EngineSession, batch: int) -> DecodeSession:
    return DecodeSession(
        StepGraph(session=session, interface=INTERFACE, profiles=(profile.derive_profile(INTERFACE),)), batch=batch
    )


def test_states_stay_on_the_gpu_from_step_to_step(engine: FakeDecoderEngine, tmp_path: Path) -> None:
    with open_fake_session(tmp_path, engine) as session, decode_session(session, 2) as decoder:
        first = decoder.step([[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]])
        assert first[0].tolist() == [[1, -1, 0.5], [2, 0, 1.5], [3, 1, 3.5]]
        assert first[1, 0].tolist() == [4, -1, 0.5]
        assert decoder.step([[5], [6]])[:, 0].tolist() == [[5, 2, 6.5], [6, 0, 4.5]]
        assert decoder.read_state("sums").tolist() == [[11.5], [10.5]]
        assert decoder.read_state("counts").tolist() == [3, 1]
        assert engine.context.profiles == [1, 0]
        assert first[0].tolist() == [[1, -1, 0.5], [2, 0, 1.5], [3, 1, 3.5]]


def test_an_aliased_state_has_one_buffer_and_other_states_have_two(engine: FakeDecoderEngine, tmp_path: Path) -> None:
    with open_fake_session(tmp_path, engine) as session, decode_session(session, 2) as decoder:
        for _ in range(3):
            decoder.step([[1], [1]])
        first, second, third = engine.context.bound
        for step in (first, second, third):
            assert step["sums"] == step["sums_next"] == first["sums"]
            assert step["counts"] != step["counts_next"]
        assert (second["counts"], second["counts_next"]) == (first["counts_next"], first["counts"])
        assert (third["counts"], third["counts_next"]) == (first["counts"], first["counts_next"])


def test_alternating_engines_share_the_memory_of_their_states(engine: FakeDecoderEngine, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = FakeDecoderEngine()
    other.aliases = False
    with open_fake_session(tmp_path, engine) as narrow_session, open_fake_session(tmp_path / "other", other) as wide_session:
        narrow_interface = msgspec.structs.replace(INTERFACE, max_sizes={"batch": 4, "seq": 1})
        step_graphs = [
            StepGraph(session=session, interface=interface, profiles=(profile.derive_profile(interface),))
            for session, interface in ((narrow_session, narrow_interface), (wide_session, INTERFACE))
        ]
        with DecodeSession(*step_graphs, batch=2) as decoder:
            assert decoder.step([[1], [4]])[:, 0].tolist() == [[1, -1, 0.5], [4, -1, 0.5]]
            assert decoder.step([[2, 3], [9, 9]], [[1, 1], [0, 0]])[0].tolist() == [[2, 0, 1.5], [3, 1, 3.5]]
            assert decoder.step([[5, 5], [6, 7]])[1].tolist() == [[6, 0, 4.5], [7, 1, 10.5]]
            decoder.reset([0])
            assert decoder.step([[8], [8]])[:, 0].tolist() == [[8, -1, 0.5], [8, 2, 17.5]]
            assert decoder.read_state("sums").tolist() == [[8.5], [25.5]]
            assert len(engine.context.bound) == len(other.context.bound) == 2
            (first, fourth), (second, third) = engine.context.bound, other.context.bound
            assert (
                first["sums"]
                == first["sums_next"]
                == second["sums"]
                == third["sums_next"]
                == fourth["sums"]
                == fourth["sums_next"]
            )
            assert second["sums_next"] == third["sums"] != second["sums"]
            assert first["counts_next"] == second["counts"]
            assert third["counts_next"] == fourth["counts"]
            with pytest.raises(BackendError, match="the state `counts` differs between two graphs"):
                narrow_session.bind_states(
                    INTERFACE.states, {"sums": (2, 1), "counts": (3,)}, share_with=decoder._first_binding
                )


def test_rows_are_reset_individually(engine: FakeDecoderEngine, tmp_path: Path) -> None:
    with open_fake_session(tmp_path, engine) as session, decode_session(session, 3) as decoder:
        decoder.step([[1], [2], [3]])
        decoder.reset([2, 0])
        assert decoder.read_state("sums").tolist() == [[0.5], [2.5], [0.5]]
        assert decoder.read_state("counts").tolist() == [-1, 0, -1]
        assert decoder.step([[7], [7], [7]])[:, 0].tolist() == [[7, -1, 0.5], [7, 0, 2.5], [7, -1, 0.5]]


def test_other_runs_of_the_engine_do_not_touch_the_states(engine: FakeDecoderEngine, tmp_path: Path) -> None:
    with (
        open_fake_session(tmp_path, engine) as session,
        decode_session(session, 1) as decoder,
        decode_session(session, 1) as other,
    ):
        decoder.step([[1, 2]])
        other.step([[8]])
        inputs = {"ids": [[5]], "mask": [[1]], "sums": np.full((1, 1), 70, np.float32), "counts": [30]}
        outputs = session.run(inputs)  # type: ignore[arg-type]
        assert (outputs["sums_next"].tolist(), outputs["counts_next"].tolist()) == ([[75]], [31])
        for before, total in ((1, 3.5), (2, 7.5)):
            assert decoder.step([[4]])[0, 0].tolist() == [4, before, total]
        assert other.step([[4]])[0, 0].tolist() == [4, 0, 8.5]


def test_logits_may_be_smaller_than_in_the_previous_step(engine: FakeDecoderEngine, tmp_path: Path) -> None:
    with open_fake_session(tmp_path, engine) as session, decode_session(session, 1) as decoder:
        for count in (8, 1, 5, 8):
            assert decoder.step([list(range(count))])[0, :, 0].tolist() == list(range(count))


def test_a_failed_step_is_an_error_and_requires_a_reset(engine: FakeDecoderEngine, tmp_path: Path) -> None:
    with open_fake_session(tmp_path, engine) as session, decode_session(session, 1) as decoder:
        engine.broken = True
        with pytest.raises(BackendError, match="m.plan` failed"):
            decoder.step([[1]])
        engine.broken = False
        with pytest.raises(RyzenError, match="the states are undefined because a step failed"):
            decoder.step([[1]])
        decoder.reset()
        assert decoder.step([[1]])[0, 0].tolist() == [1, -1, 0.5]


def test_inputs_outside_the_profiles_of_the_engine_are_rejected(engine: FakeDecoderEngine, tmp_path: Path) -> None:
    with open_fake_session(tmp_path, engine) as session:
        binding = session.bind_states(INTERFACE.states, {"sums": (5, 1), "counts": (5,)})
        assert isinstance(binding, EngineStateBinding)
        ids = np.ones((5, 1), np.int64)
        with pytest.raises(ShapeError, match="axis 0 takes 1..4, got 5"):
            binding.run({"ids": ids, "mask": ids})
        with pytest.raises(ShapeError, match="missing inputs: mask"):
            binding.run({"ids": ids})


def test_a_closed_engine_runs_no_step(engine: FakeDecoderEngine, tmp_path: Path) -> None:
    with open_fake_session(tmp_path, engine) as session:
        decoder = decode_session(session, 1)
    for use in (lambda: decoder.step([[1]]), lambda: decoder.reset(), lambda: decoder.read_state("sums")):
        with pytest.raises(BackendError, match="is closed"):
            use()
