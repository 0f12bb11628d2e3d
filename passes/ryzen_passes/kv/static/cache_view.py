"""Reading the fixed form back: the tensors that the map of the caches names."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.kv_cache import CachedLayer, CachedTensor, CacheMap, recorded
from ryzen_compile.spec.passes import Refusal


@dataclass
class FixedSide:
    """The keys, or the values, of one layer."""

    told: CachedTensor
    past: ir.Value
    """(batch, kv_heads, slots, size): the state."""
    new: ir.Value
    """(batch, kv_heads, seq, size)."""
    whole: ir.Value
    """The state after the step."""


@dataclass
class FixedLayer:
    """One attention over fixed caches."""

    told: CachedLayer
    attention: ir.Node
    key: FixedSide
    value: FixedSide

    @property
    def row_bytes(self) -> int:
        """The bytes of one token of one head."""
        sides = [(side.told.size, side.past.dtype or ir.DataType.FLOAT) for side in (self.key, self.value)]
        return sum(int(size * dtype.itemsize) for size, dtype in sides)


@dataclass
class FixedForm:
    """A decoder with fixed caches."""

    model: ir.Model
    interface: Interface
    told: CacheMap
    mask: ir.Value
    positions: ir.Value
    layers: list[FixedLayer]
    batch: ir.SymbolicDim | int | None
    seq: ir.SymbolicDim | int | None

    def behind_positions(self) -> ir.Node:
        """Return the node in front of which everything that needs only the positions can be written."""
        nodes = list(self.model.graph)
        made = self.positions.producer()
        return nodes[nodes.index(made) + 1] if made is not None else nodes[0]


def read_fixed(model: ir.Model) -> FixedForm | str:
    """Return the fixed form of `model`, or one sentence that says where it is not of that form."""
    told = recorded(model)
    if told is None or not told.is_fixed:
        return "its caches grow, or are not known"
    interface = interface_of(model)
    values = {value.name: value for node in model.graph for value in node.outputs} | {
        value.name: value for value in model.graph.inputs
    }
    nodes = {node.name: node for node in model.graph}
    states = {state.name: state for state in interface.states}
    mask, positions = values.get(told.mask), values.get(told.token_positions)
    if mask is None or positions is None:
        return f"`{told.mask if mask is None else told.token_positions}` is gone"
    layers: list[FixedLayer] = []
    for layer in told.layers:
        attention = nodes.get(layer.attention)
        if attention is None or attention.op_type != "Attention":
            return f"the attention `{layer.attention}` is gone, or has become another op"
        sides: list[FixedSide] = []
        for side in (layer.key, layer.value):
            state = states.get(side.state or "")
            parts = [values.get(name) for name in ((state.input, side.new, state.output) if state is not None else ())]
            if not parts or any(part is None for part in parts):
                return f"the state `{side.state}` of `{layer.attention}` is gone"
            past, new, whole = (part for part in parts if part is not None)
            sides.append(FixedSide(told=side, past=past, new=new, whole=whole))
        layers.append(FixedLayer(told=layer, attention=attention, key=sides[0], value=sides[1]))
    batch, seq = (mask.shape or (None, None))[:2]
    return FixedForm(model, interface, told, mask, positions, layers, batch, seq)


def biased(form: FixedForm) -> Refusal | None:
    """Return why a pass that moves tokens, or leaves some out, cannot apply: scores are biased by where keys lie. Else None."""
    if form.told.positions != "alibi":
        return None
    where = form.layers[0].told.attention
    says = f"`{where}` biases its scores by how far behind its query a key stands (ALiBi)"
    return Refusal(says=says, where="positions", hint="kv-static and kv-quant leave every token in its place")
