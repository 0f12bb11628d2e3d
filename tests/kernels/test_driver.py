"""The launcher's calls, with a stand-in for the driver in host memory: that a GPU obeys them, tests/gpu shows where one is."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import cuda.core
import numpy as np
import pytest
from support.fake_gpu import FakeDevice as HostDevice

from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.kernels import CompiledKernel, Specialization
from ryzen_compile.kernels.driver import Launcher
from ryzen_compile.registry import find_op

OP = find_op("KVAppendEvict")
DIMS = {"B": 2, "H": 3, "C": 4, "S": 1, "D": 8, "E": 4}
INSTANCE = Specialization(OP, {"T": "float16"}, {"sinks": 1, "recent": 1}, DIMS)
COMPILED = CompiledKernel(
    name="entry",
    sm=89,
    ptx="// ptx",
    cubin=b"cubin",
    shared_bytes=512,
    threads=128,
    registers=40,
    spilled_bytes=0,
    hidden=2,
    triton="3.7.1",
)


class Code:
    """Stands for loaded code; remembers from what."""

    loaded: list[bytes] = []

    @classmethod
    def from_ptx(cls, module: bytes) -> Code:
        cls.loaded.append(module)
        return cls()

    @classmethod
    def from_cubin(cls, module: bytes) -> Code:
        return cls.from_ptx(module)

    def get_kernel(self, name: str) -> str:
        return name


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the driver; a launch writes 7 over the first byte of every pointer after the scalars, as a kernel might."""
    from support import fake_gpu

    found: list[Any] = []

    def launch(stream: Any, config: Any, kernel: str, *arguments: Any) -> None:
        found.append((config, kernel, arguments))
        last = max(i for i, one in enumerate(arguments) if isinstance(one, ctypes.c_int32))
        for pointer in arguments[last + 1 :]:
            ctypes.memset(pointer, 7, 1)

    Code.loaded.clear()
    monkeypatch.setattr(cuda.core, "Device", lambda number: HostDevice())
    monkeypatch.setattr(cuda.core, "Buffer", fake_gpu.FakeBuffer)
    monkeypatch.setattr(cuda.core, "ObjectCode", Code)
    monkeypatch.setattr(cuda.core, "launch", launch)
    return found


def test_a_launch_has_inputs_then_scalars_then_outputs(launches: list[Any]) -> None:
    assert OP.make_inputs is not None
    inputs = OP.make_inputs(np.random.default_rng(0), DIMS, INSTANCE.attributes)
    with Launcher() as launcher:
        assert launcher.sm == 89
        found = launcher.run(INSTANCE, COMPILED, inputs)
    ((config, kernel, arguments),) = launches
    assert Code.loaded == [b"// ptx"]
    assert kernel == "entry"
    assert (config.grid, config.block, config.shmem_size) == ((6, 1, 1), (128, 1, 1), 512)
    kinds = "".join("i" if isinstance(one, ctypes.c_int32) else "p" for one in arguments)
    assert kinds == "pppppppp" + "iii" + "pppppp"
    assert [one.value for one in arguments[8:11]] == [3, 4, 1]
    assert arguments[11:15] == arguments[:4], "what is written over an input is that input"
    assert len({*arguments[:8], *arguments[15:]}) == 10
    assert found["k_out"].tobytes()[0] == 7
    assert found["k_out"].tobytes()[1:] == inputs["k"].astype(np.float16).tobytes()[1:]
    assert found["slot"].tobytes() == b"\x07" + b"\xa5" * (found["slot"].nbytes - 1)


def test_a_kernel_for_multiples_is_not_launched_with_others(launches: list[Any]) -> None:
    assert OP.make_inputs is not None
    inputs = OP.make_inputs(np.random.default_rng(0), DIMS, INSTANCE.attributes)
    exact = dataclasses.replace(INSTANCE, divisible_by_16=("heads", "slots"))
    says = "`heads` is 3, and the kernel was compiled for multiples of 16"
    with Launcher() as launcher, pytest.raises(ShapeError, match=says):
        launcher.run(exact, COMPILED, inputs)
    assert launches == []


def test_multiples_are_told_from_the_dims() -> None:
    big = dataclasses.replace(INSTANCE, dims={**DIMS, "C": 64, "H": 17})
    assert big.with_divisibility().divisible_by_16 == ("slots",)
    assert big.with_divisibility({"H": 32, "C": object(), "S": 16}).divisible_by_16 == ("heads", "chunk")


def test_a_cubin_is_loaded_as_such(launches: list[Any]) -> None:
    assert OP.make_inputs is not None
    inputs = OP.make_inputs(np.random.default_rng(0), DIMS, INSTANCE.attributes)
    with Launcher() as launcher:
        launcher.run(INSTANCE, COMPILED, inputs, code_format="cubin")
    assert Code.loaded == [b"cubin"]
    assert len(launches) == 1


def test_where_there_is_no_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        raise RuntimeError("CUDA_ERROR_NO_DEVICE")

    monkeypatch.setattr(cuda.core, "Device", refuse)
    with pytest.raises(BackendError, match="no kernel can be launched here: CUDA_ERROR_NO_DEVICE"):
        Launcher()
