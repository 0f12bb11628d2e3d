"""Keys and values that live across steps: their type is part of how a decoder computes, as no caller ever holds them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import msgspec
import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import Types
from ryzen_compile.ir.interface_metadata import attach, interface_of
from ryzen_compile.spec.interface import retyped
from ryzen_compile.spec.kv_cache import CachedTensor, recorded
from ryzen_compile.spec.kv_cache import attach as attach_map


@dataclass(frozen=True)
class Kept:
    """A state of fixed shape that holds keys or values."""

    name: str
    past: ir.Value
    present: ir.Value


def kept_of(model: ir.Model, types: Types, dtypes: Collection[ir.DataType]) -> tuple[Kept, ...]:
    """Return the states of keys and values of `model` whose element type is one of `dtypes`, as the map of its caches tells."""
    told = recorded(model)
    if told is None:
        return ()
    names = {side.state for layer in told.layers for side in (layer.key, layer.value)}
    inputs, outputs = ({value.name: value for value in side} for side in (model.graph.inputs, model.graph.outputs))
    found = []
    for state in interface_of(model).states:
        past, present = inputs.get(state.input), outputs.get(state.output)
        if state.name not in names or state.grows is not None or past is None or present is None:
            continue
        if types.get(past) in dtypes and types.get(present) in dtypes:
            found.append(Kept(state.name, past, present))
    return tuple(found)


def tell(model: ir.Model, kept: Collection[Kept], dtype: ir.DataType) -> None:
    """Record in the interface and in the map of the caches that `kept` are to be of type `dtype`; they are not yet."""
    if not kept:
        return
    name = str(dtype.numpy())
    at = {value.name or "": name for one in kept for value in (one.past, one.present)}
    attach(model, retyped(interface_of(model), at))
    told, names = recorded(model), {one.name for one in kept}
    if told is None:
        return

    def of(side: CachedTensor) -> CachedTensor:
        return msgspec.structs.replace(side, dtype=name) if side.state in names else side

    layers = tuple(msgspec.structs.replace(layer, key=of(layer.key), value=of(layer.value)) for layer in told.layers)
    attach_map(model, msgspec.structs.replace(told, layers=layers))
