"""View a decoder with static caches: resolve the tensor and node names of its KVCacheSpec to values and nodes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.kv_cache import (
    AppendEvictWrite,
    CacheTensorSpec,
    GatherWrite,
    GrowingCache,
    KVCacheSpec,
    LayerCacheSpec,
    ScatterWrite,
    StepTensorsSpec,
    read_kv_cache_spec,
)
from ryzen_compile.spec.passes import Refusal

_AGAIN_HINT = "apply the kv passes to the exported model again"


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
    slots: int
    """Number of slots per head."""
    written_slots: ir.Value | None
    """The recorded tensor `slots` of the policy's write; None if it has none."""
    token_indices: ir.Value | None
    """The recorded tensor `token_indices` of the policy's write; None if it has none."""
    is_written: ir.Value | None
    """The recorded tensor `is_written` of the policy's write; None if it has none."""

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

    @property
    def capacity(self) -> int:
        """The maximum number of tokens of a sequence that kv-static set: the number of slots, but for ring buffers."""
        return self.interface.capacity or max(layer.slots for layer in self.layers)

    def first_node_after_positions(self) -> ir.Node:
        """Return the insertion point for nodes that depend on positions only and precede every layer."""
        nodes = list(self.model.graph)
        producer = self.positions.producer()
        return nodes[nodes.index(producer) + 1] if producer is not None else nodes[0]


def read_static_cache_view(model: ir.Model) -> StaticCacheView:
    """Return the view of `model`.

    Raises PatternNotMatched if its caches are not static, or a tensor, node or state that its specification names is missing.
    """
    spec = read_kv_cache_spec(model)
    if spec is None or spec.step is None:
        raise PatternNotMatched(
            "the caches grow, or are not recognized", "caches", hint="add kv-static{capacity=...} before this pass"
        )
    return _NameResolver(model).view(spec, spec.step)


class _NameResolver:
    """Finds the tensors, nodes and states of a model by the names in its specification; raises PatternNotMatched."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.interface = model, interface_of(model)
        self._values: dict[str | None, ir.Value] = {value.name: value for value in model.graph.initializers.values()}
        self._values |= {value.name: value for node in model.graph for value in node.outputs}
        self._values |= {value.name: value for value in model.graph.inputs}
        self._nodes = {node.name: node for node in model.graph}
        self._states = {state.name: state for state in self.interface.states}

    def view(self, spec: KVCacheSpec, step: StepTensorsSpec) -> StaticCacheView:
        mask, positions = (self._value(name, "caches") for name in (step.mask, step.positions))
        length, next_length = self._state(step.length_state, "caches")
        layers = [self._layer(layer) for layer in spec.layers]
        batch, seq = (mask.shape or (None, None))[:2]
        return StaticCacheView(self.model, self.interface, spec, mask, positions, length, next_length, layers, batch, seq)

    def _layer(self, spec: LayerCacheSpec) -> StaticCacheLayer:
        name, policy = spec.attention_node, spec.policy
        attention, write = self._nodes.get(name), policy.write
        if attention is None or attention.op_type != "Attention":
            raise PatternNotMatched(f"the Attention node `{name}` is missing, or is another op", name, hint=_AGAIN_HINT)
        if isinstance(policy, GrowingCache):
            raise PatternNotMatched(f"the cache of `{name}` grows", name, hint=_AGAIN_HINT)
        return StaticCacheLayer(
            spec=spec,
            attention=attention,
            key=self._tensor(spec.key, name),
            value=self._tensor(spec.value, name),
            slots=policy.slots,
            written_slots=self._value(write.slots, name) if isinstance(write, ScatterWrite | AppendEvictWrite) else None,
            token_indices=self._value(write.token_indices, name) if isinstance(write, GatherWrite) else None,
            is_written=self._value(write.is_written, name) if isinstance(write, ScatterWrite | GatherWrite) else None,
        )

    def _tensor(self, spec: CacheTensorSpec, location: str) -> StaticKVTensor:
        past, cache = self._state(spec.state or "", location)
        return StaticKVTensor(spec=spec, past=past, update=self._value(spec.update, location), cache=cache)

    def _state(self, name: str, location: str) -> tuple[ir.Value, ir.Value]:
        """Return the tensors of a state before and after the step."""
        if name not in self._states:
            raise PatternNotMatched(
                f"the cache specification of `{location}` records the state `{name}`, which is missing from the interface",
                location,
                hint=_AGAIN_HINT,
            )
        state = self._states[name]
        return self._value(state.input, location), self._value(state.output, location)

    def _value(self, name: str, location: str) -> ir.Value:
        if name not in self._values:
            raise PatternNotMatched(
                f"the cache specification of `{location}` records the tensor `{name}`, which is missing from the graph",
                location,
                hint=_AGAIN_HINT,
            )
        return self._values[name]


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
