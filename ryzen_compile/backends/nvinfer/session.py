"""`EngineSession`: runs an engine on the current GPU, common to TensorRT and TensorRT-RTX.

This module was never executed on a GPU, because none was available during development. Tests verify that every attribute it
uses exists in NVIDIA's bindings, that its calls have a valid order on a fake GPU, and that it raises one clear error without
a driver.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.backends.input_validation import check_input_names, check_tensor, to_host_array
from ryzen_compile.backends.nvinfer.builder_log import BuilderLog
from ryzen_compile.backends.onnxruntime.state_binding import check_states_match
from ryzen_compile.errors import BackendError
from ryzen_compile.spec.interface import Inputs, Outputs, StateSpec, TensorSpec
from ryzen_compile.spec.profile import Profile, select_profile
from ryzen_compile.spec.target import detect_gpus

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.backends.api import StateBinding

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""TensorRT element types that a numpy array can hold -> numpy names."""

ContextFactory = Callable[[Any, Path | None], tuple[Any, Callable[[], None]]]
"""Creates an execution context of an engine, given the folder for cached kernels; also returns the function that closes it."""


@contextlib.contextmanager
def open_session(trt: Any, path: str, cache_dir: Path | None, context_factory: ContextFactory) -> Iterator[EngineSession]:
    """Load the engine at `path` on the current GPU and yield its session. Raises BackendError if it cannot be loaded."""
    device = _current_device(path)
    log = BuilderLog(trt)
    runtime = trt.Runtime(log.logger)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = runtime.deserialize_cuda_engine(plan)
    except (OSError, ValueError) as error:  # mmap: ValueError for an empty file
        raise BackendError(f"`{path}` cannot be read: {error}") from error
    if engine is None:
        raise BackendError(
            f"`{path}` cannot be loaded on {device.name}: {log.error_summary() or 'the library reports no reason'}",
            hint=f"build an engine for this GPU: --gpu sm{device.arch}",
        )
    context, close_context = context_factory(engine, cache_dir)
    if context is None:
        raise BackendError(f"an execution context of `{path}` cannot be created on {device.name}: {log.error_summary()}")
    session = EngineSession(trt, path, device, engine, context, log)
    try:
        yield session
    finally:
        session.close()
        close_context()


def _current_device(path: str) -> Any:
    if not detect_gpus():
        raise BackendError(
            f"`{path}` needs an NVIDIA GPU, and no NVIDIA driver was found",
            hint="run it on a machine with an NVIDIA GPU, or run the portable variant on the CPU",
        )
    try:
        from cuda.core import Device
    except ImportError as error:
        raise BackendError(
            f"`{path}` needs the package cuda-core: {error}", hint="pip install cuda-core cuda-bindings"
        ) from error
    device = Device()
    device.set_current()
    return device


class EngineSession:
    """A loaded engine. Thread-safe; calls are serialized, because a context runs one inference at a time."""

    def __init__(self, trt: Any, path: str, device: Any, engine: Any, context: Any, log: BuilderLog) -> None:
        """Read the inputs, outputs and profiles of `engine`."""
        self.path = path
        self._trt, self._device, self._engine, self._context, self._log = trt, device, engine, context, log
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        input_names = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs = tuple(self._tensor_spec(name) for name in input_names)
        self.outputs = tuple(self._tensor_spec(name) for name in names if name not in input_names)
        self.profiles = tuple(self._profile(index) for index in range(engine.num_optimization_profiles))
        self._stream = device.create_stream()
        self._lock = threading.Lock()
        self._closed = False

    def _tensor_spec(self, name: str) -> TensorSpec:
        shape = tuple(self._engine.get_tensor_shape(name))
        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise BackendError(f"`{self.path}`: `{name}` is {dtype}, which a numpy array cannot hold")
        dims = tuple(size if size >= 0 else f"{name}.{axis}" for axis, size in enumerate(shape))
        return TensorSpec(name=name, dtype=_DTYPES[dtype], dims=dims)

    def _profile(self, index: int) -> Profile:
        ranges = {spec.name: self._engine.get_tensor_profile_shape(spec.name, index) for spec in self.inputs}
        low, opt, high = ({name: tuple(shapes[corner]) for name, shapes in ranges.items()} for corner in range(3))
        return Profile(min=low, opt=opt, max=high)

    def run(self, inputs: Inputs) -> Outputs:
        """Run once and return host arrays by name; tensors on this GPU are read without a copy, through DLPack.

        Raises ShapeError for inputs that match no profile, BackendError if the execution fails.
        """
        check_input_names(inputs, self.inputs)
        with self._exclusive_context():
            tensors = self._prepare_inputs(inputs, self.inputs)
            self._select_profile({name: tensor.shape for name, tensor in tensors.items()})
            keep_alive = [self._bind_input(name, tensor) for name, tensor in tensors.items()]
            outputs = self._execute({spec: self._output_allocator() for spec in self.outputs})
            del keep_alive
            return outputs

    def bind_states(
        self, states: Sequence[StateSpec], shapes: Mapping[str, tuple[int, ...]], *, share_with: StateBinding | None = None
    ) -> EngineStateBinding:
        """Allocate `states` on the GPU, or use the memory of `share_with`. Raises BackendError if the states do not match."""
        if share_with is not None and not isinstance(share_with, EngineStateBinding):
            raise BackendError("states cannot be shared between backends", hint="run both graphs on one backend")
        return EngineStateBinding(self, states, shapes, share_with)

    @contextlib.contextmanager
    def _exclusive_context(self) -> Iterator[None]:
        """Hold the lock of the context. Raises BackendError if the engine is closed."""
        with self._lock:
            if self._closed:
                raise BackendError(f"`{self.path}` is closed", hint="run it inside the `with` block that opened it")
            self._device.set_current()
            yield

    def _prepare_inputs(self, inputs: Inputs, specs: Sequence[TensorSpec]) -> dict[str, _InputTensor]:
        return {spec.name: _InputTensor(inputs[spec.name], spec, int(self._stream.handle)) for spec in specs}

    def _execute(self, outputs: Mapping[TensorSpec, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Execute with the bound tensors and return host copies of `outputs`, which maps each output to its allocator."""
        from cuda.core import Buffer

        for spec, allocator in outputs.items():
            self._context.set_output_allocator(spec.name, allocator)
        unresolved = self._context.infer_shapes()
        if unresolved or not self._context.execute_async_v3(int(self._stream.handle)):
            reason = f"the shapes of {', '.join(unresolved)} are unknown" if unresolved else "the library reports no reason"
            raise BackendError(f"`{self.path}` failed: {self._log.error_summary() or reason}")
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for spec, allocator in outputs.items():
            arrays[spec.name] = array = allocator.array(spec)
            if array.nbytes:
                device_buffer = Buffer.from_handle(int(allocator.buffer.handle), array.nbytes, owner=allocator.buffer)
                device_buffer.copy_to(Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array), stream=self._stream)
        self._stream.sync()
        return arrays

    def _select_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        index = self.profiles.index(select_profile(self.profiles, shapes))
        if index != self._context.active_optimization_profile:
            self._context.set_optimization_profile_async(index, int(self._stream.handle))
            self._stream.sync()

    def _bind_input(self, name: str, tensor: _InputTensor) -> object:
        """Bind an input to the context, copied to the GPU if necessary; return the object to keep alive until the run ends."""
        from cuda.core import Buffer

        if not self._context.set_input_shape(name, tensor.shape):
            raise BackendError(f"`{self.path}` does not accept shape {tensor.shape} of `{name}`: {self._log.error_summary()}")
        if tensor.array is None or self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST:
            self._context.set_tensor_address(name, tensor.pointer)
            return tensor
        buffer = self._device.allocate(max(tensor.array.nbytes, 1), stream=self._stream)
        if tensor.array.nbytes:
            host = Buffer.from_handle(tensor.pointer, tensor.array.nbytes, owner=tensor.array)
            buffer.copy_from(host, stream=self._stream)
        self._context.set_tensor_address(name, int(buffer.handle))
        return buffer

    def _bind_state(self, state: StateSpec, buffer: _EngineStateBuffer) -> None:
        if not self._context.set_input_shape(state.input, buffer.shape):
            raise BackendError(
                f"`{self.path}` does not accept shape {buffer.shape} of `{state.input}`: {self._log.error_summary()}"
            )
        self._context.set_tensor_address(state.input, int(buffer.allocations[0].handle))
        self._context.set_output_allocator(state.output, None)
        self._context.set_tensor_address(state.output, int(buffer.allocations[-1].handle))

    def _output_allocator(self) -> Any:
        """Return an allocator of one output, whose size may depend on the data and is known during execution only."""
        device, stream = self._device, self._stream

        class Allocator(self._trt.IOutputAllocator):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.buffer: Any = None
                self.shape: tuple[int, ...] = ()

            def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, on: int) -> int:
                if self.buffer is None or self.buffer.size < size:
                    self.buffer = device.allocate(max(size, 1), stream=stream)
                return int(self.buffer.handle)

            def notify_shape(self, name: str, shape: Any) -> None:
                self.shape = tuple(shape)

            def array(self, spec: TensorSpec) -> np.ndarray[Any, Any]:
                import numpy as np

                return np.empty(self.shape, _numpy_dtype(spec.dtype))

        return Allocator()

    def close(self) -> None:
        """Release the engine, after the current run has finished."""
        with self._lock:
            self._closed = True
            self._context = self._engine = None
            self._stream.close()


class EngineStateBinding:
    """The states of a decoder in GPU memory, and steps over them, which are serialized with the other runs of the engine.

    A state whose output the engine aliases to its input has one buffer. Any other state has two buffers that are swapped at
    each step, whatever the value of `StateSpec.in_place`: the order in which an engine reads and writes is unknown. Several
    engines may step alternately over the same states; the second buffer of a state exists only while an engine that needs it is
    active.
    """

    def __init__(
        self,
        session: EngineSession,
        states: Sequence[StateSpec],
        shapes: Mapping[str, tuple[int, ...]],
        share_with: EngineStateBinding | None = None,
    ) -> None:
        """Allocate the states, or use those of `share_with`; `shapes` holds {state input name: shape}."""
        self._session, self._states = session, tuple(states)
        state_inputs, state_outputs = {state.input for state in states}, {state.output for state in states}
        self._inputs = tuple(spec for spec in session.inputs if spec.name not in state_inputs)
        self._outputs = {spec: session._output_allocator() for spec in session.outputs if spec.name not in state_outputs}
        dtypes = {spec.name: spec.dtype for spec in session.inputs}
        initial_states = {state.name: (shapes[state.input], dtypes[state.input], state.initial_value) for state in states}
        with session._exclusive_context():
            aliased_input = session._engine.get_aliased_input_tensor
            self._buffer_counts = {state.name: 1 if aliased_input(state.output) == state.input else 2 for state in states}
            if share_with is not None:
                check_states_match(initial_states, {name: buffer.initial_state for name, buffer in share_with._buffers.items()})
                self._buffers: dict[str, _EngineStateBuffer] = share_with._buffers
            else:
                self._buffers = {name: self._allocate(*initial_state) for name, initial_state in initial_states.items()}
                self._fill_initial(range(next(iter(shapes.values()))[0]))

    def _allocate(self, shape: tuple[int, ...], dtype: str, initial: float) -> _EngineStateBuffer:
        import numpy as np

        row = np.full(shape[1:], initial, _numpy_dtype(dtype))
        buffer = _EngineStateBuffer(initial_state=(shape, dtype, initial), shape=shape, initial_row=row, allocations=[])
        self._resize(buffer, 1)
        return buffer

    def _resize(self, buffer: _EngineStateBuffer, count: int) -> None:
        """Set the number of allocations of a state to `count`, 1 or 2."""
        del buffer.allocations[count:]
        while len(buffer.allocations) < count:
            size = max(buffer.shape[0] * buffer.initial_row.nbytes, 1)
            buffer.allocations.append(self._session._device.allocate(size, stream=self._session._stream))

    def run(self, inputs: Inputs) -> Outputs:
        """Run one step and return host arrays, owned by the caller, by name."""
        check_input_names(inputs, self._inputs)
        session = self._session
        with session._exclusive_context():
            tensors = session._prepare_inputs(inputs, self._inputs)
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            session._select_profile(shapes | {state.input: self._buffers[state.name].shape for state in self._states})
            keep_alive = [session._bind_input(name, tensor) for name, tensor in tensors.items()]
            for state in self._states:
                self._resize(self._buffers[state.name], self._buffer_counts[state.name])
                session._bind_state(state, self._buffers[state.name])
            outputs = session._execute(self._outputs)
            del keep_alive
            for buffer in self._buffers.values():
                buffer.allocations.reverse()
            return outputs

    def reset(self, rows: Sequence[int]) -> None:
        """Set `rows` of every state to their initial value."""
        with self._session._exclusive_context():
            self._fill_initial(rows)

    def _fill_initial(self, rows: Sequence[int]) -> None:
        from cuda.core import Buffer

        for buffer in self._buffers.values():
            allocation, size = buffer.allocations[0], buffer.initial_row.nbytes
            for row in rows if size else ():
                device_row = Buffer.from_handle(int(allocation.handle) + row * size, size, owner=allocation)
                host_row = Buffer.from_handle(buffer.initial_row.ctypes.data, size, owner=buffer.initial_row)
                device_row.copy_from(host_row, stream=self._session._stream)
        self._session._stream.sync()

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Return a copy of the state called `name`, (batch, ...)."""
        import numpy as np
        from cuda.core import Buffer

        with self._session._exclusive_context():
            buffer = self._buffers[name]
            array = np.empty(buffer.shape, buffer.initial_row.dtype)
            if array.nbytes:
                host = Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array)
                buffer.allocations[0].copy_to(host, stream=self._session._stream)
                self._session._stream.sync()
            return array

    def close(self) -> None:
        """Free the memory of the states."""
        self._buffers.clear()


@dataclass(frozen=True, kw_only=True)
class _EngineStateBuffer:
    """A state and its GPU memory."""

    initial_state: tuple[tuple[int, ...], str, float]
    """The shape, the element type and the initial value; states are shared only if these are equal."""
    shape: tuple[int, ...]
    initial_row: np.ndarray[Any, Any]
    """The initial value of one row, in host memory."""
    allocations: list[Any]
    """One or two device buffers: the next step reads the first and writes the last."""


class _InputTensor:
    """An input as passed by the caller: a tensor on the GPU, or a host array."""

    def __init__(self, value: Any, spec: TensorSpec, stream: int) -> None:
        from cuda.core.utils import StridedMemoryView

        self.array: np.ndarray[Any, Any] | None = None
        on_gpu = hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] == 2  # kDLCUDA
        if on_gpu:
            self.view = view = StridedMemoryView.from_dlpack(value, stream)
            if not _is_contiguous(view):
                raise BackendError(f"`{spec.name}` is not contiguous", hint=f"pass {spec.name}.contiguous()")
            check_tensor(_ViewInfo(view), spec)
            self.shape, self.pointer = tuple(view.shape), int(view.ptr)
        else:
            import numpy as np

            array = to_host_array(value, spec)
            check_tensor(array, spec)
            self.array = np.ascontiguousarray(array).reshape(array.shape)
            self.shape, self.pointer = self.array.shape, self.array.ctypes.data


def _is_contiguous(view: Any) -> bool:
    """Return whether the elements are in C order without gaps; an axis of size 1 may have any stride, None means C order."""
    if view.strides is None or 0 in view.shape:
        return True
    expected_stride = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != expected_stride:
            return False
        expected_stride *= size
    return True


class _ViewInfo:
    """The attributes of a GPU view that `check_tensor` reads."""

    def __init__(self, view: Any) -> None:
        self.dtype, self.shape, self.ndim = view.dtype, tuple(view.shape), len(view.shape)


def _numpy_dtype(dtype: str) -> np.dtype[Any]:
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
