"""Steps of a decoder in ONNX Runtime: its states stay bound to memory where the graph computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ryzen_compile.backends.input_validation import arrays_of
from ryzen_compile.errors import BackendError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import State, TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.backends.onnxruntime.backend import OnnxRuntimeSession
    from ryzen_compile.spec.passes import Feed

BITS = {"bfloat16": 16, "float8_e4m3fn": 17, "float8_e4m3fnuz": 18, "float8_e5m2": 19, "float8_e5m2fnuz": 20}
"""Element types that numpy does not know by itself -> their number in ONNX."""


class OnnxRuntimeSteps:
    """States that stay bound to a graph, and steps over them.

    A state that may be written in place has one memory, any other has two that swap at each step. What else a step returns lies
    in ONNX Runtime's arena: where the caller lets go of it, the next step takes its memory.

    Several graphs may step over the same memory, in turns. The second memory of a state is made when a graph that needs it
    takes its turn, and given back when one that does not takes its: only a change of graphs costs that, and binding anew.
    """

    def __init__(
        self,
        session: OnnxRuntimeSession,
        states: Sequence[State],
        shapes: Mapping[str, tuple[int, ...]],
        beside: OnnxRuntimeSteps | None = None,
    ) -> None:
        """Allocate the states, or take those of `beside`; `shapes` holds theirs by the names of their inputs."""
        session.opened()
        self._session, self._states = session, tuple(states)
        self._binding: Any = None
        carried, written = {state.input for state in states}, {state.output for state in states}
        self._inputs = tuple(spec for spec in session.inputs if spec.name not in carried)
        self._outputs = tuple(spec for spec in session.outputs if spec.name not in written)
        dtypes = {spec.name: spec.dtype for spec in session.inputs}
        blanks = {
            state.name: _Blank(shape=shapes[state.input], dtype=numpy_dtype(dtypes[state.input]), fill=state.initial)
            for state in states
        }
        if beside is None:
            memory = _DeviceMemory if session.on_gpu else _HostMemory
            with session.failures():
                self._kept = _Kept({name: _Held(blank, memory) for name, blank in blanks.items()})
                self._turn()
        else:
            self._kept = beside._kept
            check_shared(blanks, {name: held.blank for name, held in self._kept.held.items()})

    def run(self, feed: Feed) -> Feed:
        """Run one step; outputs are arrays that the caller owns."""
        import numpy as np

        inner = self._session.opened()
        arrays = arrays_of(feed, self._inputs)
        with self._session.failures():
            binding = self._turn()
            for name, array in arrays.items():
                binding.bind_ortvalue_input(name, to_ort(np.asarray(array, order="C")))
            for spec in self._outputs:
                binding.bind_output(spec.name, "cpu")
            inner.run_with_iobinding(binding, self._session.run_options())
            found = binding.get_outputs()[len(self._states) :]
            swapping = [state for state in self._states if not state.in_place]
            for state in swapping:
                self._kept.held[state.name].swap()
            self._bind(swapping)
            return {spec.name: from_ort(value, spec) for spec, value in zip(self._outputs, found, strict=True)}

    def _turn(self) -> Any:
        """Return the binding of this graph to the states, made where another had its turn."""
        if self._binding is None:
            if self._kept.turn is not None:
                self._kept.turn._binding = None
            self._kept.turn = self
            for state in self._states:
                self._kept.held[state.name].make_room(1 if state.in_place else 2)
            self._binding = self._session.opened().io_binding()
            self._bind(self._states)
        return self._binding

    def _bind(self, states: Iterable[State]) -> None:
        for state in states:
            held = self._kept.held[state.name]
            self._binding.bind_ortvalue_input(state.input, held.now.value)
            self._binding.bind_ortvalue_output(state.output, held.after.value)

    def reset(self, rows: Sequence[int]) -> None:
        """Set these rows of every state to its initial value."""
        self._session.opened()
        with self._session.failures():
            for held in self._kept.held.values():
                held.now.write(rows, held.blank.fill)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Return a copy of the state called `name`."""
        self._session.opened()
        with self._session.failures():
            return self._kept.held[name].now.read()

    def close(self) -> None:
        """Give the memory of the states back."""
        self._kept.held.clear()
        self._kept.turn = self._binding = None


@dataclass(frozen=True, kw_only=True)
class _Blank:
    """A state before its first step."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: float

    def array(self) -> np.ndarray[Any, Any]:
        import numpy as np

        try:
            return np.full(self.shape, self.fill, self.dtype) if self.fill else np.zeros(self.shape, self.dtype)
        except MemoryError as error:
            raise BackendError(f"there is no room for a state: {error}", hint="ask for a smaller batch") from error


def check_shared(mine: Mapping[str, object], theirs: Mapping[str, object]) -> None:
    """Raise BackendError unless two graphs have states of the same names, shapes, types and initial values."""
    for name in {**mine, **theirs}:
        if mine.get(name) != theirs.get(name):
            raise BackendError(
                f"the state `{name}` is another in each of two graphs: {mine.get(name)} and {theirs.get(name)}",
                hint="build both of one model: ryzen-compile rewrite --steps 1,any",
            )


@dataclass
class _Kept:
    """The states of one or several graphs, by name."""

    held: dict[str, _Held]
    turn: OnnxRuntimeSteps | None = None
    """Whose graph is bound to them."""


class _Held:
    """A state and its memory: what the next step reads, and what it writes."""

    def __init__(self, blank: _Blank, memory: type[_HostMemory] | type[_DeviceMemory]) -> None:
        self.blank, self._memory = blank, memory
        self._places: list[_HostMemory | _DeviceMemory] = [memory(blank)]

    @property
    def now(self) -> _HostMemory | _DeviceMemory:
        """What the next step reads."""
        return self._places[0]

    @property
    def after(self) -> _HostMemory | _DeviceMemory:
        """What it writes: the same where there is one memory."""
        return self._places[-1]

    def make_room(self, places: int) -> None:
        """Have one memory or two."""
        if places < len(self._places):
            del self._places[places:]
        elif places > len(self._places):
            self._places.append(self._memory(self.blank))

    def swap(self) -> None:
        """Let the next step read what was written."""
        self._places.reverse()


class _HostMemory:
    """A tensor on the CPU: an array that ONNX Runtime works in."""

    def __init__(self, blank: _Blank) -> None:
        self._array = blank.array()
        self.value = to_ort(self._array)

    def write(self, rows: Sequence[int], fill: float) -> None:
        self._array[list(rows)] = fill

    def read(self) -> np.ndarray[Any, Any]:
        return self._array.copy()


class _DeviceMemory:
    """A tensor on the GPU. To write some of its rows is to copy all of it to the host and back."""

    def __init__(self, blank: _Blank, device: str = "cuda") -> None:
        import onnxruntime

        host = to_ort(blank.array())
        self._shape, self._dtype = blank.shape, blank.dtype
        self.value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(blank.shape), host.element_type(), device, 0)
        self.value.update_inplace(host)

    def write(self, rows: Sequence[int], fill: float) -> None:
        array = self.read()
        array[list(rows)] = fill
        self.value.update_inplace(to_ort(array))

    def read(self) -> np.ndarray[Any, Any]:
        import numpy as np

        array = np.empty(self._shape, self._dtype)
        to_ort(array).update_inplace(self.value)
        return array


def to_ort(array: np.ndarray[Any, Any]) -> Any:
    """Return an OrtValue on the CPU over the memory of `array`, which must outlive it."""
    import numpy as np
    import onnxruntime

    if array.dtype.name in BITS:
        bits = np.asarray(array, order="C").view(f"uint{8 * array.dtype.itemsize}")
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BITS[array.dtype.name])
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def from_ort(value: Any, spec: TensorSpec) -> np.ndarray[Any, Any]:
    """Return an OrtValue on the CPU as the array that `spec` describes."""
    import ctypes

    import ml_dtypes
    import numpy as np

    if spec.dtype not in BITS:
        found: np.ndarray[Any, Any] = value.numpy()
        return found
    dtype = np.dtype(getattr(ml_dtypes, spec.dtype))
    bits = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(bytearray(bits), dtype).reshape(value.shape())
