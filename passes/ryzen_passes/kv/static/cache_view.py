"""View a decoder with static caches: resolve the tensor and node names of its KVCacheSpec to values and nodes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec, LayerCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.passes import Refusal
from ryzen_passes.kv.static.step_positions import LENGTH_STATE


@dataclass
class StaticKVTensor:
    """The keys, or the values, of one layer."""

    spec: CacheTensorSpec
    past: ir.Value
    """(batch, kv_heads, slots, head_size): the state before the step."""
    update: ir.Value
    """(batch, kv_heads, seq, head_size): the keys or values of the step's tokens."""
    cache: ir.Value
    """(batch, kv_heads, slots, head_size): the state after the step."""

    @property
    def row_bytes(self) -> int:
        """The bytes of one token of one head."""
        return int(self.spec.head_size * (self.past.dtype or ir.DataType.FLOAT).itemsize)


@dataclass
class StaticCacheLayer:
    """One attention layer over static caches."""

    spec: LayerCacheSpec
    attention: ir.Node
    key: StaticKVTensor
    value: StaticKVTensor

    @property
    def row_bytes(self) -> int:
        """The bytes of one token of one head, key and value."""
        return self.key.row_bytes + self.value.row_bytes


@dataclass
class StaticCacheView:
    """A decoder with static caches: its specification, resolved to the values and nodes of the graph."""

    model: ir.Model
    interface: Interface
    spec: KVCacheSpec
    mask: ir.Value
    """(batch, seq) int64: 1 for tokens, 0 for padding."""
    positions: ir.Value
    """(batch, seq) int64: the position of each token of the step."""
    length: ir.Value
    """(batch,) int64: the number of tokens before the step."""
    next_length: ir.Value
    """(batch,) int64: the number of tokens after the step."""
    layers: list[StaticCacheLayer]
    batch: ir.SymbolicDim | int | None
    seq: ir.SymbolicDim | int | None

    def first_node_after_positions(self) -> ir.Node:
        """Return the insertion point for nodes that depend on positions only and precede every layer."""
        nodes = list(self.model.graph)
        producer = self.positions.producer()
        return nodes[nodes.index(producer) + 1] if producer is not None else nodes[0]


def read_static_cache_view(model: ir.Model) -> StaticCacheView | str:
    """Return the view of `model`, or one sentence that states why its caches are not static."""
    spec = read_kv_cache_spec(model)
    if spec is None or not spec.is_static:
        return "the caches grow, or are not recognized"
    interface = interface_of(model)
    values = {value.name: value for node in model.graph for value in node.outputs} | {
        value.name: value for value in model.graph.inputs
    }
    nodes = {node.name: node for node in model.graph}
    states = {state.name: state for state in interface.states}
    mask, positions = values.get(spec.mask), values.get(spec.token_positions)
    if mask is None or positions is None:
        return f"the tensor `{spec.mask if mask is None else spec.token_positions}` is missing from the graph"
    length_state = states.get(LENGTH_STATE)
    length, next_length = (
        (values.get(length_state.input), values.get(length_state.output)) if length_state is not None else (None, None)
    )
    if length is None or next_length is None:
        return f"the state `{LENGTH_STATE}`, or one of its tensors, is missing from the graph"
    layers: list[StaticCacheLayer] = []
    for layer in spec.layers:
        attention = nodes.get(layer.attention_node)
        if attention is None or attention.op_type != "Attention":
            return f"the Attention node `{layer.attention_node}` is missing, or is another operator"
        tensors: list[StaticKVTensor] = []
        for tensor in (layer.key, layer.value):
            state = states.get(tensor.state or "")
            names = (state.input, tensor.update, state.output) if state is not None else ()
            resolved = [value for name in names if (value := values.get(name)) is not None]
            if len(resolved) != 3:
                return f"the state `{tensor.state}` of `{layer.attention_node}`, or one of its tensors, is missing"
            past, update, cache = resolved
            tensors.append(StaticKVTensor(spec=tensor, past=past, update=update, cache=cache))
        layers.append(StaticCacheLayer(spec=layer, attention=attention, key=tensors[0], value=tensors[1]))
    batch, seq = (mask.shape or (None, None))[:2]
    return StaticCacheView(model, interface, spec, mask, positions, length, next_length, layers, batch, seq)


def refuse_alibi(view: StaticCacheView) -> Refusal | None:
    """Return the refusal of a pass that moves or drops tokens if attention scores depend on slot order (ALiBi), else None."""
    if view.spec.position_encoding != "alibi":
        return None
    node = view.layers[0].spec.attention_node
    return Refusal(
        reason=f"`{node}` biases its scores by the distance from query to key (ALiBi)",
        location="position encoding",
        hint="use kv-static and kv-quant only, which keep every token in the slot of its position",
    )
