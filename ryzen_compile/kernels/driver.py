"""Execution of kernels on a GPU through the CUDA driver, with TensorRT's argument list: inputs, scalars, outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.kernels.aot import CompiledKernel
from ryzen_compile.kernels.specialization import Specialization
from ryzen_compile.kernels.triton_child import GUARD
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.utils.closeable import Closeable

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray[Any, Any]]

CodeFormat = Literal["ptx", "cubin"]


@dataclass
class KernelLaunch:
    """A loaded kernel with its arguments in device memory; it can be launched repeatedly."""

    device: Any
    stream: Any
    kernel: Any
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    buffers: dict[str, Any]
    """Buffers by input or output name; an output that aliases an input has the input's buffer."""
    scalars: list[int]
    param_order: list[str]
    """The names of the inputs, then of the outputs; the scalars are passed between them."""
    input_count: int

    def __call__(self, stream: Any = None) -> None:
        """Launch the kernel without waiting for it. An empty grid is not launched."""
        import ctypes

        from cuda.core import LaunchConfig, launch

        if 0 in self.grid:
            return
        config = LaunchConfig(grid=self.grid, block=self.threads, shmem_size=self.shared_bytes)
        pointers = [int(self.buffers[name].handle) for name in self.param_order]
        arguments = [*pointers[: self.input_count], *map(ctypes.c_int32, self.scalars), *pointers[self.input_count :]]
        launch(stream or self.stream, config, self.kernel, *arguments)


class Launcher(Closeable):
    """Runs compiled kernels on a GPU of this machine. A context manager."""

    def __init__(self, device_index: int = 0) -> None:
        """Use GPU number `device_index`. Raises BackendError if cuda-core or the GPU is not available."""
        try:
            from cuda.core import Device

            self.device = Device(device_index)
            self.device.set_current()
        except Exception as error:
            raise BackendError(
                f"kernels cannot be launched on this machine: {error}", hint="pip install cuda-core cuda-bindings"
            ) from error
        self.sm = int(self.device.arch)
        self.stream = self.device.create_stream()

    def prepare(
        self, specialization: Specialization, compiled: CompiledKernel, inputs: Arrays, *, code_format: CodeFormat = "ptx"
    ) -> KernelLaunch:
        """Load a kernel and copy its inputs to device memory; outputs that alias no input are filled with a guard pattern.

        Raises ShapeError if the inputs violate the op's declaration, or a scalar is not a multiple of 16 but the kernel was
        compiled for multiples of 16.
        """
        import numpy as np
        from cuda.core import ObjectCode

        op = specialization.op
        dims = op.bind_dims({name: array.shape for name, array in inputs.items()}, specialization.attributes)
        scalars = specialization.scalars(dims)
        for name, value in zip(specialization.kernel.scalars, scalars, strict=True):
            if name in specialization.divisible_by_16 and value % 16:
                raise ShapeError(f"{op.name}: `{name}` is {value}, but the kernel was compiled for multiples of 16")
        code = ObjectCode.from_ptx(compiled.ptx.encode()) if code_format == "ptx" else ObjectCode.from_cubin(compiled.cubin)
        buffers = {}
        for param in op.inputs:
            dtype = op.dtype_of(param, specialization.type_bindings)
            buffers[param.name] = self._copy_to_device(np.ascontiguousarray(inputs[param.name], numpy_dtype(dtype)))
        for name, array in self._allocate_outputs(specialization, dims).items():
            aliased = next(param.aliases_input for param in op.outputs if param.name == name)
            buffers[name] = buffers[aliased] if aliased else self._copy_to_device(array)
        return KernelLaunch(
            device=self.device,
            stream=self.stream,
            kernel=code.get_kernel(compiled.name),
            grid=specialization.grid(dims),
            threads=compiled.threads,
            shared_bytes=compiled.shared_bytes,
            buffers=buffers,
            scalars=scalars,
            param_order=[param.name for param in (*op.inputs, *op.outputs)],
            input_count=len(op.inputs),
        )

    def run(
        self, specialization: Specialization, compiled: CompiledKernel, inputs: Arrays, *, code_format: CodeFormat = "ptx"
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Launch the kernel once and return its outputs by name. Raises ShapeError as `prepare` does."""
        launch = self.prepare(specialization, compiled, inputs, code_format=code_format)
        launch()
        dims = specialization.op.bind_dims({name: array.shape for name, array in inputs.items()}, specialization.attributes)
        outputs = self._allocate_outputs(specialization, dims)
        for name, array in outputs.items():
            self._copy_to_host(launch.buffers[name], array)
        self.stream.sync()
        return outputs

    def _allocate_outputs(self, specialization: Specialization, dims: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        op, outputs = specialization.op, {}
        for name, shape in op.output_shapes(dims).items():
            param = next(param for param in op.outputs if param.name == name)
            dtype = numpy_dtype(op.dtype_of(param, specialization.type_bindings))
            size_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            outputs[name] = np.frombuffer(bytearray([GUARD]) * size_bytes, dtype).reshape(shape)
        return outputs

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

    def close(self) -> None:
        """Free the resources."""
        self.stream.close()
