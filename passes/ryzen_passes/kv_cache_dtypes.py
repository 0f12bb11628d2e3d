"""Element types of static KV cache states: they follow the precision of the decoder, since no caller sees the states."""

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
    """A state of static shape that holds keys or values."""

    name: str
    past: ir.Value
    present: ir.Value


def static_cache_states(model: ir.Model, types: ElementTypes, dtypes: Collection[ir.DataType]) -> tuple[StaticCacheState, ...]:
    """Return the static states in the KV cache spec of `model` whose element type is in `dtypes`; empty without a spec."""
    spec = read_kv_cache_spec(model)
    if spec is None:
        return ()
    names = {side.state for layer in spec.layers for side in (layer.key, layer.value)}
    inputs, outputs = ({value.name: value for value in side} for side in (model.graph.inputs, model.graph.outputs))
    static_states = []
    for state in interface_of(model).states:
        past, present = inputs.get(state.input), outputs.get(state.output)
        if state.name not in names or state.append_axis is not None or past is None or present is None:
            continue
        if types.get(past) in dtypes and types.get(present) in dtypes:
            static_states.append(StaticCacheState(state.name, past, present))
    return tuple(static_states)


def record_state_dtypes(model: ir.Model, states: Collection[StaticCacheState], dtype: ir.DataType) -> None:
    """Record `dtype` for `states` in the interface and in the KV cache spec; the tensors themselves are not converted."""
    if not states:
        return
    name = str(dtype.numpy())
    dtype_by_tensor = {value.name or "": name for state in states for value in (state.past, state.present)}
    write_interface(model, with_dtypes(interface_of(model), dtype_by_tensor))
    spec, state_names = read_kv_cache_spec(model), {state.name for state in states}
    if spec is None:
        return

    def with_dtype(side: CacheTensorSpec) -> CacheTensorSpec:
        return msgspec.structs.replace(side, dtype=name) if side.state in state_names else side

    layers = tuple(
        msgspec.structs.replace(layer, key=with_dtype(layer.key), value=with_dtype(layer.value)) for layer in spec.layers
    )
    write_kv_cache_spec(model, msgspec.structs.replace(spec, layers=layers))
