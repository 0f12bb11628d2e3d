"""Edit the states of a decoder while it is rewritten: add, register and remove them, and write the interface back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import NodeBuilder
from ryzen_compile.ir.interface_metadata import write_interface
from ryzen_compile.spec.dims import Dim
from ryzen_compile.spec.interface import InputSpec, Interface, StateSpec, TensorSpec

_Spec = TypeVar("_Spec", bound=TensorSpec)


class StateEditor:
    """The states of one graph, in their order; `write_interface` records them in the model."""

    def __init__(self, writer: NodeBuilder, interface: Interface) -> None:
        self.writer, self.graph = writer, writer.graph
        self._states = {state.name: state for state in interface.states if state.append_axis is None}
        self._spec_overrides: dict[str, Mapping[str, Any]] = {}

    def __getitem__(self, name: str) -> StateSpec:
        return self._states[name]

    def add_input(
        self,
        name: str,
        dtype: ir.DataType,
        shape: ir.Shape,
        *,
        input_name: str | None = None,
        initial_value: float = 0.0,
        **spec_fields: Any,
    ) -> ir.Value:
        """Add a graph input for a new state `name` and return it.

        The input is called `input_name`, by default `past_<name>`. `spec_fields` are further fields of its InputSpec, such as
        `low` and `high`.
        """
        value = ir.Value(name=self.writer.names.allocate(input_name or f"past_{name}"), type=ir.TensorType(dtype), shape=shape)
        self.graph.inputs.append(value)
        self.writer.types[value] = dtype
        self.register(
            StateSpec(name=name, input=value.name or "", output="", initial_value=initial_value, in_place=True), **spec_fields
        )
        return value

    def register(self, state: StateSpec, **spec_fields: Any) -> None:
        """Register `state`, whose graph input already exists; `spec_fields` are further fields of its InputSpec."""
        self._states[state.name] = state
        self._spec_overrides[state.input] = spec_fields

    def set_output(self, name: str, value: ir.Value, *, output_name: str | None = None, in_place: bool = True) -> None:
        """Make `value` the output of the state `name`, and rename it to `output_name`, by default `present_<name>`."""
        value.name = self.writer.names.allocate(output_name or f"present_{name}")
        past = next(graph_input for graph_input in self.graph.inputs if graph_input.name == self._states[name].input)
        value.shape = past.shape
        self.graph.outputs.append(value)
        self._states[name] = msgspec.structs.replace(self._states[name], output=value.name, in_place=in_place)

    def remove(self, name: str) -> None:
        """Remove the state `name` with its graph input and output, which no node may use any more."""
        state = self._states.pop(name)
        for values, removed_name in ((self.graph.inputs, state.input), (self.graph.outputs, state.output)):
            values.remove(next(value for value in values if value.name == removed_name))

    def disable_in_place(self, *names: str) -> None:
        """Give the states `names` (default: all) separate buffers, because their reads and writes have no fixed order."""
        for name in names or tuple(self._states):
            self._states[name] = msgspec.structs.replace(self._states[name], in_place=False)

    def write_interface(self, model: ir.Model, interface: Interface, *extra_inputs: InputSpec) -> None:
        """Record the interface of `model`: `interface` with these states and their tensors, and the new `extra_inputs`."""
        batch = interface.batch or "batch"
        inputs = {spec.name: spec for spec in (*interface.inputs, *extra_inputs)}
        outputs = {spec.name: spec for spec in interface.outputs}
        state_inputs = {state.input for state in self._states.values()}
        state_outputs = {state.output for state in self._states.values()}
        new = msgspec.structs.replace(
            interface,
            inputs=tuple(self._input_spec(value, inputs, state_inputs, batch) for value in self.graph.inputs),
            outputs=tuple(
                TensorSpec(name=value.name or "", dtype=dtype_of(value), dims=dims_of(value, batch))
                if value.name in state_outputs
                else outputs[value.name or ""]
                for value in self.graph.outputs
            ),
            states=tuple(self._states.values()),
        )
        write_interface(model, new)

    def _input_spec(self, value: ir.Value, specs: Mapping[str, InputSpec], state_inputs: set[str], batch: str) -> InputSpec:
        name = value.name or ""
        if name not in state_inputs:
            return specs[name]
        old = specs.get(name)
        fields = self._spec_overrides.get(name) or ({"low": old.low, "high": old.high} if old is not None else {})
        return InputSpec(name=name, dtype=dtype_of(value), dims=dims_of(value, batch), role="state", **fields)


def dtype_of(value: ir.Value) -> str:
    """Return the element type of `value` by its numpy name, or an empty string if it is unknown."""
    return str(value.dtype.numpy()) if value.dtype is not None else ""


def dims_of(value: ir.Value, batch: str) -> tuple[Dim, ...]:
    """Return the dims of `value`; each dim that is not an integer is the batch dim, named `batch`."""
    return tuple(dim if isinstance(dim, int) else batch for dim in value.shape or ())
