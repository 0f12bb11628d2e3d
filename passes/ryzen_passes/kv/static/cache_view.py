"""Reading the fixed form back: the tensors that the map of the caches names."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec, LayerCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.passes import Refusal


@dataclass
class StaticKVTensor:
    """The keys, or the values, of one layer."""

    spec: CacheTensorSpec
    past: ir.Value
    """(batch, kv_heads, slots, size): the state."""
    update: ir.Value
    """(batch, kv_heads, seq, size)."""
    cache: ir.Value
    """The state after the step."""


@dataclass
class StaticCacheLayer:
    """One attention over fixed caches."""

    spec: LayerCacheSpec
    attention: ir.Node
    key: StaticKVTensor
    value: StaticKVTensor

    @property
    def row_bytes(self) -> int:
        """The bytes of one token of one head."""
        sides = [(side.spec.head_size, side.past.dtype or ir.DataType.FLOAT) for side in (self.key, self.value)]
        return sum(int(size * dtype.itemsize) for size, dtype in sides)


@dataclass
class StaticCacheView:
    """A decoder with fixed caches."""

    model: ir.Model
    interface: Interface
    spec: KVCacheSpec
    mask: ir.Value
    positions: ir.Value
    layers: list[StaticCacheLayer]
    batch: ir.SymbolicDim | int | None
    seq: ir.SymbolicDim | int | None

    def first_node_after_positions(self) -> ir.Node:
        """Return the node in front of which everything that needs only the positions can be written."""
        nodes = list(self.model.graph)
        made = self.positions.producer()
        return nodes[nodes.index(made) + 1] if made is not None else nodes[0]


def read_static_cache_view(model: ir.Model) -> StaticCacheView | str:
    """Return the fixed form of `model`, or one sentence that says where it is not of that form."""
    told = read_kv_cache_spec(model)
    if told is None or not told.is_static:
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
    layers: list[StaticCacheLayer] = []
    for layer in told.layers:
        attention = nodes.get(layer.attention_node)
        if attention is None or attention.op_type != "Attention":
            return f"the attention `{layer.attention_node}` is gone, or has become another op"
        sides: list[StaticKVTensor] = []
        for side in (layer.key, layer.value):
            state = states.get(side.state or "")
            parts = [values.get(name) for name in ((state.input, side.update, state.output) if state is not None else ())]
            if not parts or any(part is None for part in parts):
                return f"the state `{side.state}` of `{layer.attention_node}` is gone"
            past, new, whole = (part for part in parts if part is not None)
            sides.append(StaticKVTensor(spec=side, past=past, update=new, cache=whole))
        layers.append(StaticCacheLayer(spec=layer, attention=attention, key=sides[0], value=sides[1]))
    batch, seq = (mask.shape or (None, None))[:2]
    return StaticCacheView(model, interface, told, mask, positions, layers, batch, seq)


def refuse_alibi(view: StaticCacheView) -> Refusal | None:
    """Return why a pass that moves tokens, or leaves some out, cannot apply: scores are biased by where keys lie. Else None."""
    if view.spec.position_encoding != "alibi":
        return None
    where = view.layers[0].spec.attention_node
    says = f"`{where}` biases its scores by how far behind its query a key stands (ALiBi)"
    return Refusal(reason=says, location="positions", hint="kv-static and kv-quant leave every token in its place")
