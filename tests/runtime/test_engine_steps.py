"""How an engine on a GPU steps, on a stand-in for a GPU: what is proved is what is bound where, and the order of calls."""

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
"""The engine's logits of a token: its id, how many tokens came before in its row, and the sum of their ids."""


class Buffer(fake_gpu.FakeBuffer):
    """Copies only between equal sizes, as cuda.core does."""

    def copy_to(self, other: fake_gpu.FakeBuffer, *, stream: fake_gpu.FakeStream) -> None:
        assert other.size == self.size
        super().copy_to(other, stream=stream)

    def copy_from(self, other: fake_gpu.FakeBuffer, *, stream: fake_gpu.FakeStream) -> None:
        assert other.size == self.size
        super().copy_from(other, stream=stream)


class Device(fake_gpu.FakeDevice):
    def allocate(self, size: int, *, stream: fake_gpu.FakeStream) -> Buffer:
        return Buffer(size)


class Engine:
    """Ids (batch, seq) and a mask in, logits out; the sums (batch, 1) are aliased, the counts (batch,) are not."""

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

    def get_tensor_name(self, at: int) -> str:
        return list(self.tensors)[at]

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

    def get_tensor_profile_shape(self, name: str, at: int) -> list[tuple[int, ...]]:
        sizes = [(1, 1), (1, 1), (4, 1)] if at == 0 else [(1, 2), (2, 8), (4, 8)]
        return [
            {1: (batch,), 2: (batch, seq)}[len(self.tensors[name][1])] if name != "sums" else (batch, 1) for batch, seq in sizes
        ]

    def create_execution_context(self) -> Context:
        self.context = Context(self)
        return self.context


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.active_optimization_profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}
        self.bound: list[dict[str, int]] = []
        self.profiles: list[int] = []

    def set_optimization_profile_async(self, at: int, stream: int) -> bool:
        self.active_optimization_profile = at
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def _at(self, name: str, address: int, shape: tuple[int, ...]) -> np.ndarray:
        kind = ctypes.c_int64 if self.engine.tensors[name][0] == trt.DataType.INT64 else ctypes.c_float
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(kind)), shape)

    def _write(self, name: str, value: np.ndarray, stream: int) -> None:
        address = self.addresses.get(name, 0)
        if (allocator := self.allocators.get(name)) is not None:
            allocator.notify_shape(name, value.shape)
            size = value.size * (8 if self.engine.tensors[name][0] == trt.DataType.INT64 else 4)
            address = allocator.reallocate_output_async(name, 0, size, 256, stream)
        self._at(name, address, value.shape)[...] = value

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.broken:
            return False
        self.bound.append(dict(self.addresses))
        self.profiles.append(self.active_optimization_profile)
        ids, mask, sums, counts = (
            self._at(name, self.addresses[name], self.shapes[name]).copy() for name in ("ids", "mask", "sums", "counts")
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
        InputSpec(name="mask", dtype="int64", dims=TOKENS, role="mask"),
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
def running(folder: Path, engine: Engine) -> Iterator[EngineSession]:
    path = folder / "m.plan"
    path.write_bytes(b"a plan")
    with open_session(
        fake_gpu.fake_bindings(engine),  # type: ignore[arg-type]
        str(path),
        None,
        lambda found, cache: (found.create_execution_context(), lambda: None),
    ) as session:
        yield session


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr("ryzen_compile.backends.nvinfer.session.detect_gpus", lambda: (fake_gpu.FAKE_GPU,))
    monkeypatch.setattr("cuda.core.Device", Device)
    monkeypatch.setattr("cuda.core.Buffer", Buffer)
    return Engine()


def begin(session: EngineSession, batch: int) -> DecodeSession:
    return DecodeSession(
        StepGraph(session=session, interface=INTERFACE, profiles=(profile.derive_profile(INTERFACE),)), batch=batch
    )


def test_states_stay_on_the_gpu_from_step_to_step(engine: Engine, tmp_path: Path) -> None:
    with running(tmp_path, engine) as session, begin(session, 2) as decoding:
        first = decoding.step([[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]])
        assert first[0].tolist() == [[1, -1, 0.5], [2, 0, 1.5], [3, 1, 3.5]]
        assert first[1, 0].tolist() == [4, -1, 0.5]
        assert decoding.step([[5], [6]])[:, 0].tolist() == [[5, 2, 6.5], [6, 0, 4.5]]
        assert decoding.read_state("sums").tolist() == [[11.5], [10.5]]
        assert decoding.read_state("counts").tolist() == [3, 1]
        assert engine.context.profiles == [1, 0]
        assert first[0].tolist() == [[1, -1, 0.5], [2, 0, 1.5], [3, 1, 3.5]]


def test_an_aliased_state_has_one_memory_and_any_other_has_two(engine: Engine, tmp_path: Path) -> None:
    with running(tmp_path, engine) as session, begin(session, 2) as decoding:
        for _ in range(3):
            decoding.step([[1], [1]])
        one, two, three = engine.context.bound
        for step in (one, two, three):
            assert step["sums"] == step["sums_next"] == one["sums"]
            assert step["counts"] != step["counts_next"]
        assert (two["counts"], two["counts_next"]) == (one["counts_next"], one["counts"])
        assert (three["counts"], three["counts_next"]) == (one["counts"], one["counts_next"])


def test_engines_in_turns_share_the_memory_of_their_states(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Engine()
    other.aliases = False
    with running(tmp_path, engine) as one, running(tmp_path / "other", other) as two:
        narrow = msgspec.structs.replace(INTERFACE, max_sizes={"batch": 4, "seq": 1})
        parts = [
            StepGraph(session=session, interface=told, profiles=(profile.derive_profile(told),))
            for session, told in ((one, narrow), (two, INTERFACE))
        ]
        with DecodeSession(*parts, batch=2) as decoding:
            assert decoding.step([[1], [4]])[:, 0].tolist() == [[1, -1, 0.5], [4, -1, 0.5]]
            assert decoding.step([[2, 3], [9, 9]], [[1, 1], [0, 0]])[0].tolist() == [[2, 0, 1.5], [3, 1, 3.5]]
            assert decoding.step([[5, 5], [6, 7]])[1].tolist() == [[6, 0, 4.5], [7, 1, 10.5]]
            decoding.reset([0])
            assert decoding.step([[8], [8]])[:, 0].tolist() == [[8, -1, 0.5], [8, 2, 17.5]]
            assert decoding.read_state("sums").tolist() == [[8.5], [25.5]]
            assert len(engine.context.bound) == len(other.context.bound) == 2
            (first, last), (wide, wider) = engine.context.bound, other.context.bound
            assert (
                first["sums"] == first["sums_next"] == wide["sums"] == wider["sums_next"] == last["sums"] == last["sums_next"]
            )
            assert wide["sums_next"] == wider["sums"] != wide["sums"]
            assert first["counts_next"] == wide["counts"]
            assert wider["counts_next"] == last["counts"]
            with pytest.raises(BackendError, match="the state `counts` is another"):
                one.bind_states(INTERFACE.states, {"sums": (2, 1), "counts": (3,)}, share_with=decoding._first_binding)


def test_rows_are_reset_one_by_one(engine: Engine, tmp_path: Path) -> None:
    with running(tmp_path, engine) as session, begin(session, 3) as decoding:
        decoding.step([[1], [2], [3]])
        decoding.reset([2, 0])
        assert decoding.read_state("sums").tolist() == [[0.5], [2.5], [0.5]]
        assert decoding.read_state("counts").tolist() == [-1, 0, -1]
        assert decoding.step([[7], [7], [7]])[:, 0].tolist() == [[7, -1, 0.5], [7, 0, 2.5], [7, -1, 0.5]]


def test_other_runs_of_the_engine_do_not_touch_the_states(engine: Engine, tmp_path: Path) -> None:
    with running(tmp_path, engine) as session, begin(session, 1) as decoding, begin(session, 1) as other:
        decoding.step([[1, 2]])
        other.step([[8]])
        feed = {"ids": [[5]], "mask": [[1]], "sums": np.full((1, 1), 70, np.float32), "counts": [30]}
        found = session.run(feed)  # type: ignore[arg-type]
        assert (found["sums_next"].tolist(), found["counts_next"].tolist()) == ([[75]], [31])
        for before, total in ((1, 3.5), (2, 7.5)):
            assert decoding.step([[4]])[0, 0].tolist() == [4, before, total]
        assert other.step([[4]])[0, 0].tolist() == [4, 0, 8.5]


def test_logits_may_take_less_memory_than_before(engine: Engine, tmp_path: Path) -> None:
    with running(tmp_path, engine) as session, begin(session, 1) as decoding:
        for count in (8, 1, 5, 8):
            assert decoding.step([list(range(count))])[0, :, 0].tolist() == list(range(count))


def test_a_step_that_fails_is_an_error_and_needs_a_reset(engine: Engine, tmp_path: Path) -> None:
    with running(tmp_path, engine) as session, begin(session, 1) as decoding:
        engine.broken = True
        with pytest.raises(BackendError, match="m.plan` failed"):
            decoding.step([[1]])
        engine.broken = False
        with pytest.raises(RyzenError, match="a step failed"):
            decoding.step([[1]])
        decoding.reset()
        assert decoding.step([[1]])[0, 0].tolist() == [1, -1, 0.5]


def test_what_fits_no_profile_of_the_engine_is_refused(engine: Engine, tmp_path: Path) -> None:
    with running(tmp_path, engine) as session:
        steps = session.bind_states(INTERFACE.states, {"sums": (5, 1), "counts": (5,)})
        assert isinstance(steps, EngineStateBinding)
        ids = np.ones((5, 1), np.int64)
        with pytest.raises(ShapeError, match="axis 0 takes 1..4, got 5"):
            steps.run({"ids": ids, "mask": ids})
        with pytest.raises(ShapeError, match="missing: mask"):
            steps.run({"ids": ids})


def test_a_closed_engine_takes_no_step(engine: Engine, tmp_path: Path) -> None:
    with running(tmp_path, engine) as session:
        decoding = begin(session, 1)
    for use in (lambda: decoding.step([[1]]), lambda: decoding.reset(), lambda: decoding.read_state("sums")):
        with pytest.raises(BackendError, match="is closed"):
            use()
