"""States: which inputs and outputs of a graph are one tensor that lives across steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ryzen_compile.spec.interface import Interface, State, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_ELEMENTS = ("float", "bfloat", "int8", "uint8")
_NAMED = re.compile("past|cache|state", re.IGNORECASE)
_ATTENTIONS = {"Attention": (4, 5), "TRT_Attention": (4, 5), "GroupQueryAttention": (3, 4)}
"""Which inputs of an attention are its past keys and values, (batch, heads, rows, size); outputs 1 and 2 are the present."""
_ROWS = 2
_WRITES = frozenset({"ScatterND", "ScatterElements", "TensorScatter", "KVCacheUpdate"})
"""Ops that overwrite a part of their first input."""
_PRESENT_NAMES = (("past_key_values", "present"), ("past", "present"), ("cache", "present"), ("past", "new"), ("", "new_"))


def states_of(graph: ir.Graph, seen: Interface) -> tuple[State, ...]:
    """Return the states of `graph`, whose inputs and outputs are `seen`.

    An output is the next value of an input where the graph appends to that input or overwrites a part of it, else where their
    names say so: `past_key_values.0.key` and `present.0.key`. Element type and rank must agree.
    """
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    pasts = [spec for spec in seen.inputs if spec.dims and spec.dtype.startswith(_ELEMENTS)]
    free = {spec.name: spec for spec in seen.outputs if spec.dims is not None}
    states: dict[str, State] = {}
    for by_structure in (True, False):
        for past in pasts:
            rivals = [
                spec for spec in free.values() if spec.dtype == past.dtype and len(spec.dims or ()) == len(past.dims or ())
            ]
            if past.name in states:
                continue
            state = _written(past, rivals, values) if by_structure else _called(past, rivals)
            if state is not None:
                states[past.name] = state
                del free[state.output]
    return tuple(states[past.name] for past in pasts if past.name in states)


def sums_of(seen: Interface, states: Sequence[State]) -> dict[str, str]:
    """Return the dimensions that are sums though they have a name of their own: `{"total": "past+seq"}`.

    What grows is as long afterwards as before and what is new together. What is new is known where the inputs that are no
    states have one further dimension without a size.
    """
    inputs, outputs = ({spec.name: spec.dims or () for spec in side} for side in (seen.inputs, seen.outputs))
    grown = {(inputs[one.input][one.grows], outputs[one.output][one.grows]) for one in states if one.grows is not None}
    if len(grown) != 1:
        return {}
    past, total = grown.pop()
    carried = {state.input for state in states}
    others = {dim for name, dims in inputs.items() if name not in carried for dim in dims[1:] if isinstance(dim, str)}
    new = others - {past, total}
    if past == total or not isinstance(total, str) or "+" in total or len(new) != 1 or "+" in (one := new.pop()):
        return {}
    return {total: f"{past}+{one}"}


def _written(past: TensorSpec, rivals: Sequence[TensorSpec], values: dict[str | None, ir.Value]) -> State | None:
    """Find the output into which the graph writes `past` and what is new."""
    source, dims = values[past.name], past.dims or ()
    for present in rivals:
        value = values[present.name]
        while (node := value.producer()) is not None and node.op_type == "Identity" and node.inputs[0] is not None:
            value = node.inputs[0]
        if node is None:
            continue
        if node.op_type in _WRITES and node.inputs[0] is source and _NAMED.search(past.name):
            return State(name=past.name, input=past.name, output=present.name)
        if node.op_type == "Concat" and node.inputs[0] is source:
            axis = node.attributes.get_int("axis", 0) % len(dims)
            if isinstance(dims[axis], str) and axis and (len(dims) == 4 or _NAMED.search(past.name)):
                return State(name=past.name, input=past.name, output=present.name, grows=axis)
        for offset, index in enumerate(_ATTENTIONS.get(node.op_type, ())):
            if index < len(node.inputs) and node.inputs[index] is source and value.index() == 1 + offset:
                return State(name=past.name, input=past.name, output=present.name, grows=_ROWS)
    return None


def _called(past: TensorSpec, rivals: Sequence[TensorSpec]) -> State | None:
    """Find the output whose name says that it is the next `past`."""
    if not _NAMED.search(past.name):
        return None
    wanted = {past.name.replace(old, new, 1) for old, new in _PRESENT_NAMES} | {f"{past.name}_out", f"present_{past.name}"}
    for present in rivals:
        if present.name in wanted:
            pairs = list(zip(past.dims or (), present.dims or (), strict=True))
            grows = [axis for axis, (old, new) in enumerate(pairs) if isinstance(old, str) and old != new]
            return State(name=past.name, input=past.name, output=present.name, grows=grows[0] if len(grows) == 1 else None)
    return None
