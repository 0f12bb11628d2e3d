"""Run an engine on the GPU of this machine: contexts, shapes, memory; for TensorRT and TensorRT for RTX alike.

Nothing here was executed where it was developed, which has no GPU: what is proved there is that every attribute it uses
exists in NVIDIA's bindings, and that without a driver it ends in one clear error.
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
from ryzen_compile.spec.interface import StateSpec, TensorSpec
from ryzen_compile.spec.profile import Profile, select_profile
from ryzen_compile.spec.target import detect_gpus

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.backends.api import StateBinding
    from ryzen_compile.spec.passes import Inputs

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
"""TensorRT's element types that a caller can hold in an array -> numpy's names."""

ContextFactory = Callable[[Any, Path | None], tuple[Any, Callable[[], None]]]
"""Makes an execution context of an engine, given a folder for what loading makes; also returns what to do at the end."""


@contextlib.contextmanager
def open_session(trt: Any, path: str, cache_dir: Path | None, context_factory: ContextFactory) -> Iterator[EngineSession]:
    """Load the engine at `path` and make it ready; raises BackendError where it cannot be."""
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
            f"`{path}` cannot be loaded on this {device.name}: {log.error_summary() or 'the library gives no reason'}",
            hint=f"build it for this GPU: --gpu sm{device.arch}",
        )
    context, leave = context_factory(engine, cache_dir)
    if context is None:
        raise BackendError(f"`{path}` cannot be made ready on this {device.name}: {log.error_summary()}")
    session = EngineSession(trt, path, device, engine, context, log)
    try:
        yield session
    finally:
        session.close()
        leave()


def _current_device(path: str) -> Any:
    if not detect_gpus():
        raise BackendError(
            f"`{path}` needs an NVIDIA GPU and its driver, and there is none here",
            hint="run it on a machine that has one, or run the portable graph on the CPU",
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
    """A loaded engine. Calls from several threads take turns: a context runs one inference at a time."""

    def __init__(self, trt: Any, path: str, device: Any, engine: Any, context: Any, log: BuilderLog) -> None:
        """Describe the inputs, outputs and profiles of `engine`."""
        self.path = path
        self._trt, self._device, self._engine, self._context, self._log = trt, device, engine, context, log
        names = [engine.get_tensor_name(at) for at in range(engine.num_io_tensors)]
        reads = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs = tuple(self._tensor_spec(name) for name in reads)
        self.outputs = tuple(self._tensor_spec(name) for name in names if name not in reads)
        self.profiles = tuple(self._profile(at) for at in range(engine.num_optimization_profiles))
        self._stream = device.create_stream()
        self._lock = threading.Lock()
        self._closed = False

    def _tensor_spec(self, name: str) -> TensorSpec:
        shape = tuple(self._engine.get_tensor_shape(name))
        word = self._engine.get_tensor_dtype(name).name
        if word not in _DTYPES:
            raise BackendError(f"`{self.path}`: `{name}` is {word}, which no array can hold")
        dims = tuple(size if size >= 0 else f"{name}.{axis}" for axis, size in enumerate(shape))
        return TensorSpec(name=name, dtype=_DTYPES[word], dims=dims)

    def _profile(self, index: int) -> Profile:
        sides = {spec.name: self._engine.get_tensor_profile_shape(spec.name, index) for spec in self.inputs}
        low, opt, high = ({name: tuple(shapes[side]) for name, shapes in sides.items()} for side in range(3))
        return Profile(min=low, opt=opt, max=high)

    def run(self, inputs: Inputs) -> Inputs:
        """Run once. Tensors on this GPU are read where they lie, through DLPack; outputs are arrays on the host.

        Raises ShapeError for a feed that fits no profile, BackendError where the GPU fails.
        """
        check_input_names(inputs, self.inputs)
        with self._exclusive_context():
            given = self._prepare_inputs(inputs, self.inputs)
            self._select_profile({name: tensor.shape for name, tensor in given.items()})
            held = [self._bind_input(name, tensor) for name, tensor in given.items()]
            found = self._execute({spec: self._output_allocator() for spec in self.outputs})
            del held
            return found

    def bind_states(
        self, states: Sequence[StateSpec], shapes: Mapping[str, tuple[int, ...]], *, share_with: StateBinding | None = None
    ) -> EngineStateBinding:
        """Make room for `states` on the GPU, or take that of `beside`."""
        if share_with is not None and not isinstance(share_with, EngineStateBinding):
            raise BackendError("states of another backend cannot be shared", hint="serve both graphs by one backend")
        return EngineStateBinding(self, states, shapes, share_with)

    @contextlib.contextmanager
    def _exclusive_context(self) -> Iterator[None]:
        """Have the context to oneself; raises BackendError once the engine is closed."""
        with self._lock:
            if self._closed:
                raise BackendError(f"`{self.path}` is closed", hint="run inside the `with` that opened it")
            self._device.set_current()
            yield

    def _prepare_inputs(self, inputs: Inputs, specs: Sequence[TensorSpec]) -> dict[str, _InputTensor]:
        return {spec.name: _InputTensor(inputs[spec.name], spec, int(self._stream.handle)) for spec in specs}

    def _execute(self, outputs: Mapping[TensorSpec, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Run what is bound and return `outputs` on the host; each lies where its allocator puts it."""
        from cuda.core import Buffer

        for spec, allocator in outputs.items():
            self._context.set_output_allocator(spec.name, allocator)
        insufficient = self._context.infer_shapes()
        if insufficient or not self._context.execute_async_v3(int(self._stream.handle)):
            raise BackendError(f"`{self.path}` failed: {self._log.error_summary() or insufficient}")
        found: dict[str, np.ndarray[Any, Any]] = {}
        for spec, allocator in outputs.items():
            found[spec.name] = array = allocator.array(spec)
            if array.nbytes:
                there = Buffer.from_handle(int(allocator.buffer.handle), array.nbytes, owner=allocator.buffer)
                there.copy_to(Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array), stream=self._stream)
        self._stream.sync()
        return found

    def _select_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        at = self.profiles.index(select_profile(self.profiles, shapes))
        if at != self._context.active_optimization_profile:
            self._context.set_optimization_profile_async(at, int(self._stream.handle))
            self._stream.sync()

    def _bind_input(self, name: str, tensor: _InputTensor) -> object:
        """Tell the context where an input lies, and return what must live until the run ends."""
        from cuda.core import Buffer

        if not self._context.set_input_shape(name, tensor.shape):
            raise BackendError(f"`{self.path}` does not take `{name}` as {tensor.shape}: {self._log.error_summary()}")
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
            raise BackendError(f"`{self.path}` does not take `{state.input}` as {buffer.shape}: {self._log.error_summary()}")
        self._context.set_tensor_address(state.input, int(buffer.allocations[0].handle))
        self._context.set_output_allocator(state.output, None)
        self._context.set_tensor_address(state.output, int(buffer.allocations[-1].handle))

    def _output_allocator(self) -> Any:
        """Return what the context asks for an output's memory once it knows the size: outputs may depend on data."""
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
        """Let the engine go; waits for the run that is under way."""
        with self._lock:
            self._closed = True
            self._context = self._engine = None
            self._stream.close()


class EngineStateBinding:
    """States in the memory of a GPU, and steps over them, which take turns with the other runs of the engine.

    An output that the engine writes over an input has that input's memory. Any other state has two that swap at each step,
    `State.in_place` or not: in which order an engine reads and writes is its own matter. Several engines may step over the
    same memory, in turns; the second one of a state is there while one of those that need it has its turn.
    """

    def __init__(
        self,
        session: EngineSession,
        states: Sequence[StateSpec],
        shapes: Mapping[str, tuple[int, ...]],
        share_with: EngineStateBinding | None = None,
    ) -> None:
        """Allocate the states, or take those of `beside`; `shapes` holds theirs by the names of their inputs."""
        self._session, self._states = session, tuple(states)
        carried, written = {state.input for state in states}, {state.output for state in states}
        self._inputs = tuple(spec for spec in session.inputs if spec.name not in carried)
        self._outputs = {spec: session._output_allocator() for spec in session.outputs if spec.name not in written}
        dtypes = {spec.name: spec.dtype for spec in session.inputs}
        blanks = {state.name: (shapes[state.input], dtypes[state.input], state.initial_value) for state in states}
        with session._exclusive_context():
            aliased = session._engine.get_aliased_input_tensor
            self._buffer_counts = {state.name: 1 if aliased(state.output) == state.input else 2 for state in states}
            if share_with is not None:
                check_states_match(blanks, {name: held.initial_state for name, held in share_with._buffers.items()})
                self._buffers: dict[str, _EngineStateBuffer] = share_with._buffers
            else:
                self._buffers = {name: self._allocate(*blank) for name, blank in blanks.items()}
                self._fill_initial(range(next(iter(shapes.values()))[0]))

    def _allocate(self, shape: tuple[int, ...], dtype: str, initial: float) -> _EngineStateBuffer:
        import numpy as np

        row = np.full(shape[1:], initial, _numpy_dtype(dtype))
        held = _EngineStateBuffer(initial_state=(shape, dtype, initial), shape=shape, initial_row=row, allocations=[])
        self._resize(held, 1)
        return held

    def _resize(self, buffer: _EngineStateBuffer, count: int) -> None:
        """Have one memory or two."""
        del buffer.allocations[count:]
        while len(buffer.allocations) < count:
            size = max(buffer.shape[0] * buffer.initial_row.nbytes, 1)
            buffer.allocations.append(self._session._device.allocate(size, stream=self._session._stream))

    def run(self, inputs: Inputs) -> Inputs:
        """Run one step; outputs are arrays on the host that the caller owns."""
        check_input_names(inputs, self._inputs)
        session = self._session
        with session._exclusive_context():
            given = session._prepare_inputs(inputs, self._inputs)
            shapes = {name: tensor.shape for name, tensor in given.items()}
            session._select_profile(shapes | {state.input: self._buffers[state.name].shape for state in self._states})
            bound = [session._bind_input(name, tensor) for name, tensor in given.items()]
            for state in self._states:
                self._resize(self._buffers[state.name], self._buffer_counts[state.name])
                session._bind_state(state, self._buffers[state.name])
            found = session._execute(self._outputs)
            del bound
            for held in self._buffers.values():
                held.allocations.reverse()
            return found

    def reset(self, rows: Sequence[int]) -> None:
        """Set these rows of every state to its initial value."""
        with self._session._exclusive_context():
            self._fill_initial(rows)

    def _fill_initial(self, rows: Sequence[int]) -> None:
        from cuda.core import Buffer

        for held in self._buffers.values():
            size = held.initial_row.nbytes
            for row in rows if size else ():
                there = Buffer.from_handle(int(held.allocations[0].handle) + row * size, size, owner=held.allocations[0])
                there.copy_from(
                    Buffer.from_handle(held.initial_row.ctypes.data, size, owner=held.initial_row), stream=self._session._stream
                )
        self._session._stream.sync()

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Return a copy of the state called `name`."""
        import numpy as np
        from cuda.core import Buffer

        with self._session._exclusive_context():
            held = self._buffers[name]
            array = np.empty(held.shape, held.initial_row.dtype)
            if array.nbytes:
                host = Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array)
                held.allocations[0].copy_to(host, stream=self._session._stream)
                self._session._stream.sync()
            return array

    def close(self) -> None:
        """Give the memory of the states back."""
        self._buffers.clear()


@dataclass(frozen=True, kw_only=True)
class _EngineStateBuffer:
    """A state and its memory: what the next step reads comes first, what it writes last."""

    initial_state: tuple[tuple[int, ...], str, float]
    """Its shape, its element type and what it holds before the first step."""
    shape: tuple[int, ...]
    initial_row: np.ndarray[Any, Any]
    """What one of its rows holds before the first step, on the host."""
    allocations: list[Any]


class _InputTensor:
    """One input as the caller gave it: on the GPU, or an array on the host."""

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
    """Whether its elements lie in C order without gaps; an axis of size 1 may have any stride, None stands for C order."""
    if view.strides is None or 0 in view.shape:
        return True
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


class _ViewInfo:
    """The facts of a view on the GPU that a check of shapes asks for."""

    def __init__(self, view: Any) -> None:
        self.dtype, self.shape, self.ndim = view.dtype, tuple(view.shape), len(view.shape)


def _numpy_dtype(dtype: str) -> np.dtype[Any]:
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
