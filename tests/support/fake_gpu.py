"""A fake GPU in host memory, and a fake engine that doubles `x` (N, 4).

No GPU was available during development. The fakes implement the calls of the real bindings, which `test_nvidia_bindings.py`
verifies. Tests on them show that a session makes its calls in a valid order, not that the calls succeed on a GPU.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt_rtx_bindings as trt

from ryzen_compile.spec.target import Gpu


class FakeBuffer:
    """A buffer of `size` bytes: newly allocated, or existing memory at the address `handle`."""

    def __init__(self, size: int, handle: int | None = None, owner: object = None) -> None:
        self._memory = ctypes.create_string_buffer(size)
        self.size, self.owner = size, owner
        self.handle = ctypes.addressof(self._memory) if handle is None else handle

    @classmethod
    def from_handle(cls, pointer: int, size: int, owner: object = None) -> FakeBuffer:
        return cls(size, pointer, owner)

    def copy_to(self, other: FakeBuffer, *, stream: FakeStream) -> None:
        ctypes.memmove(other.handle, self.handle, other.size)

    def copy_from(self, other: FakeBuffer, *, stream: FakeStream) -> None:
        ctypes.memmove(self.handle, other.handle, other.size)


class FakeStream:
    handle = 7
    closed = False

    def sync(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class FakeDevice:
    name, arch = "fake GPU", "89"

    def set_current(self) -> None: ...

    def create_stream(self) -> FakeStream:
        return FakeStream()

    def allocate(self, size: int, *, stream: FakeStream) -> FakeBuffer:
        return FakeBuffer(size)


class FakeEngine:
    num_io_tensors = 2
    num_optimization_profiles = 2
    broken = False

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name == "x" else trt.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 4)

    def get_tensor_dtype(self, name: str) -> Any:
        return trt.DataType.FLOAT

    def get_tensor_location(self, name: str) -> Any:
        return trt.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [[(1, 4), (2, 4), (8, 4)], [(9, 4), (16, 4), (64, 4)]][index]

    def create_execution_context(self) -> FakeExecutionContext:
        return FakeExecutionContext(self)


class FakeExecutionContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.active_optimization_profile = 0
        self.shape: tuple[int, ...] = ()
        self.address = 0
        self.allocator: Any = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active_optimization_profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        self.shape = shape
        return low[0] <= shape[0] <= high[0]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.address = address
        return True

    def set_output_allocator(self, name: str, allocator: object) -> bool:
        self.allocator = allocator
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.broken:
            return False
        count = int(np.prod(self.shape))
        x = np.ctypeslib.as_array(ctypes.cast(self.address, ctypes.POINTER(ctypes.c_float)), (count,))
        self.allocator.notify_shape("y", self.shape)
        pointer = self.allocator.reallocate_output_async("y", 0, 4 * count, 256, stream)
        np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (count,))[:] = 2 * x
        return True


def fake_bindings(engine: FakeEngine | None) -> SimpleNamespace:
    """Return the bindings of TensorRT-RTX with a fake runtime that returns `engine` for every plan."""
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
    return SimpleNamespace(**{**vars(trt), "Runtime": lambda logger: runtime})


FAKE_GPU = Gpu(name="fake GPU", sm=89, memory_bytes=1 << 34, driver="580")
