"""Keys and values that live across steps: their type is part of how a decoder computes, as no caller ever holds them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import msgspec
import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import ElementTypes
from ryzen_compile.ir.interface_metadata import interface_of, write_interface
from ryzen_compile.spec.interface import with_dtypes
from ryzen_compile.spec.kv_cache import CacheTensorSpec, read_kv_cache_spec, write_kv_cache_spec


@dataclass(frozen=True)
class StaticCacheState:
    """A state of fixed shape that holds keys or values."""

    name: str
    past: ir.Value
    present: ir.Value


def static_cache_states(model: ir.Model, types: ElementTypes, dtypes: Collection[ir.DataType]) -> tuple[StaticCacheState, ...]:
    """Return the states of keys and values of `model` whose element type is one of `dtypes`, as the map of its caches tells."""
    told = read_kv_cache_spec(model)
    if told is None:
        return ()
    names = {side.state for layer in told.layers for side in (layer.key, layer.value)}
    inputs, outputs = ({value.name: value for value in side} for side in (model.graph.inputs, model.graph.outputs))
    found = []
    for state in interface_of(model).states:
        past, present = inputs.get(state.input), outputs.get(state.output)
        if state.name not in names or state.append_axis is not None or past is None or present is None:
            continue
        if types.get(past) in dtypes and types.get(present) in dtypes:
            found.append(StaticCacheState(state.name, past, present))
    return tuple(found)


def record_state_dtypes(model: ir.Model, states: Collection[StaticCacheState], dtype: ir.DataType) -> None:
    """Record in the interface and in the map of the caches that `kept` are to be of type `dtype`; they are not yet."""
    if not states:
        return
    name = str(dtype.numpy())
    at = {value.name or "": name for one in states for value in (one.past, one.present)}
    write_interface(model, with_dtypes(interface_of(model), at))
    told, names = read_kv_cache_spec(model), {one.name for one in states}
    if told is None:
        return

    def of(side: CacheTensorSpec) -> CacheTensorSpec:
        return msgspec.structs.replace(side, dtype=name) if side.state in names else side

    layers = tuple(msgspec.structs.replace(layer, key=of(layer.key), value=of(layer.value)) for layer in told.layers)
    write_kv_cache_spec(model, msgspec.structs.replace(told, layers=layers))
