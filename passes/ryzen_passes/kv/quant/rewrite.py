"""Quantised caches: fixed ones whose states are codes of 4 or 8 bits, with a scale for every vector.

A token is quantised once, when it is appended, and its codes go where its vectors went: caches keep their form. Every vector
has a scale of its own, so that a slot may be overwritten. What is worth keeping is told before: scores are made of the keys as
they came.

Attention reads the vectors that the codes stand for. Those of 4 bits lie in a rotated basis and stay there: the queries
are rotated once in place of every key, and what attention gives is rotated back once in place of every value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.spec.kv_cache import CacheTensorSpec, LayerCacheSpec, write_kv_cache_spec
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.recognition.recognized_decoder import PatternNotMatched
from ryzen_passes.kv.state_editor import StateEditor
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView, StaticKVTensor
from ryzen_passes.kv.static.step_positions import NODE_NAME_PREFIX
from ryzen_passes.opset import standard_opset
from ryzen_plugins.kv_append_evict import KV_APPEND_EVICT
from ryzen_plugins.vector_dequantize import VECTOR_DEQUANTIZE_FP8, VECTOR_DEQUANTIZE_INT8, VECTOR_DEQUANTIZE_ROTATED_INT4
from ryzen_plugins.vector_quantize import VECTOR_QUANTIZE_FP8, VECTOR_QUANTIZE_INT4, VECTOR_QUANTIZE_INT8, rotation_matrix

_BOOL, _INT8, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.INT64, ir.DataType.FLOAT
SCALE_BYTES = 4


@dataclass(frozen=True)
class Codec:
    """One way to keep a vector."""

    quantize_op: Op
    dequantize_op: Op
    elements_per_byte: int
    """How many elements share a byte."""
    min_code: int
    max_code: int
    """The bytes that stand for numbers; of fp8 the positive ones."""
    max_magnitude: float
    """The largest number that a code stands for."""
    size_range: tuple[int, int]
    """The least and the most elements of a vector."""
    is_rotated: bool = False
    """Whether codes are in a rotated basis, for which sizes are powers of two."""

    def supports_size(self, size: int) -> bool:
        """Return whether vectors of `size` elements can be kept so."""
        return self.size_range[0] <= size <= self.size_range[1] and not (self.is_rotated and size & (size - 1))

    def row_bytes(self, size: int) -> int:
        """Return the bytes of one vector of `size` elements, its scale among them."""
        return size // self.elements_per_byte + SCALE_BYTES


CODECS = {
    "fp8": Codec(VECTOR_QUANTIZE_FP8, VECTOR_DEQUANTIZE_FP8, 1, 0, 126, 448.0, (1, 8192)),
    "8": Codec(VECTOR_QUANTIZE_INT8, VECTOR_DEQUANTIZE_INT8, 1, -127, 127, 127.0, (1, 8192)),
    "4": Codec(VECTOR_QUANTIZE_INT4, VECTOR_DEQUANTIZE_ROTATED_INT4, 2, -128, 127, 2.75, (16, 512), is_rotated=True),
}
"""By the bits of an element."""


@dataclass(frozen=True)
class SlotAssignment:
    """Where the rows of a step go."""

    slots: ir.Value
    """(batch, kv_heads, seq) int64: the slots, each another one, or one again for the same row."""
    is_written: ir.Value | None = None
    """(batch, 1 or kv_heads, 1 or seq) bool: where it is not true the slot keeps what it holds."""
    token_indices: ir.Value | None = None
    """(batch, kv_heads, seq) int64: which of the step's tokens goes there; None: each to its own."""


def cache_write_op(layer: StaticCacheLayer) -> str:
    """Return the op that writes the caches of `layer`; raises Unrecognised where it is none that is known."""
    makers = [(side.cache.producer(), side) for side in (layer.key, layer.value)]
    ops = {node.op_type if node is not None and _is_cache_write(node, side) else "" for node, side in makers}
    if len(ops) != 1 or "" in ops:
        raise PatternNotMatched(
            "its caches are not written as kv-static or kv-evict leave them",
            layer.spec.attention_node,
            hint="put kv-quant right behind kv-static or kv-evict",
        )
    return ops.pop()


def _is_cache_write(node: ir.Node, tensor: StaticKVTensor) -> bool:
    inputs = list(node.inputs)
    if node.op_type == "TensorScatter":
        return inputs[:2] == [tensor.past, tensor.update] and int_attribute(node, "axis", -2) in (-2, 2)
    if node.op_type == "ScatterElements":
        return inputs[0] is tensor.past and int_attribute(node, "axis", 0) == 2 and _match_evicting_scatter(tensor) is not None
    return node.op_type == KV_APPEND_EVICT.name and tensor.past in inputs and tensor.update in inputs


def _match_evicting_scatter(tensor: StaticKVTensor) -> tuple[ir.Value, ir.Value] | None:
    """Return the slots (batch, kv_heads, 1) that one token of kv-evict goes to, and whether it is one (batch, 1, 1)."""
    scatter = tensor.cache.producer()
    spread, choice = (scatter.inputs[at].producer() for at in (1, 2)) if scatter is not None else (None, None)  # type: ignore[union-attr]
    if spread is None or choice is None or (spread.op_type, choice.op_type) != ("Expand", "Where"):
        return None
    makers = [value.producer() if value is not None else None for value in (spread.inputs[0], choice.inputs[0])]
    slot, real = (node.inputs[0] if node is not None and node.op_type == "Unsqueeze" else None for node in makers)
    return (slot, real) if slot is not None and real is not None and choice.inputs[1] is tensor.update else None


def _unsupported_reader(layer: StaticCacheLayer, tensor: StaticKVTensor) -> ir.Node | None:
    """Return a node that reads the cache, before or after the step, and neither writes it nor hands it to the attention."""
    writer = tensor.cache.producer()

    def serves(node: ir.Node) -> bool:
        if node is writer or node is layer.attention:
            return True
        return node.op_type in ("Concat", "Where", "GatherElements") and all(map(serves, node.outputs[0].consumers()))

    return next((node for value in (tensor.past, tensor.cache) for node in value.consumers() if not serves(node)), None)


def check_storage_types(view: StaticCacheView, storage_types: Sequence[tuple[str | None, str | None]]) -> None:
    """Raise Unrecognised where caches cannot be kept in `bits` (of the keys and of the values, by layer; None: as they are)."""
    for layer, both in zip(view.layers, storage_types, strict=True):
        if both == (None, None):
            continue
        for word, side, one in zip(("keys", "values"), (layer.key, layer.value), both, strict=True):
            if one is not None and not CODECS[one].supports_size(side.spec.head_size):
                low, high = CODECS[one].size_range
                power = "a power of two " if CODECS[one].is_rotated else ""
                raise PatternNotMatched(
                    f"its {word} are of {side.spec.head_size} elements, codes of {one} take {power}from {low} to {high}",
                    layer.spec.attention_node,
                    hint=f"kv-quant{{{word}=8}}" if CODECS[one].is_rotated else f"kv-quant{{{word}=16}}",
                )
        kind = cache_write_op(layer)
        for side, one in zip((layer.key, layer.value), both, strict=True):
            if one is not None and (reader := _unsupported_reader(layer, side)) is not None:
                again = layer.spec.rescore_interval > 0
                raise PatternNotMatched(
                    f"it reads what the slots hold{' to tell scores again' if again else ''}, and would read codes",
                    reader.name or reader.op_type,
                    hint="take a score that is told once, kvzap, or `every=0`"
                    if again
                    else "name kv-quant behind kv-static or kv-evict",
                )
        if kind == KV_APPEND_EVICT.name and None in both:
            raise PatternNotMatched(
                f"{KV_APPEND_EVICT.name} carries keys and values of one type, and only one of them would be codes",
                layer.spec.attention_node,
                hint="give both of them codes: 8 in place of 16",
            )


def quantize(view: StaticCacheView, model_info: ModelInfo, storage_types: Sequence[tuple[str | None, str | None]]) -> Change:
    """Rewrite `form` in place so that its states hold codes of `bits`, as `check` takes them. Raises Unrecognised."""
    check_storage_types(view, storage_types)
    return _QuantizationRewriter(view, model_info).run(storage_types)


class _QuantizationRewriter:
    def __init__(self, view: StaticCacheView, model_info: ModelInfo) -> None:
        self.view, self.model_info = view, model_info
        self.graph = view.model.graph
        self.writer = NodeBuilder(self.graph, model_info)
        self.states = StateEditor(self.writer, view.interface)
        self.dead_candidates: list[ir.Node] = []
        self.custom_ops: dict[str, Op] = {}
        self._sequential_slots_cache: dict[tuple[ir.Value, int], SlotAssignment] = {}
        self._expanded_slots: dict[tuple[ir.Value, int], ir.Value] = {}

    def run(self, storage_types: Sequence[tuple[str | None, str | None]]) -> Change:
        form, told, touched = self.view, [], []
        for layer, both in zip(form.layers, storage_types, strict=True):
            if both == (None, None):
                told.append(layer.spec)
                continue
            told.append(self._quantize_layer(layer, both))
            touched.append(layer.attention.name or "")
        removed = remove_dead_nodes([node for node in self.dead_candidates if node.graph is not None])
        for op in self.custom_ops.values():
            op.add_to(form.model)
            form.model.functions[op.ir_function().identifier()].opset_imports[""] = standard_opset(form.model)
        self.states.write_interface(form.model, form.interface)
        write_kv_cache_spec(form.model, msgspec.structs.replace(form.spec, layers=tuple(told)))
        return Change(
            inserted=tuple(self.writer.inserted),
            removed=tuple(removed),
            changed=tuple(touched),
            summary=f"{len(touched)} of {len(form.layers)} layers keep codes",
        )

    def _op(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        **attributes: Any,
    ) -> ir.Value:
        return self.writer.op(before, op, inputs, attributes, dtype=dtype, shape=shape, name_prefix=NODE_NAME_PREFIX)

    def _quantize_layer(self, layer: StaticCacheLayer, storage_types: tuple[str | None, str | None]) -> LayerCacheSpec:
        slots = self._assign_slots(layer)
        sides: list[CacheTensorSpec] = []
        for at, side, one in zip((1, 2), (layer.key, layer.value), storage_types, strict=True):
            if one is None:
                sides.append(side.spec)
                continue
            sides.append(self._quantize_tensor(layer, at, side, one, slots))
            if CODECS[one].is_rotated and at == 1:
                self._rotate_queries(layer)
            elif CODECS[one].is_rotated:
                self._unrotate_output(layer)
        return msgspec.structs.replace(layer.spec, key=sides[0], value=sides[1])

    def _quantize_tensor(
        self, layer: StaticCacheLayer, input_index: int, tensor: StaticKVTensor, storage_type: str, assignment: SlotAssignment
    ) -> CacheTensorSpec:
        """Let the state of `side`, which is input `at` of the attention, be codes; return what the map says of it."""
        codec, before = CODECS[storage_type], layer.attention
        state = self.states[tensor.spec.state or ""]
        heads, rows = layer.spec.kv_heads, layer.spec.slots or 0
        made = tensor.cache.producer()
        assert made is not None
        by_op = made.op_type == KV_APPEND_EVICT.name
        codes, scale = self._quantize_vectors(made if by_op else before, tensor.update, codec)

        dtype, whole, past = self.writer.types[tensor.update], tensor.cache, tensor.past
        self._set_int8(past, ir.Shape((self.view.batch, heads, rows, tensor.spec.head_size // codec.elements_per_byte)))
        self.states.register(state, low=codec.min_code, high=codec.max_code)
        scale_in = self.states.add_input(
            f"{state.name}.scale",
            _FLOAT,
            ir.Shape((self.view.batch, heads, rows)),
            input_name=f"{state.input}.scale",
            low=0,
            high=1 / codec.max_magnitude,
        )
        if by_op:
            made.replace_input_with(list(made.inputs).index(tensor.update), codes)
            self._set_int8(whole, past.shape)
        else:
            whole = self._scatter_rows(before, past, codes, assignment)
            replace_value(tensor.cache, whole)
            whole.shape = past.shape
            self.dead_candidates.append(made)
        scale_out = self._scatter_rows(before, scale_in, scale, assignment)
        self.states.set_output(f"{state.name}.scale", scale_out, output_name=f"{state.output}.scale", in_place=state.in_place)
        self._dequantize_for_attention(layer, input_index, tensor, codec, dtype, (past, scale_in), (whole, scale_out))
        return msgspec.structs.replace(tensor.spec, storage_type=storage_type, scale_state=f"{state.name}.scale")

    def _set_int8(self, value: ir.Value, shape: ir.Shape | None) -> None:
        value.type, value.shape = ir.TensorType(_INT8), shape
        self.writer.types[value] = _INT8

    def _quantize_vectors(self, before: ir.Node, vectors: ir.Value, codec: Codec) -> Sequence[ir.Value]:
        """Return the codes of `vectors` (batch, kv_heads, seq, size), and their scales (batch, kv_heads, seq)."""
        op = self.custom_ops.setdefault(codec.quantize_op.name, codec.quantize_op)
        name = self.writer.names.allocate(f"{NODE_NAME_PREFIX}_{op.name.lower()}")
        node = ir.node(op.name, [vectors], op.node_attributes({}), domain=op.domain, num_outputs=2, name=name)
        return self.writer.insert_node(before, node, [_INT8, _FLOAT])

    def _dequantize_for_attention(
        self,
        layer: StaticCacheLayer,
        input_index: int,
        tensor: StaticKVTensor,
        codec: Codec,
        dtype: ir.DataType,
        past: tuple[ir.Value, ir.Value],
        cache: tuple[ir.Value, ir.Value],
    ) -> None:
        """Let attention read, as its input `at`, what the codes stand for: of the slots as they are, or as they were.

        Behind those as they were stand the tokens of the step, which it reads as they came.
        """
        before, read = layer.attention, layer.attention.inputs[input_index]
        size = tensor.spec.head_size
        joined = read.producer() if read is not None else None
        if read is cache[0]:
            before.replace_input_with(input_index, self._dequantize(before, codec, cache, dtype, size))
            return
        if joined is None or joined.op_type != "Concat" or list(joined.inputs) != [tensor.past, tensor.update]:
            raise PatternNotMatched("it reads something else than its cache", layer.spec.attention_node)
        new = self._rotate(before, tensor.update, size) if codec.is_rotated else tensor.update
        held = self._dequantize(before, codec, past, dtype, size)
        before.replace_input_with(input_index, self._op(before, "Concat", [held, new], axis=2))
        self.dead_candidates.append(joined)

    def _dequantize(
        self, before: ir.Node, codec: Codec, quantized: tuple[ir.Value, ir.Value], dtype: ir.DataType, head_size: int
    ) -> ir.Value:
        """Return the vectors (batch, kv_heads, slots, size) of codes and scales, rotated ones as they lie."""
        op = self.custom_ops.setdefault(codec.dequantize_op.name, codec.dequantize_op)
        codes, scale = quantized
        shape = ir.Shape((*(codes.shape or ())[:3], head_size))
        like = self.writer.scalar(0.0, dtype)
        name = self.writer.names.allocate(f"{NODE_NAME_PREFIX}_{op.name.lower()}")
        node = ir.node(op.name, [codes, scale, like], op.node_attributes({}), domain=op.domain, name=name)
        (vectors,) = self.writer.insert_node(before, node, [dtype])
        vectors.shape = shape
        return vectors

    def _rotate(self, before: ir.Node, vectors: ir.Value, size: int, *, inverse: bool = False) -> ir.Value:
        """Return `vectors` (..., size) in the basis of the codes, or with `back` those in that basis as they were."""
        dtype = self.writer.types[vectors]
        matrix = rotation_matrix(size)
        by = self.writer.constant(matrix if inverse else matrix.T, dtype)
        return self._op(before, "MatMul", [vectors, by], shape=vectors.shape)

    def _rotate_queries(self, layer: StaticCacheLayer) -> None:
        node, size = layer.attention, layer.key.spec.head_size
        queries = node.inputs[0]
        assert queries is not None
        node.replace_input_with(0, self._rotate(node, queries, size))

    def _unrotate_output(self, layer: StaticCacheLayer) -> None:
        node = layer.attention
        given = node.outputs[0]
        uses = list(given.uses())
        turned = self._rotate(self._next_node(node), given, layer.value.spec.head_size, inverse=True)
        for use in uses:
            use.node.replace_input_with(use.idx, turned)

    def _next_node(self, node: ir.Node | None) -> ir.Node:
        """Return the node behind `node`, or the first."""
        nodes = list(self.graph)
        return nodes[nodes.index(node) + 1 if node is not None else 0]

    # Slots

    def _assign_slots(self, layer: StaticCacheLayer) -> SlotAssignment:
        kind = cache_write_op(layer)
        if kind == "ScatterElements":
            found = _match_evicting_scatter(layer.key)
            assert found is not None
            return SlotAssignment(slots=found[0], is_written=found[1])
        node = layer.key.cache.producer()
        assert node is not None
        if kind == "TensorScatter":
            length = node.inputs[2]
            assert length is not None
            return self._sequential_slots(length, layer.spec.kv_heads)
        return self._slots_from_custom_op(layer.attention, node.outputs[5])

    def _sequential_slots(self, length: ir.Value, heads: int) -> SlotAssignment:
        """Return the slots behind `length` (batch,): a step's tokens one after the other, padding among them."""
        if (length, heads) in self._sequential_slots_cache:
            return self._sequential_slots_cache[length, heads]
        first, integers = self._next_node(length.producer()), self.writer.int64_vector
        if isinstance(self.view.seq, int):
            rank = self.writer.constant(np.arange(self.view.seq), _INT64)
        else:
            tokens = self._op(first, "Shape", [self.view.mask], _INT64, start=1, end=2)
            zero, one = self.writer.scalar(0, _INT64), self.writer.scalar(1, _INT64)
            rank = self._op(first, "Range", [zero, self._op(first, "Squeeze", [tokens]), one])
        since = self._op(first, "Unsqueeze", [length, integers(1, 2)])
        at = self._op(first, "Expand", [self._op(first, "Add", [since, rank]), integers(1, heads, 1)])
        return self._sequential_slots_cache.setdefault((length, heads), SlotAssignment(slots=at))

    def _slots_from_custom_op(self, before: ir.Node, slot: ir.Value) -> SlotAssignment:
        """Return where KVAppendEvict put the tokens, `slot` (batch, kv_heads, seq), -1 for those that it left out.

        Those repeat the write of the first that is kept; where none is, slot 0 is written as it was.
        """
        zero, last = self.writer.scalar(0, _INT64), self.writer.int64_vector(-1)
        at = self._op(before, "Cast", [slot], _INT64, to=int(_INT64))
        placed = self._op(before, "GreaterOrEqual", [at, zero], _BOOL)
        least = self._op(before, "Max", [at, zero])
        if self.view.seq == 1:
            return SlotAssignment(slots=least, is_written=placed)
        one = self.writer.scalar(1, _INT64)
        tokens = self._op(before, "Squeeze", [self._op(before, "Shape", [slot], _INT64, start=2, end=3)])
        rank = self._op(before, "Range", [zero, tokens, one])
        turn = self._op(before, "Where", [placed, rank, tokens], _INT64)
        first = self._op(before, "ReduceMin", [turn, last], keepdims=1)
        some = self._op(before, "Less", [first, tokens], _BOOL)
        first = self._op(before, "Min", [first, self._op(before, "Sub", [tokens, one])])
        source = self._op(before, "Where", [placed, rank, first], _INT64)
        return SlotAssignment(
            slots=self._op(before, "GatherElements", [least, source], axis=2), is_written=some, token_indices=source
        )

    def _scatter_rows(self, before: ir.Node, past: ir.Value, rows: ir.Value, assignment: SlotAssignment) -> ir.Value:
        """Return `past` (batch, kv_heads, slots, ...) with `rows` (batch, kv_heads, seq, ...) in their slots."""
        at, real = assignment.slots, assignment.is_written
        if assignment.token_indices is not None:
            assert past.shape is not None and len(past.shape) == 3  # noqa: PT018
            rows = self._op(before, "GatherElements", [rows, assignment.token_indices], axis=2)
        if past.shape is not None and len(past.shape) == 4:
            width = past.shape[3]
            assert isinstance(width, int)
            if (at, width) not in self._expanded_slots:
                early = self._next_node(at.producer())
                deep = self._op(early, "Unsqueeze", [at, self.writer.int64_vector(3)])
                self._expanded_slots[at, width] = self._op(early, "Expand", [deep, self.writer.int64_vector(1, 1, 1, width)])
            at = self._expanded_slots[at, width]
            real = self._op(before, "Unsqueeze", [real, self.writer.int64_vector(3)]) if real is not None else None
        if real is not None:
            kept = self._op(before, "GatherElements", [past, at], axis=2)
            rows = self._op(before, "Where", [real, rows, kept], self.writer.types[past])
        return self._op(before, "ScatterElements", [past, at, rows], shape=past.shape, axis=2)
