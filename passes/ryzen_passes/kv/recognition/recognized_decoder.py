"""A decoder as its passes see it: its layers, the tensors that hold their caches, and what tells it the time."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.spec.interface import InputSpec, Interface, StateSpec
from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec, LayerCacheSpec, PositionEncoding
from ryzen_passes.kv.recognition.position_subgraph import PositionSubgraph


class PatternNotMatched(Exception):
    """Why a model is no decoder whose caches can be rewritten: what was expected, and the node where it was not so."""

    def __init__(self, reason: str, location: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.location, self.hint = reason, location, hint


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees: all before it and itself, as far back as `window` tokens, but for padding."""

    window: int | None
    """How many tokens a query sees, itself included; None: all."""
    padding: bool
    """Whether an attention mask hides tokens."""
    alibi_slopes: tuple[float, ...] = ()
    """What each head adds to a score for every position that the key is further on (ALiBi); empty: nothing."""


@dataclass
class KVTensor:
    """The keys, or the values, of one layer."""

    state: StateSpec | None
    """The state that carries them; None where the model has no cache."""
    update: ir.Value
    """(batch, kv_heads, seq, size): those of the step."""
    cache: ir.Value
    """(batch, kv_heads, past+seq, size): what attention reads; `new` where there is no cache."""
    head_size: int
    dtype: ir.DataType

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one head."""
        return self.head_size * int(self.dtype.numpy().itemsize)


@dataclass
class AttentionLayer:
    """One attention of the decoder."""

    attention: ir.Node
    """An ONNX Attention over (batch, heads, seq, size)."""
    key: KVTensor
    value: KVTensor
    heads: int
    kv_heads: int
    visibility: Visibility


@dataclass(frozen=True)
class PositionTensor:
    """A tensor of positions: (batch or 1, 1, ..., seq, 1, ...), or (seq,) where it indexes a table."""

    value: ir.Value
    rank: int
    axis: int
    """The axis of the tokens."""


@dataclass
class RecognizedDecoder:
    """A decoder whose caches were found."""

    model: ir.Model
    interface: Interface
    position_subgraph: PositionSubgraph
    layers: list[AttentionLayer]
    ids: InputSpec
    mask: InputSpec | None
    position_inputs: list[PositionTensor]
    """The tensors that say where the tokens of the step stand; empty where nothing asks for it."""
    position_encoding: PositionEncoding
    """How positions enter."""
    max_positions: int | None
    """How many positions there are, where a table bounds them."""

    probed_length: int
    """Over how many tokens its masks were looked at: beyond, a window may begin."""

    def to_kv_cache_spec(self) -> KVCacheSpec:
        """Return what was found, by names."""

        def told(side: KVTensor) -> CacheTensorSpec:
            names = side.state.name if side.state is not None else None, side.update.name or "", side.cache.name or ""
            return CacheTensorSpec(
                state=names[0], update=names[1], cache=names[2], head_size=side.head_size, dtype=str(side.dtype.numpy())
            )

        return KVCacheSpec(
            layers=tuple(
                LayerCacheSpec(
                    attention_node=layer.attention.name or "",
                    heads=layer.heads,
                    kv_heads=layer.kv_heads,
                    key=told(layer.key),
                    value=told(layer.value),
                    window=layer.visibility.window,
                )
                for layer in self.layers
            ),
            position_encoding=self.position_encoding,
            max_positions=self.max_positions,
            padding=any(layer.visibility.padding for layer in self.layers),
        )
