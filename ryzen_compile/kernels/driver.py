"""Kernels on a GPU, launched through the driver with the arguments that TensorRT would give: inputs, scalars, outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.kernels.aot import CompiledKernel
from ryzen_compile.kernels.specialization import Specialization
from ryzen_compile.kernels.triton_child import GUARD
from ryzen_compile.spec.dtypes import numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray[Any, Any]]

CodeFormat = Literal["ptx", "cubin"]


@dataclass
class KernelLaunch:
    """A kernel whose arguments lie in device memory: it can be launched again and again."""

    device: Any
    stream: Any
    kernel: Any
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    buffers: dict[str, Any]
    """By port; an output that is written over an input is that input's."""
    scalars: list[int]
    param_order: list[str]
    """The ports, inputs before outputs; the scalars come between them."""
    input_count: int

    def __call__(self, stream: Any = None) -> None:
        """Launch, and do not wait. A grid of no programs is no launch."""
        import ctypes

        from cuda.core import LaunchConfig, launch

        if 0 in self.grid:
            return
        config = LaunchConfig(grid=self.grid, block=self.threads, shmem_size=self.shared_bytes)
        pointers = [int(self.buffers[name].handle) for name in self.param_order]
        arguments = [*pointers[: self.input_count], *map(ctypes.c_int32, self.scalars), *pointers[self.input_count :]]
        launch(stream or self.stream, config, self.kernel, *arguments)


class Launcher:
    """Runs compiled kernels on a GPU of this machine. Use it in `with`."""

    def __init__(self, device_index: int = 0) -> None:
        """Use GPU `number`; raises BackendError where cuda-core or the GPU is not there."""
        try:
            from cuda.core import Device

            self.device = Device(device_index)
            self.device.set_current()
        except Exception as error:
            raise BackendError(
                f"no kernel can be launched here: {error}", hint="pip install cuda-core cuda-bindings"
            ) from error
        self.sm = int(self.device.arch)
        self.stream = self.device.create_stream()

    def prepare(
        self, specialization: Specialization, compiled: CompiledKernel, inputs: Arrays, *, code_format: CodeFormat = "ptx"
    ) -> KernelLaunch:
        """Load a kernel and put its inputs into device memory; outputs of their own start as bytes of no meaning."""
        import numpy as np
        from cuda.core import ObjectCode

        op = specialization.op
        known = op.bind_dims({name: array.shape for name, array in inputs.items()}, specialization.attributes)
        scalars = specialization.scalars(known)
        for name, value in zip(specialization.kernel.scalars, scalars, strict=True):
            if name in specialization.divisible_by_16 and value % 16:
                raise ShapeError(f"{op.name}: `{name}` is {value}, and the kernel was compiled for multiples of 16")
        code = ObjectCode.from_ptx(compiled.ptx.encode()) if code_format == "ptx" else ObjectCode.from_cubin(compiled.cubin)
        buffers = {}
        for port in op.inputs:
            element = op.dtype_of(port, specialization.type_bindings)
            buffers[port.name] = self._copy_to_device(np.ascontiguousarray(inputs[port.name], numpy_dtype(element)))
        for name, array in self._allocate_outputs(specialization, known).items():
            over = next(port.aliases_input for port in op.outputs if port.name == name)
            buffers[name] = buffers[over] if over else self._copy_to_device(array)
        return KernelLaunch(
            device=self.device,
            stream=self.stream,
            kernel=code.get_kernel(compiled.name),
            grid=specialization.grid(known),
            threads=compiled.threads,
            shared_bytes=compiled.shared_bytes,
            buffers=buffers,
            scalars=scalars,
            param_order=[port.name for port in (*op.inputs, *op.outputs)],
            input_count=len(op.inputs),
        )

    def run(
        self, specialization: Specialization, compiled: CompiledKernel, inputs: Arrays, *, code_format: CodeFormat = "ptx"
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outputs of one launch by name."""
        launch = self.prepare(specialization, compiled, inputs, code_format=code_format)
        launch()
        known = specialization.op.bind_dims({name: array.shape for name, array in inputs.items()}, specialization.attributes)
        found = self._allocate_outputs(specialization, known)
        for name, array in found.items():
            self._copy_to_host(launch.buffers[name], array)
        self.stream.sync()
        return found

    def _allocate_outputs(self, specialization: Specialization, dims: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        op, made = specialization.op, {}
        for name, shape in op.output_shapes(dims).items():
            port = next(port for port in op.outputs if port.name == name)
            dtype = numpy_dtype(op.dtype_of(port, specialization.type_bindings))
            count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            made[name] = np.frombuffer(bytearray([GUARD]) * count, dtype).reshape(shape)
        return made

    def _copy_to_device(self, array: np.ndarray[Any, Any]) -> Any:
        from cuda.core import Buffer

        buffer = self.device.allocate(max(array.nbytes, 1), stream=self.stream)
        if array.nbytes:
            buffer.copy_from(Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array), stream=self.stream)
            self.stream.sync()
        return buffer

    def _copy_to_host(self, buffer: Any, array: np.ndarray[Any, Any]) -> None:
        from cuda.core import Buffer

        if array.nbytes:
            buffer.copy_to(Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array), stream=self.stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stream.close()
