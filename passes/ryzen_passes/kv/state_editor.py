"""The states of a decoder while it is rewritten: which inputs they come in by, and which outputs they leave by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import NodeBuilder
from ryzen_compile.ir.interface_metadata import write_interface
from ryzen_compile.spec.interface import Dim, InputSpec, Interface, StateSpec, TensorSpec

_Spec = TypeVar("_Spec", bound=TensorSpec)


class StateEditor:
    """The states of one graph, in their order. What is written last is `attach`ed to the model as its interface."""

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
        """Add an input `by` (`past_<name>`) for a new state called `name` and return it; `told` is what else its spec says."""
        value = ir.Value(name=self.writer.names.allocate(input_name or f"past_{name}"), type=ir.TensorType(dtype), shape=shape)
        self.graph.inputs.append(value)
        self.writer.types[value] = dtype
        self.register(
            StateSpec(name=name, input=value.name or "", output="", initial_value=initial_value, in_place=True), **spec_fields
        )
        return value

    def register(self, state: StateSpec, **spec_fields: Any) -> None:
        """Let `state`, whose input is there already, be one of the states."""
        self._states[state.name] = state
        self._spec_overrides[state.input] = spec_fields

    def set_output(self, name: str, value: ir.Value, *, output_name: str | None = None, in_place: bool = True) -> None:
        """Let `value`, which is then called `by` (`present_<name>`), be what the state `name` is after the step."""
        value.name = self.writer.names.allocate(output_name or f"present_{name}")
        past = next(one for one in self.graph.inputs if one.name == self._states[name].input)
        value.shape = past.shape
        self.graph.outputs.append(value)
        self._states[name] = msgspec.structs.replace(self._states[name], output=value.name, in_place=in_place)

    def remove(self, name: str) -> None:
        """Take the state `name` away, with its input and its output; whatever read the one or made the other must be gone."""
        state = self._states.pop(name)
        for values, gone in ((self.graph.inputs, state.input), (self.graph.outputs, state.output)):
            values.remove(next(value for value in values if value.name == gone))

    def disable_in_place(self) -> None:
        """Let no state be written over itself: what reads it is in no order with what writes it."""
        for name, state in self._states.items():
            self._states[name] = msgspec.structs.replace(state, in_place=False)

    def write_interface(self, model: ir.Model, interface: Interface, *extra_inputs: InputSpec) -> None:
        """Record the interface of `model`: `interface` with these states, what carries them, and `others` that are new."""
        batch = interface.batch or "batch"
        inputs = {spec.name: spec for spec in (*interface.inputs, *extra_inputs)}
        outputs = {spec.name: spec for spec in interface.outputs}
        carried = {state.input for state in self._states.values()}
        written = {state.output for state in self._states.values()}
        new = msgspec.structs.replace(
            interface,
            inputs=tuple(self._input_spec(value, inputs, carried, batch) for value in self.graph.inputs),
            outputs=tuple(
                TensorSpec(name=value.name or "", dtype=dtype_of(value), dims=dims_of(value, batch))
                if value.name in written
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
        told = self._spec_overrides.get(name) or ({"low": old.low, "high": old.high} if old is not None else {})
        return InputSpec(name=name, dtype=dtype_of(value), dims=dims_of(value, batch), role="state", **told)


def dtype_of(value: ir.Value) -> str:
    """Return the numpy name of the type of `value`."""
    return str(value.dtype.numpy()) if value.dtype is not None else ""


def dims_of(value: ir.Value, batch: str) -> tuple[Dim, ...]:
    """Return the dims of `value`, of which only the batch has no number."""
    return tuple(dim if isinstance(dim, int) else batch for dim in value.shape or ())
