"""States: which inputs and outputs of a graph are one tensor that lives across steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ryzen_compile.spec.interface import Interface, StateSpec, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_STATE_DTYPE_PREFIXES = ("float", "bfloat", "int8", "uint8")
_STATE_NAME_PATTERN = re.compile("past|cache|state", re.IGNORECASE)
_ATTENTION_PAST_INPUTS = {"Attention": (4, 5), "TRT_Attention": (4, 5), "GroupQueryAttention": (3, 4)}
"""Which inputs of an attention are its past keys and values, (batch, heads, rows, size); outputs 1 and 2 are the present."""
_SEQUENCE_AXIS = 2
_SCATTER_OPS = frozenset({"ScatterND", "ScatterElements", "TensorScatter", "KVCacheUpdate"})
"""Ops that overwrite a part of their first input."""
_PRESENT_NAME_REPLACEMENTS = (
    ("past_key_values", "present"),
    ("past", "present"),
    ("cache", "present"),
    ("past", "new"),
    ("", "new_"),
)


def infer_states(graph: ir.Graph, interface: Interface) -> tuple[StateSpec, ...]:
    """Return the states of `graph`, whose inputs and outputs are `seen`.

    An output is the next value of an input where the graph appends to that input or overwrites a part of it, else where their
    names say so: `past_key_values.0.key` and `present.0.key`. Element type and rank must agree.
    """
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    pasts = [spec for spec in interface.inputs if spec.dims and spec.dtype.startswith(_STATE_DTYPE_PREFIXES)]
    free = {spec.name: spec for spec in interface.outputs if spec.dims is not None}
    states: dict[str, StateSpec] = {}
    for by_structure in (True, False):
        for past in pasts:
            rivals = [
                spec for spec in free.values() if spec.dtype == past.dtype and len(spec.dims or ()) == len(past.dims or ())
            ]
            if past.name in states:
                continue
            state = _match_by_structure(past, rivals, values) if by_structure else _match_by_name(past, rivals)
            if state is not None:
                states[past.name] = state
                del free[state.output]
    return tuple(states[past.name] for past in pasts if past.name in states)


def infer_sum_dims(interface: Interface, states: Sequence[StateSpec]) -> dict[str, str]:
    """Return the dimensions that are sums though they have a name of their own: `{"total": "past+seq"}`.

    What grows is as long afterwards as before and what is new together. What is new is known where the inputs that are no
    states have one further dimension without a size.
    """
    inputs, outputs = ({spec.name: spec.dims or () for spec in side} for side in (interface.inputs, interface.outputs))
    grown = {
        (inputs[one.input][one.append_axis], outputs[one.output][one.append_axis])
        for one in states
        if one.append_axis is not None
    }
    if len(grown) != 1:
        return {}
    past, total = grown.pop()
    carried = {state.input for state in states}
    others = {dim for name, dims in inputs.items() if name not in carried for dim in dims[1:] if isinstance(dim, str)}
    new = others - {past, total}
    if past == total or not isinstance(total, str) or "+" in total or len(new) != 1 or "+" in (one := new.pop()):
        return {}
    return {total: f"{past}+{one}"}


def _match_by_structure(
    past: TensorSpec, candidates: Sequence[TensorSpec], values: dict[str | None, ir.Value]
) -> StateSpec | None:
    """Find the output into which the graph writes `past` and what is new."""
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
                return StateSpec(name=past.name, input=past.name, output=present.name, append_axis=_SEQUENCE_AXIS)
    return None


def _match_by_name(past: TensorSpec, candidates: Sequence[TensorSpec]) -> StateSpec | None:
    """Find the output whose name says that it is the next `past`."""
    if not _STATE_NAME_PATTERN.search(past.name):
        return None
    wanted = {past.name.replace(old, new, 1) for old, new in _PRESENT_NAME_REPLACEMENTS} | {
        f"{past.name}_out",
        f"present_{past.name}",
    }
    for present in candidates:
        if present.name in wanted:
            pairs = list(zip(past.dims or (), present.dims or (), strict=True))
            grows = [axis for axis, (old, new) in enumerate(pairs) if isinstance(old, str) and old != new]
            return StateSpec(
                name=past.name, input=past.name, output=present.name, append_axis=grows[0] if len(grows) == 1 else None
            )
    return None
