"""Steps of a decoder in ONNX Runtime: its states stay bound to memory where the graph computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ryzen_compile.backends.input_validation import to_host_arrays
from ryzen_compile.errors import BackendError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import StateSpec, TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.backends.onnxruntime.backend import OnnxRuntimeSession
    from ryzen_compile.spec.passes import Inputs

ONNX_DATA_TYPES = {"bfloat16": 16, "float8_e4m3fn": 17, "float8_e4m3fnuz": 18, "float8_e5m2": 19, "float8_e5m2fnuz": 20}
"""Element types that numpy does not know by itself -> their number in ONNX."""


class OnnxRuntimeStateBinding:
    """States that stay bound to a graph, and steps over them.

    A state that may be written in place has one memory, any other has two that swap at each step. What else a step returns lies
    in ONNX Runtime's arena: where the caller lets go of it, the next step takes its memory.

    Several graphs may step over the same memory, in turns. The second memory of a state is made when a graph that needs it
    takes its turn, and given back when one that does not takes its: only a change of graphs costs that, and binding anew.
    """

    def __init__(
        self,
        session: OnnxRuntimeSession,
        states: Sequence[StateSpec],
        shapes: Mapping[str, tuple[int, ...]],
        share_with: OnnxRuntimeStateBinding | None = None,
    ) -> None:
        """Allocate the states, or take those of `beside`; `shapes` holds theirs by the names of their inputs."""
        session.inference_session()
        self._session, self._states = session, tuple(states)
        self._binding: Any = None
        carried, written = {state.input for state in states}, {state.output for state in states}
        self._inputs = tuple(spec for spec in session.inputs if spec.name not in carried)
        self._outputs = tuple(spec for spec in session.outputs if spec.name not in written)
        dtypes = {spec.name: spec.dtype for spec in session.inputs}
        blanks = {
            state.name: _InitialState(
                shape=shapes[state.input], dtype=numpy_dtype(dtypes[state.input]), fill_value=state.initial_value
            )
            for state in states
        }
        if share_with is None:
            memory = _DeviceBuffer if session.on_gpu else _HostBuffer
            with session.translate_errors():
                self._state_buffers = _StateBuffers({name: _DoubleBuffer(blank, memory) for name, blank in blanks.items()})
                self._activate()
        else:
            self._state_buffers = share_with._state_buffers
            check_states_match(blanks, {name: held.initial_state for name, held in self._state_buffers.buffers.items()})

    def run(self, inputs: Inputs) -> Inputs:
        """Run one step; outputs are arrays that the caller owns."""
        import numpy as np

        inner = self._session.inference_session()
        arrays = to_host_arrays(inputs, self._inputs)
        with self._session.translate_errors():
            binding = self._activate()
            for name, array in arrays.items():
                binding.bind_ortvalue_input(name, to_ort_value(np.asarray(array, order="C")))
            for spec in self._outputs:
                binding.bind_output(spec.name, "cpu")
            inner.run_with_iobinding(binding, self._session.run_options())
            found = binding.get_outputs()[len(self._states) :]
            swapping = [state for state in self._states if not state.in_place]
            for state in swapping:
                self._state_buffers.buffers[state.name].swap()
            self._bind_states(swapping)
            return {spec.name: from_ort_value(value, spec) for spec, value in zip(self._outputs, found, strict=True)}

    def _activate(self) -> Any:
        """Return the binding of this graph to the states, made where another had its turn."""
        if self._binding is None:
            if self._state_buffers.active is not None:
                self._state_buffers.active._binding = None
            self._state_buffers.active = self
            for state in self._states:
                self._state_buffers.buffers[state.name].resize(1 if state.in_place else 2)
            self._binding = self._session.inference_session().io_binding()
            self._bind_states(self._states)
        return self._binding

    def _bind_states(self, states: Iterable[StateSpec]) -> None:
        for state in states:
            held = self._state_buffers.buffers[state.name]
            self._binding.bind_ortvalue_input(state.input, held.read_buffer.ort_value)
            self._binding.bind_ortvalue_output(state.output, held.write_buffer.ort_value)

    def reset(self, rows: Sequence[int]) -> None:
        """Set these rows of every state to its initial value."""
        self._session.inference_session()
        with self._session.translate_errors():
            for held in self._state_buffers.buffers.values():
                held.read_buffer.write(rows, held.initial_state.fill_value)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Return a copy of the state called `name`."""
        self._session.inference_session()
        with self._session.translate_errors():
            return self._state_buffers.buffers[name].read_buffer.read()

    def close(self) -> None:
        """Give the memory of the states back."""
        self._state_buffers.buffers.clear()
        self._state_buffers.active = self._binding = None


@dataclass(frozen=True, kw_only=True)
class _InitialState:
    """A state before its first step."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill_value: float

    def to_array(self) -> np.ndarray[Any, Any]:
        import numpy as np

        try:
            return np.full(self.shape, self.fill_value, self.dtype) if self.fill_value else np.zeros(self.shape, self.dtype)
        except MemoryError as error:
            raise BackendError(f"there is no room for a state: {error}", hint="ask for a smaller batch") from error


def check_states_match(own: Mapping[str, object], shared: Mapping[str, object]) -> None:
    """Raise BackendError unless two graphs have states of the same names, shapes, types and initial values."""
    for name in {**own, **shared}:
        if own.get(name) != shared.get(name):
            raise BackendError(
                f"the state `{name}` is another in each of two graphs: {own.get(name)} and {shared.get(name)}",
                hint="build both of one model: ryzen-compile rewrite --steps 1,any",
            )


@dataclass
class _StateBuffers:
    """The states of one or several graphs, by name."""

    buffers: dict[str, _DoubleBuffer]
    active: OnnxRuntimeStateBinding | None = None
    """Whose graph is bound to them."""


class _DoubleBuffer:
    """A state and its memory: what the next step reads, and what it writes."""

    def __init__(self, initial_state: _InitialState, buffer_type: type[_HostBuffer] | type[_DeviceBuffer]) -> None:
        self.initial_state, self._buffer_type = initial_state, buffer_type
        self._buffers: list[_HostBuffer | _DeviceBuffer] = [buffer_type(initial_state)]

    @property
    def read_buffer(self) -> _HostBuffer | _DeviceBuffer:
        """What the next step reads."""
        return self._buffers[0]

    @property
    def write_buffer(self) -> _HostBuffer | _DeviceBuffer:
        """What it writes: the same where there is one memory."""
        return self._buffers[-1]

    def resize(self, count: int) -> None:
        """Have one memory or two."""
        if count < len(self._buffers):
            del self._buffers[count:]
        elif count > len(self._buffers):
            self._buffers.append(self._buffer_type(self.initial_state))

    def swap(self) -> None:
        """Let the next step read what was written."""
        self._buffers.reverse()


class _HostBuffer:
    """A tensor on the CPU: an array that ONNX Runtime works in."""

    def __init__(self, initial_state: _InitialState) -> None:
        self._array = initial_state.to_array()
        self.ort_value = to_ort_value(self._array)

    def write(self, rows: Sequence[int], fill_value: float) -> None:
        self._array[list(rows)] = fill_value

    def read(self) -> np.ndarray[Any, Any]:
        return self._array.copy()


class _DeviceBuffer:
    """A tensor on the GPU. To write some of its rows is to copy all of it to the host and back."""

    def __init__(self, initial_state: _InitialState, device: str = "cuda") -> None:
        import onnxruntime

        host = to_ort_value(initial_state.to_array())
        self._shape, self._dtype = initial_state.shape, initial_state.dtype
        self.ort_value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            list(initial_state.shape), host.element_type(), device, 0
        )
        self.ort_value.update_inplace(host)

    def write(self, rows: Sequence[int], fill_value: float) -> None:
        array = self.read()
        array[list(rows)] = fill_value
        self.ort_value.update_inplace(to_ort_value(array))

    def read(self) -> np.ndarray[Any, Any]:
        import numpy as np

        array = np.empty(self._shape, self._dtype)
        to_ort_value(array).update_inplace(self.ort_value)
        return array


def to_ort_value(array: np.ndarray[Any, Any]) -> Any:
    """Return an OrtValue on the CPU over the memory of `array`, which must outlive it."""
    import numpy as np
    import onnxruntime

    if array.dtype.name in ONNX_DATA_TYPES:
        bits = np.asarray(array, order="C").view(f"uint{8 * array.dtype.itemsize}")
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_DATA_TYPES[array.dtype.name])
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def from_ort_value(value: Any, spec: TensorSpec) -> np.ndarray[Any, Any]:
    """Return an OrtValue on the CPU as the array that `spec` describes."""
    import ctypes

    import ml_dtypes
    import numpy as np

    if spec.dtype not in ONNX_DATA_TYPES:
        found: np.ndarray[Any, Any] = value.numpy()
        return found
    dtype = np.dtype(getattr(ml_dtypes, spec.dtype))
    bits = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(bytearray(bits), dtype).reshape(value.shape())
