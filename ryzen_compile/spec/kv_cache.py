"""The caches of a decoder, as a table: which layer keeps what, of which size, and what its queries see of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

KEY = "ryzen_compile.kv"
"""Under this key a model's metadata holds the map of its caches, as JSON."""

Positions = Literal["rope", "learned", "alibi", "none"]


class CachedTensor(Record, frozen=True):
    """The keys, or the values, of one layer."""

    state: str | None
    """The state that carries them from step to step; None where the model has no cache."""
    new: str
    """The tensor (batch, kv_heads, seq, size) that a step adds."""
    whole: str
    """The tensor (batch, kv_heads, rows, size) that attention reads."""
    size: int
    """Elements a head."""
    dtype: str
    """The element type that attention reads."""
    bits: str | None = None
    """What a state of codes holds for each element: `fp8`, `8` or `4` bits; None: the element itself."""
    scale: str | None = None
    """The state of the scales of codes, (batch, kv_heads, slots)."""


class Fitted(Record, frozen=True):
    """The file of what a calibrated score was fitted to."""

    path: str
    """As it was named."""
    sha256: str
    """Of its bytes."""


class CachedLayer(Record, frozen=True):
    """One attention."""

    attention: str
    """Its node."""
    heads: int
    """Heads of the queries."""
    kv_heads: int
    """Heads of the keys and values."""
    key: CachedTensor
    value: CachedTensor
    window: int | None
    """How many tokens a query sees, itself included; None: all before it."""
    slots: int | None = None
    """How many tokens a head keeps; None: the cache grows."""
    method: str = "all"
    """What is kept: `all`, or the score by which tokens are evicted."""
    sinks: int = 0
    """How many of the first tokens are never evicted."""
    recent: int = 0
    """How many of the latest tokens are never evicted."""
    every: int = 0
    """Within how many steps of one token a score that ages is told again; 0: never."""
    statistics: Fitted | None = None
    """Where a calibrated score has its weights from."""
    score: str | None = None
    """The state of the scores, (batch, kv_heads, slots)."""
    position: str | None = None
    """The state of the positions, (batch, kv_heads, slots), -1 where a slot is free."""
    room: int = 0
    """How many slots a step leaves free that compacts them to what its last `recent` queries attend to; 0: none does."""
    pooling: int = 1
    """Over how many neighbours a compaction averages what is attended to."""
    page: int = 0
    """Tokens a page, where a step of one token reads some of the pages; 0: it reads all tokens."""
    keep: int = 0
    """How many pages it reads, its own among them."""
    picks: str | None = None
    """What it picks them by: `bound` or `cosine`."""


class CacheMap(Record, frozen=True):
    """The caches of a decoder."""

    layers: tuple[CachedLayer, ...]
    positions: Positions
    """How the position of a token enters."""
    longest: int | None
    """How many positions there are, where a table bounds them."""
    padding: bool
    """Whether a mask hides tokens."""
    mask: str | None = None
    """Of fixed caches: the input (batch, seq) that tells tokens from padding."""
    token_positions: str | None = None
    """Of fixed caches: the tensor (batch, seq) of the positions of a step's tokens."""

    @property
    def is_fixed(self) -> bool:
        """Whether the caches are of fixed size."""
        return all(layer.slots is not None for layer in self.layers)

    @property
    def is_exact(self) -> bool:
        """Whether keys and values are kept as they are, not as codes."""
        return all(side.bits is None for layer in self.layers for side in (layer.key, layer.value))


def attach(model: ir.Model, cache_map: CacheMap) -> None:
    """Record `cache_map` in the metadata of `model`."""
    model.metadata_props[KEY] = msgspec.json.encode(cache_map).decode()


def recorded(model: ir.Model) -> CacheMap | None:
    """Return what `attach` recorded, or None where there is nothing, or nothing that can be read."""
    text = model.metadata_props.get(KEY)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=CacheMap)
    except msgspec.DecodeError:
        return None
