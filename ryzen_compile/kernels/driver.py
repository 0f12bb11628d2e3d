"""Kernels on a GPU, launched through the driver with the arguments that TensorRT would give: inputs, scalars, outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.kernels.aot import Compiled
from ryzen_compile.kernels.specialization import Instance
from ryzen_compile.kernels.triton_child import GUARD
from ryzen_compile.spec.dtypes import numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray[Any, Any]]

Form = Literal["ptx", "cubin"]


@dataclass
class Launch:
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
    order: list[str]
    """The ports, inputs before outputs; the scalars come between them."""
    inputs: int

    def __call__(self, stream: Any = None) -> None:
        """Launch, and do not wait. A grid of no programs is no launch."""
        import ctypes

        from cuda.core import LaunchConfig, launch

        if 0 in self.grid:
            return
        config = LaunchConfig(grid=self.grid, block=self.threads, shmem_size=self.shared_bytes)
        pointers = [int(self.buffers[name].handle) for name in self.order]
        arguments = [*pointers[: self.inputs], *map(ctypes.c_int32, self.scalars), *pointers[self.inputs :]]
        launch(stream or self.stream, config, self.kernel, *arguments)


class Launcher:
    """Runs compiled kernels on a GPU of this machine. Use it in `with`."""

    def __init__(self, number: int = 0) -> None:
        """Use GPU `number`; raises BackendError where cuda-core or the GPU is not there."""
        try:
            from cuda.core import Device

            self.device = Device(number)
            self.device.set_current()
        except Exception as error:
            raise BackendError(
                f"no kernel can be launched here: {error}", hint="pip install cuda-core cuda-bindings"
            ) from error
        self.sm = int(self.device.arch)
        self.stream = self.device.create_stream()

    def prepare(self, instance: Instance, compiled: Compiled, inputs: Arrays, *, form: Form = "ptx") -> Launch:
        """Load a kernel and put its inputs into device memory; outputs of their own start as bytes of no meaning."""
        import numpy as np
        from cuda.core import ObjectCode

        op = instance.op
        known = op.bind({name: array.shape for name, array in inputs.items()}, instance.attributes)
        scalars = instance.scalars(known)
        for name, value in zip(instance.kernel.scalars, scalars, strict=True):
            if name in instance.multiples and value % 16:
                raise ShapeError(f"{op.name}: `{name}` is {value}, and the kernel was compiled for multiples of 16")
        code = ObjectCode.from_ptx(compiled.ptx.encode()) if form == "ptx" else ObjectCode.from_cubin(compiled.cubin)
        buffers = {}
        for port in op.inputs:
            element = op.element_of(port, instance.elements)
            buffers[port.name] = self._send(np.ascontiguousarray(inputs[port.name], numpy_dtype(element)))
        for name, array in self._empty(instance, known).items():
            over = next(port.over for port in op.outputs if port.name == name)
            buffers[name] = buffers[over] if over else self._send(array)
        return Launch(
            device=self.device,
            stream=self.stream,
            kernel=code.get_kernel(compiled.name),
            grid=instance.grid(known),
            threads=compiled.threads,
            shared_bytes=compiled.shared_bytes,
            buffers=buffers,
            scalars=scalars,
            order=[port.name for port in (*op.inputs, *op.outputs)],
            inputs=len(op.inputs),
        )

    def run(
        self, instance: Instance, compiled: Compiled, inputs: Arrays, *, form: Form = "ptx"
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outputs of one launch by name."""
        launch = self.prepare(instance, compiled, inputs, form=form)
        launch()
        known = instance.op.bind({name: array.shape for name, array in inputs.items()}, instance.attributes)
        found = self._empty(instance, known)
        for name, array in found.items():
            self._fetch(launch.buffers[name], array)
        self.stream.sync()
        return found

    def _empty(self, instance: Instance, known: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        op, made = instance.op, {}
        for name, shape in op.output_shapes(known).items():
            port = next(port for port in op.outputs if port.name == name)
            dtype = numpy_dtype(op.element_of(port, instance.elements))
            count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            made[name] = np.frombuffer(bytearray([GUARD]) * count, dtype).reshape(shape)
        return made

    def _send(self, array: np.ndarray[Any, Any]) -> Any:
        from cuda.core import Buffer

        buffer = self.device.allocate(max(array.nbytes, 1), stream=self.stream)
        if array.nbytes:
            buffer.copy_from(Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array), stream=self.stream)
            self.stream.sync()
        return buffer

    def _fetch(self, buffer: Any, array: np.ndarray[Any, Any]) -> None:
        from cuda.core import Buffer

        if array.nbytes:
            buffer.copy_to(Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array), stream=self.stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stream.close()
