"""Write quantized caches: static states that hold codes of 4 or 8 bits, with a float32 scale per vector.

A token is quantized once, when it is appended, and its codes are written to the slot that its vectors were written to. Every
vector has its own scale, so that slots can be overwritten independently. Scores of tokens are computed before quantization.

Vectors are rotated before they are quantized to 4 bits or to int8: their largest elements, which determine the scale, are then
not much larger than the others. Attention reads the dequantized vectors in the rotated basis: the queries are rotated once
instead of every key, and the attention output is rotated back once instead of every value.

The mean of the keys may be subtracted first (`key_mean`). It is not added again: attention does not depend on it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import ModelInfo, next_node
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_compile.spec.kv_cache import (
    AppendEvictWrite,
    CacheTensorSpec,
    CircularWrite,
    Eviction,
    GatherWrite,
    Quantization,
    ScatterWrite,
    SequentialWrite,
    StatisticsRef,
    StorageType,
)
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.cache_rewriter import CacheRewriter
from ryzen_passes.kv.quant.key_mean import KEY_MEAN
from ryzen_passes.kv.scoring.statistics import Statistics
from ryzen_passes.kv.slot_writes import SlotAssignment, SlotSources
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView, StaticKVTensor
from ryzen_plugins.kv_append_evict import KV_APPEND_EVICT
from ryzen_plugins.vector_dequantize import VECTOR_DEQUANTIZE_FP8, VECTOR_DEQUANTIZE_INT8, VECTOR_DEQUANTIZE_ROTATED_INT4
from ryzen_plugins.vector_quantize import VECTOR_QUANTIZE_FP8, VECTOR_QUANTIZE_INT4, VECTOR_QUANTIZE_INT8, rotation_matrix

_BOOL, _INT8, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.INT64, ir.DataType.FLOAT
SCALE_BYTES = 4
_WRITE_OPS = {
    SequentialWrite: "TensorScatter",
    CircularWrite: "TensorScatter",
    GatherWrite: "Where",
    ScatterWrite: "ScatterElements",
    AppendEvictWrite: KV_APPEND_EVICT.name,
}
"""The op that writes the cache, by the type of its record."""
LayerStorageTypes = tuple[StorageType | None, StorageType | None]
"""The storage types of the keys and of the values of a layer; None: not quantized."""


@dataclass(frozen=True)
class QuantizationConfig:
    """What is quantized, and how."""

    storage_types: Sequence[LayerStorageTypes]
    """By layer."""
    statistics: Statistics | None
    """The mean keys, which are subtracted before keys are quantized; None: nothing is subtracted."""
    statistics_ref: StatisticsRef | None


_ORDER_HINT = "list kv-quant after the pass that decides which tokens are kept, such as kv-static or kv-evict"


@dataclass(frozen=True)
class Codec:
    """A storage type: the ops that encode and decode vectors."""

    quantize_op: Op
    dequantize_op: Op
    elements_per_byte: int
    """Number of elements per byte."""
    min_code: int
    max_code: int
    """The range of the int8 values that represent numbers; for fp8 those of non-negative numbers."""
    max_magnitude: float
    """The largest number that a code represents before scaling."""
    size_range: tuple[int, int]
    """The smallest and the largest supported vector size."""
    rotation: Literal["none", "graph", "op"] = "none"
    """Whether vectors are rotated before they are quantized: not, by the graph if their size allows it, or by the op."""

    def supports_size(self, size: int) -> bool:
        """Return whether vectors of `size` elements are supported."""
        return self.size_range[0] <= size <= self.size_range[1] and (self.rotation != "op" or _has_rotation(size))

    def is_rotated(self, size: int) -> bool:
        """Return whether the codes of vectors of `size` elements are in a rotated basis."""
        return self.rotation != "none" and _has_rotation(size)

    def row_bytes(self, size: int) -> int:
        """Return the bytes of one vector of `size` elements, scale included."""
        return size // self.elements_per_byte + SCALE_BYTES


def _has_rotation(size: int) -> bool:
    """Return whether there is a rotation of vectors of `size` elements: a Hadamard matrix of a power of two."""
    return 16 <= size <= 512 and size & (size - 1) == 0


CODECS: dict[StorageType, Codec] = {
    "fp8": Codec(VECTOR_QUANTIZE_FP8, VECTOR_DEQUANTIZE_FP8, 1, 0, 126, 448.0, (1, 8192)),
    "8": Codec(VECTOR_QUANTIZE_INT8, VECTOR_DEQUANTIZE_INT8, 1, -127, 127, 127.0, (1, 8192), rotation="graph"),
    "4": Codec(VECTOR_QUANTIZE_INT4, VECTOR_DEQUANTIZE_ROTATED_INT4, 2, -128, 127, 2.75, (16, 512), rotation="op"),
}
"""The codec of each storage type."""


def check_storage_types(view: StaticCacheView, storage_types: Sequence[LayerStorageTypes]) -> None:
    """Raise PatternNotMatched if a cache does not support its storage type.

    `storage_types` are those of keys and values, by layer; None: not quantized.
    """
    for layer, types in zip(view.layers, storage_types, strict=True):
        if types == (None, None):
            continue
        for name, tensor, storage_type in zip(("keys", "values"), (layer.key, layer.value), types, strict=True):
            if storage_type is not None and not CODECS[storage_type].supports_size(tensor.spec.head_size):
                codec = CODECS[storage_type]
                low, high = codec.size_range
                raise PatternNotMatched(
                    f"head size {tensor.spec.head_size} of the {name}: storage type {storage_type} requires "
                    f"{'a power of two ' if codec.rotation == 'op' else 'a size '}from {low} to {high}",
                    layer.spec.attention_node,
                    hint=f"kv-quant{{{name}={8 if codec.rotation == 'op' else 16}}}",
                )
        for input_index, tensor, storage_type in zip((1, 2), (layer.key, layer.value), types, strict=True):
            _check_write(layer, tensor)
            if storage_type is not None:
                _check_readers(layer, tensor, input_index)
        if isinstance(layer.spec.policy.write, AppendEvictWrite) and None in types:
            raise PatternNotMatched(
                f"{KV_APPEND_EVICT.name} requires keys and values of one element type, and only one of them would be quantized",
                layer.spec.attention_node,
                hint="quantize both: set the storage type of the other one to 8 instead of 16",
            )


def _check_write(layer: StaticCacheLayer, tensor: StaticKVTensor) -> None:
    """Raise PatternNotMatched if a step does not only write rows to slots, or not with the recorded op."""
    write, node = layer.spec.policy.write, tensor.cache.producer()
    if write is None:
        raise PatternNotMatched(
            "the caches are not written by kv-static or kv-evict", layer.spec.attention_node, hint=_ORDER_HINT
        )
    op_type = _WRITE_OPS[type(write)]
    if node is None or node.op_type != op_type:
        raise PatternNotMatched(
            f"the caches are not written by kv-static or kv-evict: the specification records {op_type} for this tensor",
            tensor.cache,
            hint=_ORDER_HINT,
        )
    if isinstance(write, AppendEvictWrite) and tensor.update not in node.inputs:
        raise PatternNotMatched(f"the {op_type} of the layer does not read this tensor", tensor.update)


def _check_readers(layer: StaticCacheLayer, tensor: StaticKVTensor, input_index: int) -> None:
    """Raise PatternNotMatched if a node reads the cache for another purpose than its write or the attention.

    `tensor` is input `input_index` of the attention.
    """
    policy, attention = layer.spec.policy, layer.attention
    ends = {attention, tensor.cache.producer()}
    for node in (node for value in (tensor.past, tensor.cache) for node in value.consumers()):
        if _reaches_outputs(node, ends):
            rescores = isinstance(policy, Eviction) and policy.rescore_interval > 0
            raise PatternNotMatched(
                f"reads the cache{' to rescore tokens' if rescores else ''}, and would read codes instead of keys or values",
                node,
                hint="use a score that is not rescored (kvzap), or set `rescore-interval=0` of kv-evict"
                if rescores
                else _ORDER_HINT,
            )
    if policy.attended == "other":
        raise PatternNotMatched(
            "reads selected rows of the cache, and would read codes instead of keys or values",
            attention,
            hint=_ORDER_HINT,
        )
    if policy.attended == "cache" and attention.inputs[input_index] is not tensor.cache:
        raise PatternNotMatched("the attention reads another tensor than its cache", attention, hint=_ORDER_HINT)


def _reaches_outputs(node: ir.Node, ends: Collection[ir.Node | None]) -> bool:
    """Return whether a path leads from `node` to an output of the graph and through none of `ends`."""
    pending, seen = [node], set[ir.Node]()
    while pending:
        current = pending.pop()
        if current in seen or current in ends:
            continue
        seen.add(current)
        if any(output.is_graph_output() for output in current.outputs):
            return True
        pending += [consumer for output in current.outputs for consumer in output.consumers()]
    return False


def quantize(view: StaticCacheView, model_info: ModelInfo, config: QuantizationConfig) -> Change:
    """Rewrite `view` in place so that its states hold codes of storage types that `check_storage_types` accepts."""
    return _QuantizationRewriter(view, model_info, config).run()


class _QuantizationRewriter(CacheRewriter):
    """The rewrite of one graph to quantized caches."""

    def __init__(self, view: StaticCacheView, model_info: ModelInfo, config: QuantizationConfig) -> None:
        super().__init__(view, model_info)
        self._config = config
        self._sequential_slots_by_heads: dict[int, SlotAssignment] = {}

    def run(self) -> Change:
        quantized: list[StaticCacheLayer] = []
        for index, (layer, types) in enumerate(zip(self.view.layers, self._config.storage_types, strict=True)):
            if types != (None, None):
                self._quantize_layer(index, layer, types)
                quantized.append(layer)
        summary = f"{len(quantized)} of {len(self.view.layers)} layers are quantized"
        if self._config.statistics is not None:
            summary += ", keys without their mean"
        return self.finish(summary, changed=quantized)

    def _quantize_layer(self, index: int, layer: StaticCacheLayer, storage_types: LayerStorageTypes) -> None:
        assignment = self._assign_slots(layer)
        specs: list[CacheTensorSpec] = []
        for input_index, tensor, storage_type in zip((1, 2), (layer.key, layer.value), storage_types, strict=True):
            if storage_type is None:
                specs.append(tensor.spec)
                continue
            statistics = self._config.statistics if tensor is layer.key else None
            mean = None if statistics is None else statistics.tensor(index, KEY_MEAN)
            specs.append(self._quantize_tensor(layer, input_index, tensor, storage_type, assignment, mean))
            if CODECS[storage_type].is_rotated(tensor.spec.head_size):
                if tensor is layer.key:
                    self._rotate_queries(layer)
                else:
                    self._unrotate_output(layer)
        self.record_layer(layer, key=specs[0], value=specs[1])

    def _quantize_tensor(
        self,
        layer: StaticCacheLayer,
        input_index: int,
        tensor: StaticKVTensor,
        storage_type: StorageType,
        assignment: SlotAssignment | SlotSources,
        mean: np.ndarray[Any, Any] | None,
    ) -> CacheTensorSpec:
        """Quantize the state of `tensor`, which is input `input_index` of the attention; return its new specification.

        `mean` (kv_heads, head_size) is subtracted from the vectors first.
        """
        codec, before, policy = CODECS[storage_type], layer.attention, layer.spec.policy
        state = self.states[tensor.spec.state or ""]
        past, cache, write = tensor.past, tensor.cache, tensor.cache.producer()
        assert write is not None
        is_custom_write = isinstance(policy.write, AppendEvictWrite)
        slots, dtype, size = layer.slots, self.writer.types[tensor.update], tensor.spec.head_size
        new, place = tensor.update, write if is_custom_write else before
        if mean is not None:
            new = self.op(place, "Sub", [new, self.writer.constant(mean[None, :, None], dtype)], shape=new.shape)
        centered = new
        if codec.is_rotated(size) and (codec.rotation == "graph" or policy.attended != "cache"):
            new = self._rotate(place, new, size)
        source = centered if codec.rotation == "op" else new
        codes, scale = self.custom_op(place, codec.quantize_op, [source], [_INT8, _FLOAT])
        self._set_int8(past, self.cache_shape(layer, slots, size // codec.elements_per_byte))
        self.states.register(state, low=codec.min_code, high=codec.max_code)
        past_scale = self.states.add_input(
            f"{state.name}.scale",
            _FLOAT,
            self.cache_shape(layer, slots),
            input_name=f"{state.input}.scale",
            low=0,
            high=1 / codec.max_magnitude,
        )
        if is_custom_write:
            write.replace_input_with(list(write.inputs).index(tensor.update), codes)
            self._set_int8(cache, past.shape)
        else:
            cache = self._write(before, past, codes, assignment)
            self.replace_cache(tensor, cache)
        cache_scale = self._write(before, past_scale, scale, assignment)
        self.states.set_output(f"{state.name}.scale", cache_scale, output_name=f"{state.output}.scale", in_place=state.in_place)
        self._dequantize_for_attention(layer, input_index, new, codec, dtype, size, (past, past_scale), (cache, cache_scale))
        quantization = Quantization(
            storage_type=storage_type,
            scale_state=f"{state.name}.scale",
            is_rotated=codec.is_rotated(size),
            statistics=None if mean is None else self._config.statistics_ref,
        )
        return msgspec.structs.replace(tensor.spec, quantization=quantization)

    def _set_int8(self, value: ir.Value, shape: ir.Shape | None) -> None:
        value.type, value.shape = ir.TensorType(_INT8), shape
        self.writer.types[value] = _INT8

    def _dequantize_for_attention(
        self,
        layer: StaticCacheLayer,
        input_index: int,
        new: ir.Value,
        codec: Codec,
        dtype: ir.DataType,
        size: int,
        past: tuple[ir.Value, ir.Value],
        cache: tuple[ir.Value, ir.Value],
    ) -> None:
        """Make attention read dequantized vectors as its input `input_index`: of the slots after or before the step.

        `past` and `cache` are codes and scales. Slots from before the step are followed by `new`, the unquantized tokens of the
        step in the basis of the codes.
        """
        before, attended = layer.attention, layer.attention.inputs[input_index]
        if layer.spec.policy.attended == "cache":
            before.replace_input_with(input_index, self._dequantize(before, codec, cache, dtype, size))
            return
        vectors = self._dequantize(before, codec, past, dtype, size)
        before.replace_input_with(input_index, self.op(before, "Concat", [vectors, new], axis=2))
        if attended is not None and (producer := attended.producer()) is not None:
            self.dead_candidates.append(producer)

    def _dequantize(
        self, before: ir.Node, codec: Codec, quantized: tuple[ir.Value, ir.Value], dtype: ir.DataType, head_size: int
    ) -> ir.Value:
        """Return the vectors (batch, kv_heads, slots, head_size) of codes and scales, in the basis of the codes."""
        codes, scale = quantized
        (vectors,) = self.custom_op(before, codec.dequantize_op, [codes, scale, self.writer.scalar(0.0, dtype)], [dtype])
        vectors.shape = ir.Shape((*(codes.shape or ())[:3], head_size))
        return vectors

    def _rotate(self, before: ir.Node, vectors: ir.Value, size: int, *, inverse: bool = False) -> ir.Value:
        """Return `vectors` (..., size) in the basis of the codes, or with `inverse` in the original basis."""
        dtype = self.writer.types[vectors]
        matrix = rotation_matrix(size)
        factor = self.writer.constant(matrix if inverse else matrix.T, dtype)
        return self.op(before, "MatMul", [vectors, factor], shape=vectors.shape)

    def _rotate_queries(self, layer: StaticCacheLayer) -> None:
        node, size = layer.attention, layer.key.spec.head_size
        queries = node.inputs[0]
        assert queries is not None
        node.replace_input_with(0, self._rotate(node, queries, size))

    def _unrotate_output(self, layer: StaticCacheLayer) -> None:
        node = layer.attention
        output = node.outputs[0]
        uses = list(output.uses())
        unrotated = self._rotate(next_node(self.graph, node), output, layer.value.spec.head_size, inverse=True)
        for use in uses:
            use.node.replace_input_with(use.idx, unrotated)

    # Slots

    def _write(self, before: ir.Node, past: ir.Value, rows: ir.Value, assignment: SlotAssignment | SlotSources) -> ir.Value:
        if isinstance(assignment, SlotSources):
            return self.slot_writer.gather(before, past, rows, assignment)[1]
        return self.slot_writer.scatter(before, past, rows, assignment)

    def _assign_slots(self, layer: StaticCacheLayer) -> SlotAssignment | SlotSources:
        """Return the slots that the tokens of the step are written to, or the tokens that the slots take."""
        write = layer.spec.policy.write
        if isinstance(write, SequentialWrite):
            return self._sequential_slots(layer.spec.kv_heads)
        if isinstance(write, CircularWrite):
            return self._circular_slots(layer.spec.kv_heads, layer.slots)
        if isinstance(write, GatherWrite):
            assert layer.token_indices is not None
            assert layer.is_written is not None
            return SlotSources(token_indices=layer.token_indices, is_written=layer.is_written)
        assert layer.written_slots is not None
        if isinstance(write, ScatterWrite):
            return SlotAssignment(slots=layer.written_slots, is_written=layer.is_written)
        return self._slots_from_custom_op(layer.attention, layer.written_slots)

    def _sequential_slots(self, heads: int) -> SlotAssignment:
        """Return the slots after the tokens of each sequence: one for each token of the step, padding included."""
        if heads not in self._sequential_slots_by_heads:
            before = next_node(self.graph, self.view.length.producer())
            if isinstance(self.view.seq, int):
                rank = self.writer.constant(np.arange(self.view.seq), _INT64)
            else:
                tokens = self.op(before, "Shape", [self.view.mask], _INT64, start=1, end=2)
                rank = self.op(before, "Range", [self.int64(0), self.op(before, "Squeeze", [tokens]), self.int64(1)])
            start = self.unsqueeze(before, self.view.length, 1, 2)
            slots = self.expand(before, self.op(before, "Add", [start, rank]), 1, heads, 1)
            self._sequential_slots_by_heads[heads] = SlotAssignment(slots=slots)
        return self._sequential_slots_by_heads[heads]

    def _circular_slots(self, heads: int, slots: int) -> SlotAssignment:
        """Return the slot of the single token of the step in a ring buffer; padding is not written."""
        before = self.insertion_point

        def write_slot() -> ir.Value:
            slot = self.op(before, "Mod", [self.unsqueeze(before, self.view.length, 1, 2), self.int64(slots)])
            return self.expand(before, slot, 1, heads, 1)

        return SlotAssignment(
            slots=self.shared(("circular", heads, slots), write_slot),
            is_written=self.shared("is token", lambda: self.unsqueeze(before, self.bool_mask(), 2)),
        )

    def _slots_from_custom_op(self, before: ir.Node, slot: ir.Value) -> SlotAssignment:
        """Return the slots that KVAppendEvict wrote to; `slot` (batch, kv_heads, seq) is -1 for tokens that it did not keep.

        These tokens repeat the write of the first kept token; if no token is kept, slot 0 keeps its content.
        """
        zero, last_axis = self.int64(0), self.writer.int64_vector(-1)
        slot_int64 = self.cast(before, slot, _INT64)
        is_kept = self.op(before, "GreaterOrEqual", [slot_int64, zero], _BOOL)
        clamped = self.op(before, "Max", [slot_int64, zero])
        if self.view.seq == 1:
            return SlotAssignment(slots=clamped, is_written=is_kept)
        one = self.int64(1)
        tokens = self.op(before, "Squeeze", [self.op(before, "Shape", [slot], _INT64, start=2, end=3)])
        index = self.op(before, "Range", [zero, tokens, one], _INT64)
        index_if_kept = self.op(before, "Where", [is_kept, index, tokens], _INT64)
        first = self.op(before, "ReduceMin", [index_if_kept, last_axis], keepdims=1)
        any_kept = self.op(before, "Less", [first, tokens], _BOOL)
        first = self.op(before, "Min", [first, self.op(before, "Sub", [tokens, one])])
        source = self.op(before, "Where", [is_kept, index, first], _INT64)
        slots = self.op(before, "GatherElements", [clamped, source], axis=2)
        return SlotAssignment(slots=slots, is_written=any_kept, token_indices=source)
