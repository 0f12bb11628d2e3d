"""The outside of a graph: its inputs, outputs and states, and what values they may take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

import msgspec

from ryzen_compile.utils.record import Record

Dim = int | str
"""A size, the name of one that is only known at run time, or a sum of such: `past+seq`, `past+1`."""

Role = Literal["values", "ids", "mask", "positions", "state"]
"""What an input is for: `values` are any numbers of its range, `ids` index a table, `mask` is 1 for what counts and 0
for padding (a prefix of each row counts), `positions` are 0, 1, 2, ... along the last axis, `state` is what an
earlier step left."""


class TensorSpec(Record, frozen=True):
    """A named tensor at the border of a graph."""

    name: str
    dtype: str
    """The element type by its numpy name: `float32`, `bfloat16`, `int64`, `bool`, `string`."""
    dims: tuple[Dim, ...] | None
    """The sizes, outermost first; None when even the rank is unknown."""

    @property
    def is_dynamic(self) -> bool:
        """Whether a size is only known at run time."""
        return self.dims is None or any(isinstance(dim, str) for dim in self.dims)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.dims)) if self.dims is not None else '...'}]"


class InputSpec(TensorSpec, frozen=True):
    """An input and the values that mean something to it: the contract that export, calibration and comparison share."""

    role: Role = "values"
    low: float | None = None
    """The smallest value that means something; None: -1 for floats, 0 for integers."""
    high: float | None = None
    """The largest value that means something, inclusive; None: 1."""


_Spec = TypeVar("_Spec", bound=TensorSpec)


class StateSpec(Record, frozen=True):
    """A tensor that lives across steps: read from one input, written to one output, zero steps old at `initial`."""

    name: str
    input: str
    output: str
    append_axis: int | None = None
    """The axis along which each step appends, or None for a fixed shape."""
    initial_value: float = 0.0
    in_place: bool = False
    """Whether the output may be written over the input: whatever reads the input is done before it is written."""


class Interface(Record, frozen=True):
    """All that a caller of a graph needs to know."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...] = ()
    batch: str | None = None
    """The name of the dimension along which rows are independent of each other, when there is one."""
    task: Literal["embedding", "classifier", "language-model"] | None = None
    """What the outputs are, when it is known: the last two are also compared by their top-1."""
    typical_sizes: dict[str, int] = {}
    """The usual size of each dynamic dimension, by its name: what engines are tuned for."""
    min_sizes: dict[str, int] = {}
    """The smallest size of each dynamic dimension, by its name, where that is not 1."""
    max_sizes: dict[str, int] = {}
    """The largest size of each dynamic dimension, by its name: what bounds derived profiles."""
    capacity: int | None = None
    """How many tokens a sequence may have in all, for caches that do not evict; None: no bound."""
    decoder_group: str | None = None
    """What graphs share that are steps of one decoder over the same states, `rewrite --steps` wrote them; None: it is alone."""

    def input(self, name: str) -> InputSpec:
        """Return the input called `name`; raises KeyError."""
        return {spec.name: spec for spec in self.inputs}[name]

    def batch_axis(self, spec: TensorSpec) -> int | None:
        """Return the axis of a tensor along which rows are independent of each other, or None."""
        if self.batch is None or spec.dims is None or self.batch not in spec.dims:
            return None
        return spec.dims.index(self.batch)


def with_dtypes(interface: Interface, dtypes: Mapping[str, str]) -> Interface:
    """Return `interface` with the element types of `dtypes`, by the names of inputs and outputs; others keep theirs."""

    def of(spec: _Spec) -> _Spec:
        return msgspec.structs.replace(spec, dtype=dtypes.get(spec.name, spec.dtype))

    inputs, outputs = tuple(map(of, interface.inputs)), tuple(map(of, interface.outputs))
    return msgspec.structs.replace(interface, inputs=inputs, outputs=outputs)


def resolve_dim(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    """Return the size of `dim`, given those of the named dimensions; None where it is not given."""
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    words = [word.strip() for word in dim.split("+")]
    terms = [int(word) if word.isdecimal() else sizes.get(word) for word in words]
    known = [term for term in terms if term is not None]
    return sum(known) if len(words) > 1 and len(known) == len(words) else None
