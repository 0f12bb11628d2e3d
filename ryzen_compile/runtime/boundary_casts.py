"""Casts at the inputs and outputs of an engine whose backend computes an element type of the interface in a narrower one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ryzen_compile.backends.input_validation import check_input_names, check_tensor, is_torch_tensor, to_host_array
from ryzen_compile.spec.interface import Inputs, Outputs, StateSpec, TensorSpec

if TYPE_CHECKING:
    from ryzen_compile.backends.api import Session, StateBinding
    from ryzen_compile.spec.interface import Interface


def with_boundary_casts(session: Session, interface: Interface, demoted_dtypes: Mapping[str, str]) -> Session:
    """Return `session` with inputs and outputs of the types of `interface` where the engine has demoted types.

    `demoted_dtypes` is that of the traits of the backend. States keep the types of the engine: no caller sees them.
    """
    states = {name for state in interface.states for name in (state.input, state.output)}
    declared = {spec.name: spec.dtype for spec in (*interface.inputs, *interface.outputs) if spec.name not in states}
    dtypes = {
        spec.name: declared[spec.name]
        for spec in (*session.inputs, *session.outputs)
        if spec.name in declared and demoted_dtypes.get(declared[spec.name]) == spec.dtype
    }
    return CastingSession(session, dtypes) if dtypes else session


class CastingSession:
    """A session whose inputs and outputs in `dtypes` have other element types than those of the engine. Thread-safe."""

    def __init__(self, session: Session, dtypes: Mapping[str, str]) -> None:
        """Cast the inputs and outputs of `session` named in `dtypes` from and to these types."""
        self._session, self._dtypes = session, dtypes
        self.inputs = _with_dtypes(session.inputs, dtypes)
        self.outputs = _with_dtypes(session.outputs, dtypes)

    def run(self, inputs: Inputs) -> Outputs:
        """Run once; see `Session.run`. Raises ShapeError for an input of another type than that of the interface."""
        check_input_names(inputs, self.inputs)
        return _cast_outputs(self._session.run(_cast_inputs(inputs, self._session.inputs, self._dtypes)), self._dtypes)

    def bind_states(
        self, states: Sequence[StateSpec], shapes: Mapping[str, tuple[int, ...]], *, share_with: StateBinding | None = None
    ) -> StateBinding:
        """Allocate `states`; see `Session.bind_states`."""
        shared = share_with.binding if isinstance(share_with, CastingStateBinding) else share_with
        return CastingStateBinding(
            self._session.bind_states(states, shapes, share_with=shared), self._session.inputs, self._dtypes
        )


class CastingStateBinding:
    """The states of a decoder, and steps whose inputs and outputs have other element types than those of the engine."""

    def __init__(self, binding: StateBinding, specs: Sequence[TensorSpec], dtypes: Mapping[str, str]) -> None:
        """Cast the inputs and outputs of `binding`, whose inputs have `specs`, from and to `dtypes`."""
        self.binding = binding
        self._specs, self._dtypes = specs, dtypes
        self.reset, self.read, self.close = binding.reset, binding.read, binding.close

    def run(self, inputs: Inputs) -> Outputs:
        """Run one step; see `StateBinding.run`."""
        return _cast_outputs(self.binding.run(_cast_inputs(inputs, self._specs, self._dtypes)), self._dtypes)


def _with_dtypes(specs: Iterable[TensorSpec], dtypes: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    return tuple(msgspec.structs.replace(spec, dtype=dtypes.get(spec.name, spec.dtype)) for spec in specs)


def _cast_inputs(inputs: Inputs, specs: Sequence[TensorSpec], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Return `inputs` in the types of `specs`; an input in `dtypes` must have the type that it has there."""
    by_name = {spec.name: spec for spec in specs}
    return {
        name: _cast(value, by_name[name], dtypes[name]) if name in by_name and name in dtypes else value
        for name, value in inputs.items()
    }


def _cast(value: Any, spec: TensorSpec, dtype: str) -> Any:
    """Return `value`, of the type `dtype`, in the type of `spec`; a torch tensor stays on its device."""
    if is_torch_tensor(value) and str(value.dtype) == f"torch.{dtype}":
        import torch

        return value.to(getattr(torch, spec.dtype))
    declared = msgspec.structs.replace(spec, dtype=dtype)
    array = to_host_array(value, declared)
    check_tensor(array, declared)
    return array.astype(spec.dtype)


def _cast_outputs(outputs: Outputs, dtypes: Mapping[str, str]) -> Outputs:
    return {name: array.astype(dtypes[name]) if name in dtypes else array for name, array in outputs.items()}
