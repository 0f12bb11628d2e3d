"""Result of decoder recognition: layers, their key and value tensors, mask visibility and position tensors."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.spec.interface import InputSpec, Interface, StateSpec
from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec, LayerCacheSpec, PositionEncoding
from ryzen_passes.position_subgraph import PositionSubgraph


@dataclass(frozen=True)
class Visibility:
    """The keys that a query attends to: its own and all earlier ones within `window` tokens, without padding."""

    window: int | None
    """Number of tokens that a query attends to, itself included; None: all."""
    padding: bool
    """Whether the attention mask input hides tokens."""
    alibi_slopes: tuple[float, ...] = ()
    """ALiBi slope per head: the bias added to a score per position of the key; empty: no ALiBi."""


@dataclass
class KVTensor:
    """The keys or the values of one attention layer."""

    state: StateSpec | None
    """The state that holds them between steps; None if the model has no cache."""
    update: ir.Value
    """(batch, kv_heads, seq, head_size): the keys or values of the current step."""
    cache: ir.Value
    """(batch, kv_heads, past+seq, head_size): the input of attention; equals `update` if there is no cache."""
    head_size: int
    dtype: ir.DataType

    @property
    def row_bytes(self) -> int:
        """Bytes per token and head."""
        return self.head_size * int(self.dtype.numpy().itemsize)


@dataclass
class AttentionLayer:
    """One attention layer of a decoder."""

    attention: ir.Node
    """ONNX Attention node over (batch, heads, seq, head_size)."""
    key: KVTensor
    value: KVTensor
    heads: int
    kv_heads: int
    visibility: Visibility


@dataclass(frozen=True)
class PositionTensor:
    """A tensor of token positions: (batch or 1, 1, ..., seq, 1, ...), or (seq,) if it indexes a table."""

    value: ir.Value
    rank: int
    axis: int
    """The axis of length seq."""


@dataclass
class RecognizedDecoder:
    """A decoder whose attention layers and caches are recognized."""

    model: ir.Model
    interface: Interface
    position_subgraph: PositionSubgraph
    layers: list[AttentionLayer]
    ids: InputSpec
    mask: InputSpec | None
    position_inputs: list[PositionTensor]
    """The tensors that hold the positions of the step's tokens; empty if the model uses no positions."""
    position_encoding: PositionEncoding
    """How positions enter the model."""
    max_positions: int | None
    """Number of positions if a position table limits them; None: unlimited."""

    probed_length: int
    """Number of tokens over which the masks were probed; a sliding window longer than this is not detected."""

    def to_kv_cache_spec(self) -> KVCacheSpec:
        """Return the specification of the caches, which refers to nodes and tensors by name."""

        def to_tensor_spec(tensor: KVTensor) -> CacheTensorSpec:
            return CacheTensorSpec(
                state=tensor.state.name if tensor.state is not None else None,
                update=tensor.update.name or "",
                cache=tensor.cache.name or "",
                head_size=tensor.head_size,
                dtype=str(tensor.dtype.numpy()),
            )

        return KVCacheSpec(
            layers=tuple(
                LayerCacheSpec(
                    attention_node=layer.attention.name or "",
                    heads=layer.heads,
                    kv_heads=layer.kv_heads,
                    key=to_tensor_spec(layer.key),
                    value=to_tensor_spec(layer.value),
                    window=layer.visibility.window,
                )
                for layer in self.layers
            ),
            position_encoding=self.position_encoding,
            max_positions=self.max_positions,
            padding=any(layer.visibility.padding for layer in self.layers),
        )
