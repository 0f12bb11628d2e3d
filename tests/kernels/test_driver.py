"""The launcher's driver calls, with a fake driver in host memory; tests/gpu runs kernels on a real GPU."""

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
SPECIALIZATION = Specialization(OP, {"T": "float16"}, {"sinks": 1, "recent": 1, "window": 0}, DIMS)
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


class FakeObjectCode:
    """Fake of cuda.core's ObjectCode that records the loaded modules."""

    loaded: list[bytes] = []

    @classmethod
    def from_ptx(cls, module: bytes) -> FakeObjectCode:
        cls.loaded.append(module)
        return cls()

    @classmethod
    def from_cubin(cls, module: bytes) -> FakeObjectCode:
        return cls.from_ptx(module)

    def get_kernel(self, name: str) -> str:
        return name


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the driver by a fake whose launches set the first byte of every output to 7; return the recorded launches."""
    from support import fake_gpu

    recorded: list[Any] = []

    def launch(stream: Any, config: Any, kernel: str, *arguments: Any) -> None:
        recorded.append((config, kernel, arguments))
        last = max(i for i, argument in enumerate(arguments) if isinstance(argument, ctypes.c_int32))
        for pointer in arguments[last + 1 :]:
            ctypes.memset(pointer, 7, 1)

    FakeObjectCode.loaded.clear()
    monkeypatch.setattr(cuda.core, "Device", lambda number: HostDevice())
    monkeypatch.setattr(cuda.core, "Buffer", fake_gpu.FakeBuffer)
    monkeypatch.setattr(cuda.core, "ObjectCode", FakeObjectCode)
    monkeypatch.setattr(cuda.core, "launch", launch)
    return recorded


def test_a_launch_passes_inputs_then_scalars_then_outputs(launches: list[Any]) -> None:
    assert OP.make_inputs is not None
    inputs = OP.make_inputs(np.random.default_rng(0), DIMS, SPECIALIZATION.attributes)
    with Launcher() as launcher:
        assert launcher.sm == 89
        outputs = launcher.run(SPECIALIZATION, COMPILED, inputs)
    ((config, kernel, arguments),) = launches
    assert FakeObjectCode.loaded == [b"// ptx"]
    assert kernel == "entry"
    assert (config.grid, config.block, config.shmem_size) == ((6, 1, 1), (128, 1, 1), 512)
    kinds = "".join("i" if isinstance(argument, ctypes.c_int32) else "p" for argument in arguments)
    assert kinds == "pppppppp" + "iii" + "pppppp"
    assert [argument.value for argument in arguments[8:11]] == [3, 4, 1]
    assert arguments[11:15] == arguments[:4], "an output that aliases an input has its buffer"
    assert len({*arguments[:8], *arguments[15:]}) == 10
    assert outputs["k_out"].tobytes()[0] == 7
    assert outputs["k_out"].tobytes()[1:] == inputs["k"].astype(np.float16).tobytes()[1:]
    assert outputs["slot"].tobytes() == b"\x07" + b"\xa5" * (outputs["slot"].nbytes - 1)


def test_a_kernel_for_multiples_of_16_rejects_other_scalars(launches: list[Any]) -> None:
    assert OP.make_inputs is not None
    inputs = OP.make_inputs(np.random.default_rng(0), DIMS, SPECIALIZATION.attributes)
    divisible = dataclasses.replace(SPECIALIZATION, divisible_by_16=("heads", "slots"))
    message = "`heads` is 3, but the kernel was compiled for multiples of 16"
    with Launcher() as launcher, pytest.raises(ShapeError, match=message):
        launcher.run(divisible, COMPILED, inputs)
    assert launches == []


def test_multiples_of_16_are_derived_from_the_dims() -> None:
    big = dataclasses.replace(SPECIALIZATION, dims={**DIMS, "C": 64, "H": 17})
    assert big.with_divisibility().divisible_by_16 == ("slots",)
    assert big.with_divisibility({"H": 32, "C": object(), "S": 16}).divisible_by_16 == ("heads", "chunk")


def test_a_cubin_is_loaded_as_a_cubin(launches: list[Any]) -> None:
    assert OP.make_inputs is not None
    inputs = OP.make_inputs(np.random.default_rng(0), DIMS, SPECIALIZATION.attributes)
    with Launcher() as launcher:
        launcher.run(SPECIALIZATION, COMPILED, inputs, code_format="cubin")
    assert FakeObjectCode.loaded == [b"cubin"]
    assert len(launches) == 1


def test_a_missing_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_no_device(number: int) -> None:
        raise RuntimeError("CUDA_ERROR_NO_DEVICE")

    monkeypatch.setattr(cuda.core, "Device", raise_no_device)
    with pytest.raises(BackendError, match="kernels cannot be launched on this machine: CUDA_ERROR_NO_DEVICE"):
        Launcher()
