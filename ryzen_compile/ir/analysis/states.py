"""State inference: the input/output pairs of a graph that carry one tensor from step to step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ryzen_compile.ir.analysis.op_traits import ATTENTION_OPS
from ryzen_compile.ir.analysis.window_caches import keeps_window
from ryzen_compile.spec.dims import dim_terms
from ryzen_compile.spec.interface import Interface, StateSpec, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_STATE_DTYPE_PREFIXES = ("float", "bfloat", "int8", "uint8")
_STATE_NAME_PATTERN = re.compile("past|cache|state", re.IGNORECASE)
_ATTENTION_PAST_INPUTS = {**dict.fromkeys(ATTENTION_OPS, (4, 5)), "GroupQueryAttention": (3, 4)}
"""Per attention op the inputs of past keys and values, (batch, heads, rows, size); outputs 1 and 2 are the present ones."""
_SEQUENCE_AXIS = 2
_SCATTER_OPS = frozenset({"ScatterND", "ScatterElements", "TensorScatter", "KVCacheUpdate"})
"""Ops that overwrite part of their first input."""
_PRESENT_NAME_REPLACEMENTS = (
    ("past_key_values", "present"),
    ("past", "present"),
    ("cache", "present"),
    ("past", "new"),
    ("", "new_"),
)


def infer_states(graph: ir.Graph, interface: Interface) -> tuple[StateSpec, ...]:
    """Return the states of `graph`, whose inputs and outputs are those of `interface`.

    An output is the next value of an input if the graph appends to the input or overwrites part of it, else if their names
    match: `past_key_values.0.key` and `present.0.key`. Element type and rank must be equal.
    """
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    pasts = [spec for spec in interface.inputs if spec.dims and spec.dtype.startswith(_STATE_DTYPE_PREFIXES)]
    free_outputs = {spec.name: spec for spec in interface.outputs if spec.dims is not None}
    states: dict[str, StateSpec] = {}
    for by_structure in (True, False):
        for past in pasts:
            compatible_outputs = [
                spec
                for spec in free_outputs.values()
                if spec.dtype == past.dtype and len(spec.dims or ()) == len(past.dims or ())
            ]
            if past.name in states:
                continue
            state = (
                _match_by_structure(past, compatible_outputs, values)
                if by_structure
                else _match_by_name(past, compatible_outputs)
            )
            if state is not None:
                states[past.name] = state
                del free_outputs[state.output]
    return tuple(states[past.name] for past in pasts if past.name in states)


def infer_sum_dims(interface: Interface, states: Sequence[StateSpec]) -> dict[str, str]:
    """Return the dimensions with a separate name that are sums of others: `{"total": "past+seq"}`.

    The length of a growing state after a step is its length before the step plus the number of appended elements. That number
    is known if the other inputs have exactly one further dynamic dimension.
    """
    inputs, outputs = ({spec.name: spec.dims or () for spec in side} for side in (interface.inputs, interface.outputs))
    appended_dims = {
        (inputs[state.input][state.append_axis], outputs[state.output][state.append_axis])
        for state in states
        if state.append_axis is not None
    }
    if len(appended_dims) != 1:
        return {}
    past, total = appended_dims.pop()
    state_inputs = {state.input for state in states}
    other_dims = {dim for name, dims in inputs.items() if name not in state_inputs for dim in dims[1:] if isinstance(dim, str)}
    new_dims = other_dims - {past, total}
    new_dim = new_dims.pop() if len(new_dims) == 1 else ""
    if past == total or not isinstance(total, str) or not new_dim or any(len(dim_terms(dim)) > 1 for dim in (total, new_dim)):
        return {}
    return {total: f"{past}+{new_dim}"}


def _match_by_structure(
    past: TensorSpec, candidates: Sequence[TensorSpec], values: dict[str | None, ir.Value]
) -> StateSpec | None:
    """Return the state whose output is `past` with appended or overwritten elements, or None."""
    source, dims = values[past.name], past.dims or ()
    for present in candidates:
        value = values[present.name]
        while (node := value.producer()) is not None and node.op_type == "Identity" and node.inputs[0] is not None:
            value = node.inputs[0]
        if node is None:
            continue
        if node.op_type in _SCATTER_OPS and node.inputs[0] is source and _STATE_NAME_PATTERN.search(past.name):
            return StateSpec(name=past.name, input=past.name, output=present.name)
        if node.op_type == "Concat" and node.inputs[0] is source:
            axis = node.attributes.get_int("axis", 0) % len(dims)
            if isinstance(dims[axis], str) and axis and (len(dims) == 4 or _STATE_NAME_PATTERN.search(past.name)):
                return StateSpec(name=past.name, input=past.name, output=present.name, append_axis=axis)
        for offset, index in enumerate(_ATTENTION_PAST_INPUTS.get(node.op_type, ())):
            if index < len(node.inputs) and node.inputs[index] is source and value.index() == 1 + offset:
                append_axis = None if keeps_window(node) else _SEQUENCE_AXIS
                return StateSpec(name=past.name, input=past.name, output=present.name, append_axis=append_axis)
    return None


def _match_by_name(past: TensorSpec, candidates: Sequence[TensorSpec]) -> StateSpec | None:
    """Return the state whose output is named as the next value of `past`, or None."""
    if not _STATE_NAME_PATTERN.search(past.name):
        return None
    expected_names = {past.name.replace(past_dim, present_dim, 1) for past_dim, present_dim in _PRESENT_NAME_REPLACEMENTS} | {
        f"{past.name}_out",
        f"present_{past.name}",
    }
    for present in candidates:
        if present.name in expected_names:
            pairs = list(zip(past.dims or (), present.dims or (), strict=True))
            growing_axes = [
                axis
                for axis, (past_dim, present_dim) in enumerate(pairs)
                if isinstance(past_dim, str) and past_dim != present_dim
            ]
            return StateSpec(
                name=past.name,
                input=past.name,
                output=present.name,
                append_axis=growing_axes[0] if len(growing_axes) == 1 else None,
            )
    return None
