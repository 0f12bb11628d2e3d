"""KV cache specification of a decoder: the cache tensors of each layer, their cache policy, and how steps write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec

from ryzen_compile.spec.model_metadata import read_metadata, write_metadata
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

METADATA_KEY = "ryzen_compile.kv"
"""Key of a model's metadata under which its KV cache specification is stored, as JSON."""
SCHEMA_VERSION = 2
"""Schema version of the KV cache specification in the metadata."""

PositionEncoding = Literal["rope", "learned", "alibi", "none"]
StorageType = Literal["fp8", "8", "4"]
"""The type of quantized elements: float8 e4m3, or integers of 8 or 4 bits."""
PageScore = Literal["bound", "cosine"]
"""How kv-select scores pages: an upper bound of query times key, or the cosine with the mean direction of the keys."""
AttendedRows = Literal["cache", "past-then-update", "other"]
"""The rows that attention reads: the slots after the step; the slots before it, followed by the step's tokens; other rows."""


class StatisticsRef(Record, frozen=True):
    """A reference to a file of statistics that `calibrate` wrote."""

    file_name: str
    """The name of the file, without its folder."""
    sha256: str
    """SHA-256 of the file's bytes."""


class Quantization(Record, frozen=True):
    """The storage of quantized keys or values."""

    storage_type: StorageType
    scale_state: str
    """The state with the scales, (batch, kv_heads, slots)."""
    is_rotated: bool = False
    """Whether the codes are those of the rotated vectors, whose elements have similar magnitudes."""
    statistics: StatisticsRef | None = None
    """The file of the mean keys that are subtracted from keys before they are quantized; None: nothing is subtracted."""


class CacheTensorSpec(Record, frozen=True):
    """The cached keys, or the cached values, of one layer."""

    state: str | None
    """The state that carries the tensor across steps; None if the model has no cache."""
    update: str
    """The tensor that a step appends, (batch, kv_heads, seq, head_size)."""
    cache: str
    """The tensor after the step, (batch, kv_heads, rows, head_size)."""
    head_size: int
    """Number of elements per head."""
    dtype: str
    """The element type that attention reads."""
    quantization: Quantization | None = None

    @property
    def storage_name(self) -> str:
        """The type of the stored elements: the storage type if they are quantized, else the element type."""
        return self.dtype if self.quantization is None else self.quantization.storage_type


class SequentialWrite(Record, frozen=True, tag="sequential"):
    """TensorScatter writes the tokens of a step, padding included, to the slots after those of the tokens before it."""


class ScatterWrite(Record, frozen=True, tag="scatter"):
    """ScatterElements writes the token of a single-token step to one slot per head."""

    slots: str
    """The tensor with the slots, (batch, kv_heads, 1) int64."""
    is_written: str
    """The tensor that states where the slot is written, (batch, 1 or kv_heads, 1) bool; elsewhere it keeps its content."""


class AppendEvictWrite(Record, frozen=True, tag="append-evict"):
    """The custom op KVAppendEvict writes the tokens of a step."""

    slots: str
    """The tensor with the slot of each token, (batch, kv_heads, seq) int32; -1 for tokens that are not kept."""


class CircularWrite(Record, frozen=True, tag="circular"):
    """TensorScatter writes the token of a single-token step to slot position mod slots; for padding, what the slot held."""


class GatherWrite(Record, frozen=True, tag="gather"):
    """Each slot takes a token of the step, or keeps its content; several tokens may belong to one slot, the last is written."""

    token_indices: str
    """The tensor with the token of the step for each slot, (batch, slots) int64."""
    is_written: str
    """The tensor that states which slots take their token, (batch, slots) bool."""


SlotWrite = SequentialWrite | ScatterWrite | AppendEvictWrite | CircularWrite | GatherWrite
"""How a step writes its keys and values: each token to one slot, or not at all; no other slot changes."""


class GrowingCache(Record, frozen=True, tag="growing"):
    """All tokens are kept, and the cache grows with each step."""

    method: ClassVar[str | None] = None
    """The name of the method in reports; None: attention reads every token that it would read without a cache."""
    slots: ClassVar[int | None] = None
    """Number of cached tokens per head; None: unbounded."""
    write: ClassVar[SlotWrite | None] = None
    """How a step writes its tokens; None: it also moves tokens, or there are no slots."""
    attended: ClassVar[AttendedRows] = "cache"


class StaticCache(Record, frozen=True, tag="static"):
    """All tokens are kept; the token at position n is in slot n."""

    method: ClassVar[str | None] = None
    write: ClassVar[SlotWrite | None] = SequentialWrite()
    attended: ClassVar[AttendedRows] = "cache"

    slots: int
    """Number of slots per head: the maximum number of tokens of a sequence."""


class RingBuffer(Record, frozen=True, tag="ring-buffer"):
    """The first and the latest tokens are kept, at their positions inside the cache: StreamingLLM, arXiv 2309.17453.

    Without sinks, and with a window of at least the attention window of the layer, it is exact; `kv-static` writes it so.

    The token at position p is in slot p if it is one of the first `sinks` tokens, else in slot sinks + (p - sinks) mod window.
    """

    method: ClassVar[str | None] = "window"

    sinks: int
    """Number of tokens at the start of the sequence that are kept."""
    window: int
    """Number of latest tokens that are kept."""
    sink_state: str | None
    """The state with the unrotated keys of the sinks, (batch, kv_heads, sinks, head_size); None without sinks."""
    write: CircularWrite | GatherWrite | None
    """None: a step also rewrites the keys of the sinks."""
    attended: AttendedRows

    @property
    def slots(self) -> int:
        """Number of slots per head."""
        return self.sinks + self.window


class Eviction(Record, frozen=True, kw_only=True, tag="eviction"):
    """A new token replaces the token of the lowest score."""

    slots: int
    """Number of tokens that a head keeps."""
    score: str
    """The score by which tokens are kept."""
    sinks: int
    """Number of tokens at the start of the sequence that are never evicted."""
    recent_window: int
    """Number of latest tokens that are never evicted, at least 1."""
    rescore_interval: int = 0
    """Maximum number of single-token steps between recomputations of a time-dependent score from the cached keys; 0: never."""
    statistics: StatisticsRef | None = None
    """The statistics file with the weights of a calibrated score."""
    score_state: str
    """The state with the scores, (batch, kv_heads of all layers with as many slots, slots)."""
    position_state: str
    """The state with the token positions, of the same shape; -1 marks a free slot."""
    write: ScatterWrite | AppendEvictWrite
    attended: AttendedRows

    @property
    def method(self) -> str | None:
        """The name of the method in reports."""
        return self.score


class Compaction(Record, frozen=True, tag="compaction"):
    """A step of many tokens keeps those that its last queries attend to most: SnapKV, arXiv 2404.14469."""

    method: ClassVar[str | None] = "snapkv"

    slots: int
    """Number of slots per head: the tokens that a compaction keeps, and `append_slots`."""
    sinks: int
    """Number of tokens at the start of the sequence that are never evicted."""
    recent_window: int
    """Number of latest tokens that are never evicted, and of the queries whose attention selects the others; at least 2."""
    append_slots: int
    """Number of slots that a compaction leaves free for later tokens, at least 1."""
    pooling: int
    """Number of neighboring tokens over which a compaction averages attention weights, odd."""
    score_state: str
    """The state with the scores, (batch, kv_heads of all layers with as many slots, slots)."""
    position_state: str
    """The state with the token positions, of the same shape; -1 marks a free slot."""
    write: ScatterWrite | AppendEvictWrite | None
    """None: the steps of the graph may compact, which moves tokens."""
    attended: AttendedRows


class PageSelection(Record, frozen=True, tag="page-selection"):
    """All tokens are kept as in a static cache; a single-token step reads the pages of the highest scores: Quest."""

    method: ClassVar[str | None] = "select"
    write: ClassVar[SlotWrite | None] = SequentialWrite()

    slots: int
    """Number of slots per head: the maximum number of tokens of a sequence."""
    score: PageScore
    """The score by which pages are selected."""
    page_size: int
    """Number of tokens per page, at least 1; divides `slots`."""
    selected_pages: int
    """Number of pages that a single-token step reads, including the page of its own token; at least 1."""
    summary_states: tuple[str, ...]
    """The states with the page summaries, (batch, kv_heads, pages, head_size) each."""
    attended: AttendedRows


CachePolicy = GrowingCache | StaticCache | RingBuffer | Eviction | Compaction | PageSelection
"""Which tokens a layer keeps and reads, and how a step writes them."""


class LayerCacheSpec(Record, frozen=True):
    """The cache of one attention layer."""

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
    policy: CachePolicy = GrowingCache()

    @property
    def has_exact_ring(self) -> bool:
        """Whether the cache is a ring buffer that holds every token that a query attends to."""
        policy = self.policy
        return isinstance(policy, RingBuffer) and not policy.sinks and self.window is not None and policy.window >= self.window

    @property
    def method(self) -> str | None:
        """The name of the method in reports; None: attention reads every token that it would read without a cache."""
        return None if self.has_exact_ring else self.policy.method


class StepTensorsSpec(Record, frozen=True):
    """The tensors of a decoder with static caches that describe the tokens of a step."""

    mask: str
    """The padding mask input, (batch, seq) int64."""
    positions: str
    """The tensor with the positions of the step's tokens, (batch, seq) int64."""
    length_state: str
    """The state with the number of tokens of each sequence, (batch,) int64."""


class KVCacheSpec(Record, frozen=True):
    """The KV caches of a decoder."""

    layers: tuple[LayerCacheSpec, ...]
    position_encoding: PositionEncoding
    """How the model encodes token positions."""
    max_positions: int | None
    """Number of positions of a learned position table; None: unbounded."""
    padding: bool
    """Whether a mask hides padding tokens."""
    step: StepTensorsSpec | None = None
    """For static caches."""

    @property
    def is_static(self) -> bool:
        """Whether all caches have a fixed number of slots."""
        return all(layer.policy.slots is not None for layer in self.layers)

    @property
    def is_dense(self) -> bool:
        """Whether attention reads every token in all layers."""
        return all(layer.method is None for layer in self.layers)

    @property
    def is_unquantized(self) -> bool:
        """Whether no cache is quantized."""
        return all(tensor.quantization is None for layer in self.layers for tensor in (layer.key, layer.value))


def recorded_tensors(spec: KVCacheSpec) -> frozenset[str]:
    """Return the names of the tensors that `spec` refers to."""
    names: set[str] = set()

    def collect(name: str) -> str:
        names.add(name)
        return name

    _map_tensors(spec, collect)
    return frozenset(names)


def rename_tensors(spec: KVCacheSpec, new_names: Mapping[str, str]) -> KVCacheSpec:
    """Return `spec` with the tensors that it refers to renamed as in `new_names`, which maps old names to new ones."""
    return _map_tensors(spec, lambda name: new_names.get(name, name))


def _map_tensors(spec: KVCacheSpec, map_name: Callable[[str], str]) -> KVCacheSpec:
    replace = msgspec.structs.replace

    def map_tensor(tensor: CacheTensorSpec) -> CacheTensorSpec:
        return replace(tensor, update=map_name(tensor.update), cache=map_name(tensor.cache))

    def map_policy(policy: CachePolicy) -> CachePolicy:
        write = policy.write
        if isinstance(write, ScatterWrite):
            write = replace(write, slots=map_name(write.slots), is_written=map_name(write.is_written))
        elif isinstance(write, AppendEvictWrite):
            write = replace(write, slots=map_name(write.slots))
        elif isinstance(write, GatherWrite):
            write = replace(write, token_indices=map_name(write.token_indices), is_written=map_name(write.is_written))
        return policy if write is policy.write else replace(policy, write=write)

    layers = tuple(
        replace(layer, key=map_tensor(layer.key), value=map_tensor(layer.value), policy=map_policy(layer.policy))
        for layer in spec.layers
    )
    step = spec.step
    if step is not None:
        step = replace(step, mask=map_name(step.mask), positions=map_name(step.positions))
    return replace(spec, layers=layers, step=step)


def write_kv_cache_spec(model: ir.Model, spec: KVCacheSpec) -> None:
    """Write `spec` to the metadata of `model`."""
    write_metadata(model, METADATA_KEY, spec, schema_version=SCHEMA_VERSION)


def read_kv_cache_spec(model: ir.Model) -> KVCacheSpec | None:
    """Return the specification in the metadata of `model`, or None if the metadata has none.

    Raises:
        ModelError: The specification has another schema version, or cannot be decoded.
    """
    return read_metadata(model, METADATA_KEY, KVCacheSpec, schema_version=SCHEMA_VERSION)
