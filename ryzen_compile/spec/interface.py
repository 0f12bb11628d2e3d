"""Graph interfaces: the inputs, outputs and states of a graph, with their dims and value ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from ryzen_compile.spec.dims import Dim
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import numpy as np

Inputs = Mapping[str, "np.ndarray[Any, Any]"]
"""The input arrays of one run, by input name."""

Outputs = Mapping[str, "np.ndarray[Any, Any]"]
"""The output arrays of one run, by output name."""

RunFunction = Callable[[Inputs], Outputs]
"""Function that runs a graph or a module once; all arrays are in host memory."""

Role = Literal["values", "ids", "mask", "positions", "lengths", "state"]
"""The purpose of an input: `values` are arbitrary numbers within its range, `ids` index a table, a `mask` is 0 or 1 for each
element and separates valid elements from padding (`InputSpec.padding_value`), `positions` are 0, 1, 2, ... along the last
axis, `lengths` count the valid elements of each row (`InputSpec.length_dim`), `state` is the output of an earlier step."""

PaddingValue = Literal[0, 1]
"""The value of a mask that marks padding: 0 in Transformers, 1 (true) in the `key_padding_mask` of PyTorch."""


class TensorSpec(Record, frozen=True):
    """A named input or output tensor of a graph."""

    name: str
    dtype: str
    """Element type by its numpy name: `float32`, `bfloat16`, `int64`, `bool`, `string`."""
    dims: tuple[Dim, ...] | None
    """Dims, outermost first; None if the rank is unknown."""

    @property
    def is_dynamic(self) -> bool:
        """Whether any dim is dynamic."""
        return self.dims is None or any(isinstance(dim, str) for dim in self.dims)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.dims)) if self.dims is not None else '...'}]"


class InputSpec(TensorSpec, frozen=True):
    """An input and its valid values: the contract shared by export, calibration and comparison."""

    role: Role = "values"
    low: float | None = None
    """The smallest valid value; None: -1 for floats, 0 for integers."""
    high: float | None = None
    """The largest valid value, inclusive; None: 1."""
    padding_value: PaddingValue | None = None
    """The value of a mask that marks padding; None: unknown, or not a mask. With an unknown value no element is treated as
    padding."""

    length_dim: str | None = None
    """The dim of another input along which `lengths` count elements, from 1 to its size; None: not lengths."""

    @property
    def valid_value(self) -> PaddingValue:
        """The value of a mask that marks valid elements: 1 unless 1 is known to mark padding."""
        return 0 if self.padding_value == 1 else 1

    @property
    def is_padding_mask(self) -> bool:
        """Whether it states for each row which elements are padding: (rows, elements), possibly with axes of size 1 between.

        Masks of pairs of elements, such as (seq, seq), do not.
        """
        dims = self.dims or ()
        return self.padding_value is not None and len(dims) > 1 and dims[0] != dims[-1] and all(dim == 1 for dim in dims[1:-1])


_Spec = TypeVar("_Spec", bound=TensorSpec)


class StateSpec(Record, frozen=True):
    """A tensor carried across steps: each step reads it from one input and writes it to one output.

    Before the first step every element is `initial_value`.
    """

    name: str
    input: str
    output: str
    append_axis: int | None = None
    """The axis along which each step appends, or None if the shape is fixed."""
    initial_value: float = 0.0
    in_place: bool = False
    """Whether the output may overwrite the input buffer: every read of the input precedes the write."""


class Interface(Record, frozen=True):
    """The inputs, outputs, states and dim ranges of a graph: everything that a caller needs to run it."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...] = ()
    batch: str | None = None
    """The name of the batch dim, along which rows are independent; None if there is none."""
    task: Literal["embedding", "classifier", "language-model"] | None = None
    """The kind of model, if known; outputs of the last two kinds are also compared by top-1."""
    typical_sizes: dict[str, int] = {}
    """The typical size of each dynamic dim, by name; engines are tuned for these sizes."""
    min_sizes: dict[str, int] = {}
    """The smallest size of each dynamic dim, by name; dims that are not listed start at 1."""
    max_sizes: dict[str, int] = {}
    """The largest size of each dynamic dim, by name; the upper bound of derived profiles."""
    capacity: int | None = None
    """The maximum number of tokens of a sequence: the slots of caches that drop no token, or the number of positions that the
    model has; None: unbounded."""
    decoder_group: str | None = None
    """An identifier shared by the step graphs of one decoder, which `rewrite --steps` writes over the same states; None: the
    graph has no other step graphs."""

    def input(self, name: str) -> InputSpec:
        """Return the input called `name`. Raises KeyError if there is none."""
        return {spec.name: spec for spec in self.inputs}[name]

    def batch_axis(self, spec: TensorSpec) -> int | None:
        """Return the batch axis of a tensor, or None if it has no batch axis."""
        if self.batch is None or spec.dims is None or self.batch not in spec.dims:
            return None
        return spec.dims.index(self.batch)

    def batch_size(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the size of the batch dim in the shapes of inputs by name; 1 without a batch dim."""
        axes = {spec.name: self.batch_axis(spec) for spec in self.inputs if spec.name in shapes}
        return next((int(shapes[name][axis]) for name, axis in axes.items() if axis is not None), 1)


def with_dtypes(interface: Interface, dtypes: Mapping[str, str]) -> Interface:
    """Return `interface` with the element types of the inputs and outputs named in `dtypes` replaced."""

    def with_dtype(spec: _Spec) -> _Spec:
        return msgspec.structs.replace(spec, dtype=dtypes.get(spec.name, spec.dtype))

    inputs, outputs = tuple(map(with_dtype, interface.inputs)), tuple(map(with_dtype, interface.outputs))
    return msgspec.structs.replace(interface, inputs=inputs, outputs=outputs)


def find_interface_problem(interface: Interface) -> str | None:
    """Return why an interface from a file cannot be used, or None: its states and sizes must refer to what it declares."""
    inputs = {spec.name: spec for spec in interface.inputs}
    outputs = {spec.name for spec in interface.outputs}
    if len(inputs) < len(interface.inputs):
        return "two inputs have one name"
    for state in interface.states:
        if state.input not in inputs or state.output not in outputs:
            return (
                f"state `{state.name}` has the input `{state.input}` and the output `{state.output}`, which do not both exist"
            )
        dims = inputs[state.input].dims
        if state.append_axis is not None and (dims is None or not 0 <= state.append_axis < len(dims)):
            return f"state `{state.name}` appends along axis {state.append_axis} of `{inputs[state.input]}`"
    for sizes in (interface.typical_sizes, interface.min_sizes, interface.max_sizes):
        for name, size in sizes.items():
            if size < 0:
                return f"dim `{name}` has the size {size}"
    known: set[Dim | None] = {None, *(dim for spec in interface.inputs for dim in spec.dims or ())}
    for spec in interface.inputs:
        if spec.length_dim not in known or (spec.role == "lengths") != (spec.length_dim is not None):
            return f"input `{spec.name}` has the role {spec.role} and counts elements along `{spec.length_dim}`"
    return None
