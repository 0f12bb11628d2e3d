"""KV cache specification of a decoder: the cache tensors of each layer, their sizes, and the retention policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ryzen_compile.spec.model_metadata import read_metadata, write_metadata
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

METADATA_KEY = "ryzen_compile.kv"
"""Key of a model's metadata under which its KV cache specification is stored, as JSON."""
SCHEMA_VERSION = 1
"""Schema version of the KV cache specification in the metadata."""

PositionEncoding = Literal["rope", "learned", "alibi", "none"]


class CacheTensorSpec(Record, frozen=True):
    """The cached keys, or the cached values, of one layer."""

    state: str | None
    """The state that carries the tensor across steps; None if the model has no cache."""
    update: str
    """The tensor that a step appends, (batch, kv_heads, seq, head_size)."""
    cache: str
    """The tensor that attention reads, (batch, kv_heads, rows, head_size)."""
    head_size: int
    """Number of elements per head."""
    dtype: str
    """The element type that attention reads."""
    storage_type: str | None = None
    """The storage type of each element of a quantized state: `fp8`, or `8` or `4` for integer bits; None: not quantized."""
    scale_state: str | None = None
    """The state with the scales of a quantized state, (batch, kv_heads, slots)."""


class StatisticsRef(Record, frozen=True):
    """A reference to the statistics file of a calibrated score."""

    path: str
    """The path as the user specified it."""
    sha256: str
    """SHA-256 of the file's bytes."""


class LayerCacheSpec(Record, frozen=True):
    """The cache of one attention layer, and its retention policy."""

    attention_node: str
    """Name of the attention node."""
    heads: int
    """Number of query heads."""
    kv_heads: int
    """Number of key/value heads."""
    key: CacheTensorSpec
    value: CacheTensorSpec
    window: int | None
    """Number of tokens that a query attends to, including itself; None: all tokens up to itself."""
    slots: int | None = None
    """Number of cached tokens per head; None: the cache grows with each step."""
    method: str = "all"
    """The retention policy: `all`, or the score by which tokens are evicted."""
    sinks: int = 0
    """Number of tokens at the start of the sequence that are never evicted."""
    recent_window: int = 0
    """Number of most recent tokens that are never evicted."""
    rescore_interval: int = 0
    """Maximum number of single-token steps between recomputations of a time-dependent score; 0: never recomputed."""
    statistics: StatisticsRef | None = None
    """The statistics file with the weights of a calibrated score."""
    score_state: str | None = None
    """The state with the scores, (batch, kv_heads, slots)."""
    position_state: str | None = None
    """The state with the token positions, (batch, kv_heads, slots); -1 marks a free slot."""
    append_slots: int = 0
    """Number of slots that a compaction leaves free for later tokens; a compaction keeps the tokens that the last
    `recent_window` queries of the step attend to most. 0: steps do not compact."""
    pooling: int = 1
    """Number of neighboring tokens over which a compaction averages attention weights."""
    page_size: int = 0
    """Number of tokens per page, if a single-token step reads only selected pages; 0: it reads all tokens."""
    selected_pages: int = 0
    """Number of pages that a single-token step reads, including the page of its own token."""
    page_score: str | None = None
    """The score by which pages are selected: `bound` or `cosine`."""


class KVCacheSpec(Record, frozen=True):
    """The KV caches of a decoder."""

    layers: tuple[LayerCacheSpec, ...]
    position_encoding: PositionEncoding
    """How the model encodes token positions."""
    max_positions: int | None
    """Number of positions of a learned position table; None: unbounded."""
    padding: bool
    """Whether a mask hides padding tokens."""
    mask: str | None = None
    """For static caches: the padding mask input, (batch, seq)."""
    token_positions: str | None = None
    """For static caches: the tensor with the positions of the step's tokens, (batch, seq)."""

    @property
    def is_static(self) -> bool:
        """Whether all caches have a fixed number of slots."""
        return all(layer.slots is not None for layer in self.layers)

    @property
    def is_unquantized(self) -> bool:
        """Whether no cache is quantized."""
        return all(tensor.storage_type is None for layer in self.layers for tensor in (layer.key, layer.value))


def write_kv_cache_spec(model: ir.Model, spec: KVCacheSpec) -> None:
    """Write `spec` to the metadata of `model`."""
    write_metadata(model, METADATA_KEY, spec, schema_version=SCHEMA_VERSION)


def read_kv_cache_spec(model: ir.Model) -> KVCacheSpec | None:
    """Return the specification in the metadata of `model`, or None if the metadata has none.

    Raises:
        ModelError: The specification has another schema version, or cannot be decoded.
    """
    return read_metadata(model, METADATA_KEY, KVCacheSpec, schema_version=SCHEMA_VERSION)
