"""Decoding steps in ONNX Runtime, with states that stay in device memory, bound to the graph by an IOBinding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ryzen_compile.backends.input_validation import to_host_arrays
from ryzen_compile.errors import BackendError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import Inputs, Outputs, StateSpec, TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.backends.onnxruntime.backend import OnnxRuntimeSession

ONNX_DATA_TYPES = {"bfloat16": 16, "float8_e4m3fn": 17, "float8_e4m3fnuz": 18, "float8_e5m2": 19, "float8_e5m2fnuz": 20}
"""Element types that numpy itself does not have -> their number in `onnx.TensorProto.DataType`."""


class OnnxRuntimeStateBinding:
    """The states of a decoder, bound to a graph, and steps over them.

    A state with `StateSpec.in_place` has one buffer, any other state has two buffers that are swapped at each step. The other
    outputs of a step are allocated in ONNX Runtime's arena; a later step reuses their memory once the caller has released them.

    Several graphs may step alternately over the same states. The second buffer of a state is allocated when a graph that needs
    it becomes active, and freed when a graph that does not need it becomes active. Only a change of the active graph has this
    cost, and the cost of a new IOBinding.
    """

    def __init__(
        self,
        session: OnnxRuntimeSession,
        states: Sequence[StateSpec],
        shapes: Mapping[str, tuple[int, ...]],
        share_with: OnnxRuntimeStateBinding | None = None,
    ) -> None:
        """Allocate the states, or use those of `share_with`; `shapes` holds {state input name: shape}."""
        session.inference_session()
        self._session, self._states = session, tuple(states)
        self._binding: Any = None
        state_inputs, state_outputs = {state.input for state in states}, {state.output for state in states}
        self._inputs = tuple(spec for spec in session.inputs if spec.name not in state_inputs)
        self._outputs = tuple(spec for spec in session.outputs if spec.name not in state_outputs)
        dtypes = {spec.name: spec.dtype for spec in session.inputs}
        initial_states = {
            state.name: _InitialState(
                shape=shapes[state.input], dtype=numpy_dtype(dtypes[state.input]), fill_value=state.initial_value
            )
            for state in states
        }
        if share_with is None:
            buffer_type = _DeviceBuffer if session.on_gpu else _HostBuffer
            with session.translate_errors():
                self._state_buffers = _StateBuffers(
                    {name: _DoubleBuffer(initial_state, buffer_type) for name, initial_state in initial_states.items()}
                )
                self._activate()
        else:
            self._state_buffers = share_with._state_buffers
            check_states_match(
                initial_states, {name: buffer.initial_state for name, buffer in self._state_buffers.buffers.items()}
            )

    def run(self, inputs: Inputs) -> Outputs:
        """Run one step and return arrays, owned by the caller, by name."""
        import numpy as np

        inference_session = self._session.inference_session()
        arrays = to_host_arrays(inputs, self._inputs)
        with self._session.translate_errors():
            binding = self._activate()
            for name, array in arrays.items():
                binding.bind_ortvalue_input(name, to_ort_value(np.asarray(array, order="C")))
            for spec in self._outputs:
                binding.bind_output(spec.name, "cpu")
            inference_session.run_with_iobinding(binding, self._session.run_options())
            results = binding.get_outputs()[len(self._states) :]
            double_buffered = [state for state in self._states if not state.in_place]
            for state in double_buffered:
                self._state_buffers.buffers[state.name].swap()
            self._bind_states(double_buffered)
            return {spec.name: from_ort_value(value, spec) for spec, value in zip(self._outputs, results, strict=True)}

    def _activate(self) -> Any:
        """Return the IOBinding of this graph to the states; create it if another graph was active."""
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
            buffer = self._state_buffers.buffers[state.name]
            self._binding.bind_ortvalue_input(state.input, buffer.read_buffer.ort_value)
            self._binding.bind_ortvalue_output(state.output, buffer.write_buffer.ort_value)

    def reset(self, rows: Sequence[int]) -> None:
        """Set `rows` of every state to their initial value."""
        self._session.inference_session()
        with self._session.translate_errors():
            for buffer in self._state_buffers.buffers.values():
                buffer.read_buffer.write(rows, buffer.initial_state.fill_value)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Return a copy of the state called `name`, (batch, ...)."""
        self._session.inference_session()
        with self._session.translate_errors():
            return self._state_buffers.buffers[name].read_buffer.read()

    def close(self) -> None:
        """Free the memory of the states."""
        self._state_buffers.buffers.clear()
        self._state_buffers.active = self._binding = None


@dataclass(frozen=True, kw_only=True)
class _InitialState:
    """The shape, the element type and the initial value of a state."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill_value: float

    def to_array(self) -> np.ndarray[Any, Any]:
        import numpy as np

        try:
            return np.full(self.shape, self.fill_value, self.dtype) if self.fill_value else np.zeros(self.shape, self.dtype)
        except MemoryError as error:
            raise BackendError(f"a state does not fit into memory: {error}", hint="use a smaller batch") from error


def check_states_match(own: Mapping[str, object], shared: Mapping[str, object]) -> None:
    """Raise BackendError unless two graphs have states of the same names, shapes, types and initial values."""
    for name in {**own, **shared}:
        if own.get(name) != shared.get(name):
            raise BackendError(
                f"the state `{name}` differs between two graphs: {own.get(name)} and {shared.get(name)}",
                hint="create both graphs from one model: ryzen-compile rewrite --steps 1,any",
            )


@dataclass
class _StateBuffers:
    """The buffers of the states of one or several graphs, by state name."""

    buffers: dict[str, _DoubleBuffer]
    active: OnnxRuntimeStateBinding | None = None
    """The binding whose graph is bound to the buffers; None before the first step and after closing."""


class _DoubleBuffer:
    """A state and its buffers: the one that the next step reads, and the one that it writes."""

    def __init__(self, initial_state: _InitialState, buffer_type: type[_HostBuffer] | type[_DeviceBuffer]) -> None:
        self.initial_state, self._buffer_type = initial_state, buffer_type
        self._buffers: list[_HostBuffer | _DeviceBuffer] = [buffer_type(initial_state)]

    @property
    def read_buffer(self) -> _HostBuffer | _DeviceBuffer:
        """The buffer that the next step reads."""
        return self._buffers[0]

    @property
    def write_buffer(self) -> _HostBuffer | _DeviceBuffer:
        """The buffer that the next step writes; the read buffer if there is only one."""
        return self._buffers[-1]

    def resize(self, count: int) -> None:
        """Set the number of buffers to `count`, 1 or 2."""
        if count < len(self._buffers):
            del self._buffers[count:]
        elif count > len(self._buffers):
            self._buffers.append(self._buffer_type(self.initial_state))

    def swap(self) -> None:
        """Let the next step read the buffer that was written last."""
        self._buffers.reverse()


class _HostBuffer:
    """A tensor on the CPU: an array that ONNX Runtime reads and writes directly."""

    def __init__(self, initial_state: _InitialState) -> None:
        self._array = initial_state.to_array()
        self.ort_value = to_ort_value(self._array)

    def write(self, rows: Sequence[int], fill_value: float) -> None:
        self._array[list(rows)] = fill_value

    def read(self) -> np.ndarray[Any, Any]:
        return self._array.copy()


class _DeviceBuffer:
    """A tensor on the GPU. Writing some rows copies the whole tensor to the host and back."""

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
    """Return an OrtValue on the CPU that shares the memory of `array`; `array` must outlive it."""
    import numpy as np
    import onnxruntime

    if array.dtype.name in ONNX_DATA_TYPES:
        bits = np.asarray(array, order="C").view(f"uint{8 * array.dtype.itemsize}")
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_DATA_TYPES[array.dtype.name])
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def from_ort_value(value: Any, spec: TensorSpec) -> np.ndarray[Any, Any]:
    """Return an OrtValue on the CPU as an array of the element type of `spec`."""
    import ctypes

    import ml_dtypes
    import numpy as np

    if spec.dtype not in ONNX_DATA_TYPES:
        array: np.ndarray[Any, Any] = value.numpy()
        return array
    dtype = np.dtype(getattr(ml_dtypes, spec.dtype))
    bits = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(bytearray(bits), dtype).reshape(value.shape())
