"""A decoder as its passes see it: its layers, the tensors that hold their caches, and what tells it the time."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.spec.interface import InputSpec, Interface, State
from ryzen_compile.spec.kv_cache import CachedLayer, CachedTensor, CacheMap, Positions
from ryzen_passes.kv.recognition.position_subgraph import Clockwork


class Unrecognised(Exception):
    """Why a model is no decoder whose caches can be rewritten: what was expected, and the node where it was not so."""

    def __init__(self, says: str, where: str, hint: str | None = None) -> None:
        super().__init__(says)
        self.says, self.where, self.hint = says, where, hint


@dataclass(frozen=True)
class Sight:
    """Which keys a query sees: all before it and itself, as far back as `window` tokens, but for padding."""

    window: int | None
    """How many tokens a query sees, itself included; None: all."""
    padding: bool
    """Whether an attention mask hides tokens."""
    slopes: tuple[float, ...] = ()
    """What each head adds to a score for every position that the key is further on (ALiBi); empty: nothing."""


@dataclass
class Side:
    """The keys, or the values, of one layer."""

    state: State | None
    """The state that carries them; None where the model has no cache."""
    new: ir.Value
    """(batch, kv_heads, seq, size): those of the step."""
    whole: ir.Value
    """(batch, kv_heads, past+seq, size): what attention reads; `new` where there is no cache."""
    size: int
    dtype: ir.DataType

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one head."""
        return self.size * int(self.dtype.numpy().itemsize)


@dataclass
class Layer:
    """One attention of the decoder."""

    attention: ir.Node
    """An ONNX Attention over (batch, heads, seq, size)."""
    key: Side
    value: Side
    heads: int
    kv_heads: int
    sight: Sight


@dataclass(frozen=True)
class Clock:
    """A tensor of positions: (batch or 1, 1, ..., seq, 1, ...), or (seq,) where it indexes a table."""

    value: ir.Value
    rank: int
    axis: int
    """The axis of the tokens."""


@dataclass
class Decoder:
    """A decoder whose caches were found."""

    model: ir.Model
    interface: Interface
    clockwork: Clockwork
    layers: list[Layer]
    ids: InputSpec
    mask: InputSpec | None
    clocks: list[Clock]
    """The tensors that say where the tokens of the step stand; empty where nothing asks for it."""
    style: Positions
    """How positions enter."""
    longest: int | None
    """How many positions there are, where a table bounds them."""

    looked: int
    """Over how many tokens its masks were looked at: beyond, a window may begin."""

    def as_map(self) -> CacheMap:
        """Return what was found, by names."""

        def told(side: Side) -> CachedTensor:
            names = side.state.name if side.state is not None else None, side.new.name or "", side.whole.name or ""
            return CachedTensor(state=names[0], new=names[1], whole=names[2], size=side.size, dtype=str(side.dtype.numpy()))

        return CacheMap(
            layers=tuple(
                CachedLayer(
                    attention=layer.attention.name or "",
                    heads=layer.heads,
                    kv_heads=layer.kv_heads,
                    key=told(layer.key),
                    value=told(layer.value),
                    window=layer.sight.window,
                )
                for layer in self.layers
            ),
            positions=self.style,
            longest=self.longest,
            padding=any(layer.sight.padding for layer in self.layers),
        )
