"""The caches of a decoder, as a table: which layer keeps what, of which size, and what its queries see of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

METADATA_KEY = "ryzen_compile.kv"
"""Under this key a model's metadata holds the map of its caches, as JSON."""

PositionEncoding = Literal["rope", "learned", "alibi", "none"]


class CacheTensorSpec(Record, frozen=True):
    """The keys, or the values, of one layer."""

    state: str | None
    """The state that carries them from step to step; None where the model has no cache."""
    update: str
    """The tensor (batch, kv_heads, seq, size) that a step adds."""
    cache: str
    """The tensor (batch, kv_heads, rows, size) that attention reads."""
    head_size: int
    """Elements a head."""
    dtype: str
    """The element type that attention reads."""
    storage_type: str | None = None
    """What a state of codes holds for each element: `fp8`, `8` or `4` bits; None: the element itself."""
    scale_state: str | None = None
    """The state of the scales of codes, (batch, kv_heads, slots)."""


class StatisticsRef(Record, frozen=True):
    """The file of what a calibrated score was fitted to."""

    path: str
    """As it was named."""
    sha256: str
    """Of its bytes."""


class LayerCacheSpec(Record, frozen=True):
    """One attention."""

    attention_node: str
    """Its node."""
    heads: int
    """Heads of the queries."""
    kv_heads: int
    """Heads of the keys and values."""
    key: CacheTensorSpec
    value: CacheTensorSpec
    window: int | None
    """How many tokens a query sees, itself included; None: all before it."""
    slots: int | None = None
    """How many tokens a head keeps; None: the cache grows."""
    method: str = "all"
    """What is kept: `all`, or the score by which tokens are evicted."""
    sinks: int = 0
    """How many of the first tokens are never evicted."""
    recent_window: int = 0
    """How many of the latest tokens are never evicted."""
    rescore_interval: int = 0
    """Within how many steps of one token a score that ages is told again; 0: never."""
    statistics: StatisticsRef | None = None
    """Where a calibrated score has its weights from."""
    score_state: str | None = None
    """The state of the scores, (batch, kv_heads, slots)."""
    position_state: str | None = None
    """The state of the positions, (batch, kv_heads, slots), -1 where a slot is free."""
    append_slots: int = 0
    """How many slots a step leaves free that compacts them to what its last `recent` queries attend to; 0: none does."""
    pooling: int = 1
    """Over how many neighbours a compaction averages what is attended to."""
    page_size: int = 0
    """Tokens a page, where a step of one token reads some of the pages; 0: it reads all tokens."""
    selected_pages: int = 0
    """How many pages it reads, its own among them."""
    page_score: str | None = None
    """What it picks them by: `bound` or `cosine`."""


class KVCacheSpec(Record, frozen=True):
    """The caches of a decoder."""

    layers: tuple[LayerCacheSpec, ...]
    position_encoding: PositionEncoding
    """How the position of a token enters."""
    max_positions: int | None
    """How many positions there are, where a table bounds them."""
    padding: bool
    """Whether a mask hides tokens."""
    mask: str | None = None
    """Of fixed caches: the input (batch, seq) that tells tokens from padding."""
    token_positions: str | None = None
    """Of fixed caches: the tensor (batch, seq) of the positions of a step's tokens."""

    @property
    def is_static(self) -> bool:
        """Whether the caches are of fixed size."""
        return all(layer.slots is not None for layer in self.layers)

    @property
    def is_unquantized(self) -> bool:
        """Whether keys and values are kept as they are, not as codes."""
        return all(side.storage_type is None for layer in self.layers for side in (layer.key, layer.value))


def write_kv_cache_spec(model: ir.Model, spec: KVCacheSpec) -> None:
    """Record `cache_map` in the metadata of `model`."""
    model.metadata_props[METADATA_KEY] = msgspec.json.encode(spec).decode()


def read_kv_cache_spec(model: ir.Model) -> KVCacheSpec | None:
    """Return what `attach` recorded, or None where there is nothing, or nothing that can be read."""
    text = model.metadata_props.get(METADATA_KEY)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=KVCacheSpec)
    except msgspec.DecodeError:
        return None
