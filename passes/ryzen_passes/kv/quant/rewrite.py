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

from ryzen_compile.ir.analysis.sizes import attribute
from ryzen_compile.ir.edit.builder import Known, Writer, remove_dead, take_over
from ryzen_compile.spec.kv_cache import CachedLayer, CachedTensor
from ryzen_compile.spec.kv_cache import attach as attach_map
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.recognition.decoder import Unrecognised
from ryzen_passes.kv.states import States
from ryzen_passes.kv.static.cache_view import FixedForm, FixedLayer, FixedSide
from ryzen_passes.kv.static.positions import STEM
from ryzen_passes.opset import standard_opset
from ryzen_plugins.kv_append_evict import KV_APPEND_EVICT
from ryzen_plugins.vector_dequantize import VECTOR_DEQUANTIZE_FP8, VECTOR_DEQUANTIZE_INT8, VECTOR_DEQUANTIZE_ROTATED_INT4
from ryzen_plugins.vector_quantize import VECTOR_QUANTIZE_FP8, VECTOR_QUANTIZE_INT4, VECTOR_QUANTIZE_INT8, rotation

_BOOL, _INT8, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.INT64, ir.DataType.FLOAT
SCALE_BYTES = 4


@dataclass(frozen=True)
class Codec:
    """One way to keep a vector."""

    quantise: Op
    dequantise: Op
    per_byte: int
    """How many elements share a byte."""
    low: int
    high: int
    """The bytes that stand for numbers; of fp8 the positive ones."""
    largest: float
    """The largest number that a code stands for."""
    sizes: tuple[int, int]
    """The least and the most elements of a vector."""
    turned: bool = False
    """Whether codes are in a rotated basis, for which sizes are powers of two."""

    def takes(self, size: int) -> bool:
        """Return whether vectors of `size` elements can be kept so."""
        return self.sizes[0] <= size <= self.sizes[1] and not (self.turned and size & (size - 1))

    def row_bytes(self, size: int) -> int:
        """Return the bytes of one vector of `size` elements, its scale among them."""
        return size // self.per_byte + SCALE_BYTES


CODECS = {
    "fp8": Codec(VECTOR_QUANTIZE_FP8, VECTOR_DEQUANTIZE_FP8, 1, 0, 126, 448.0, (1, 8192)),
    "8": Codec(VECTOR_QUANTIZE_INT8, VECTOR_DEQUANTIZE_INT8, 1, -127, 127, 127.0, (1, 8192)),
    "4": Codec(VECTOR_QUANTIZE_INT4, VECTOR_DEQUANTIZE_ROTATED_INT4, 2, -128, 127, 2.75, (16, 512), turned=True),
}
"""By the bits of an element."""


@dataclass(frozen=True)
class Slots:
    """Where the rows of a step go."""

    at: ir.Value
    """(batch, kv_heads, seq) int64: the slots, each another one, or one again for the same row."""
    real: ir.Value | None = None
    """(batch, 1 or kv_heads, 1 or seq) bool: where it is not true the slot keeps what it holds."""
    source: ir.Value | None = None
    """(batch, kv_heads, seq) int64: which of the step's tokens goes there; None: each to its own."""


def kind_of(layer: FixedLayer) -> str:
    """Return the op that writes the caches of `layer`; raises Unrecognised where it is none that is known."""
    makers = [(side.whole.producer(), side) for side in (layer.key, layer.value)]
    ops = {node.op_type if node is not None and _writes(node, side) else "" for node, side in makers}
    if len(ops) != 1 or "" in ops:
        raise Unrecognised(
            "its caches are not written as kv-static or kv-evict leave them",
            layer.told.attention,
            hint="put kv-quant right behind kv-static or kv-evict",
        )
    return ops.pop()


def _writes(node: ir.Node, side: FixedSide) -> bool:
    inputs = list(node.inputs)
    if node.op_type == "TensorScatter":
        return inputs[:2] == [side.past, side.new] and attribute(node, "axis", -2) in (-2, 2)
    if node.op_type == "ScatterElements":
        return inputs[0] is side.past and attribute(node, "axis", 0) == 2 and _chosen(side) is not None
    return node.op_type == KV_APPEND_EVICT.name and side.past in inputs and side.new in inputs


def _chosen(side: FixedSide) -> tuple[ir.Value, ir.Value] | None:
    """Return the slots (batch, kv_heads, 1) that one token of kv-evict goes to, and whether it is one (batch, 1, 1)."""
    scatter = side.whole.producer()
    spread, choice = (scatter.inputs[at].producer() for at in (1, 2)) if scatter is not None else (None, None)  # type: ignore[union-attr]
    if spread is None or choice is None or (spread.op_type, choice.op_type) != ("Expand", "Where"):
        return None
    makers = [value.producer() if value is not None else None for value in (spread.inputs[0], choice.inputs[0])]
    slot, real = (node.inputs[0] if node is not None and node.op_type == "Unsqueeze" else None for node in makers)
    return (slot, real) if slot is not None and real is not None and choice.inputs[1] is side.new else None


def _other_reader(layer: FixedLayer, side: FixedSide) -> ir.Node | None:
    """Return a node that reads the cache, before or after the step, and neither writes it nor hands it to the attention."""
    writer = side.whole.producer()

    def serves(node: ir.Node) -> bool:
        if node is writer or node is layer.attention:
            return True
        return node.op_type in ("Concat", "Where", "GatherElements") and all(map(serves, node.outputs[0].consumers()))

    return next((node for value in (side.past, side.whole) for node in value.consumers() if not serves(node)), None)


def check(form: FixedForm, bits: Sequence[tuple[str | None, str | None]]) -> None:
    """Raise Unrecognised where caches cannot be kept in `bits` (of the keys and of the values, by layer; None: as they are)."""
    for layer, both in zip(form.layers, bits, strict=True):
        if both == (None, None):
            continue
        for word, side, one in zip(("keys", "values"), (layer.key, layer.value), both, strict=True):
            if one is not None and not CODECS[one].takes(side.told.size):
                low, high = CODECS[one].sizes
                power = "a power of two " if CODECS[one].turned else ""
                raise Unrecognised(
                    f"its {word} are of {side.told.size} elements, codes of {one} take {power}from {low} to {high}",
                    layer.told.attention,
                    hint=f"kv-quant{{{word}=8}}" if CODECS[one].turned else f"kv-quant{{{word}=16}}",
                )
        kind = kind_of(layer)
        for side, one in zip((layer.key, layer.value), both, strict=True):
            if one is not None and (reader := _other_reader(layer, side)) is not None:
                again = layer.told.every > 0
                raise Unrecognised(
                    f"it reads what the slots hold{' to tell scores again' if again else ''}, and would read codes",
                    reader.name or reader.op_type,
                    hint="take a score that is told once, kvzap, or `every=0`"
                    if again
                    else "name kv-quant behind kv-static or kv-evict",
                )
        if kind == KV_APPEND_EVICT.name and None in both:
            raise Unrecognised(
                f"{KV_APPEND_EVICT.name} carries keys and values of one type, and only one of them would be codes",
                layer.told.attention,
                hint="give both of them codes: 8 in place of 16",
            )


def quantise(form: FixedForm, known: Known, bits: Sequence[tuple[str | None, str | None]]) -> Change:
    """Rewrite `form` in place so that its states hold codes of `bits`, as `check` takes them. Raises Unrecognised."""
    check(form, bits)
    return _Quantiser(form, known).run(bits)


class _Quantiser:
    def __init__(self, form: FixedForm, known: Known) -> None:
        self.form, self.known = form, known
        self.graph = form.model.graph
        self.write = Writer(self.graph, known)
        self.states = States(self.write, form.interface)
        self.going: list[ir.Node] = []
        self.used: dict[str, Op] = {}
        self._behind: dict[tuple[ir.Value, int], Slots] = {}
        self._spread: dict[tuple[ir.Value, int], ir.Value] = {}

    def run(self, bits: Sequence[tuple[str | None, str | None]]) -> Change:
        form, told, touched = self.form, [], []
        for layer, both in zip(form.layers, bits, strict=True):
            if both == (None, None):
                told.append(layer.told)
                continue
            told.append(self._layer(layer, both))
            touched.append(layer.attention.name or "")
        removed = remove_dead([node for node in self.going if node.graph is not None])
        for op in self.used.values():
            op.add_to(form.model)
            form.model.functions[op.function().identifier()].opset_imports[""] = standard_opset(form.model)
        self.states.attach(form.model, form.interface)
        attach_map(form.model, msgspec.structs.replace(form.told, layers=tuple(told)))
        return Change(
            inserted=tuple(self.write.written),
            removed=tuple(removed),
            changed=tuple(touched),
            says=f"{len(touched)} of {len(form.layers)} layers keep codes",
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
        return self.write.op(before, op, inputs, attributes, dtype=dtype, shape=shape, stem=STEM)

    def _layer(self, layer: FixedLayer, bits: tuple[str | None, str | None]) -> CachedLayer:
        slots = self._slots(layer)
        sides: list[CachedTensor] = []
        for at, side, one in zip((1, 2), (layer.key, layer.value), bits, strict=True):
            if one is None:
                sides.append(side.told)
                continue
            sides.append(self._side(layer, at, side, one, slots))
            if CODECS[one].turned and at == 1:
                self._turn_queries(layer)
            elif CODECS[one].turned:
                self._turn_back(layer)
        return msgspec.structs.replace(layer.told, key=sides[0], value=sides[1])

    def _side(self, layer: FixedLayer, at: int, side: FixedSide, bits: str, slots: Slots) -> CachedTensor:
        """Let the state of `side`, which is input `at` of the attention, be codes; return what the map says of it."""
        codec, before = CODECS[bits], layer.attention
        state = self.states[side.told.state or ""]
        heads, rows = layer.told.kv_heads, layer.told.slots or 0
        made = side.whole.producer()
        assert made is not None
        by_op = made.op_type == KV_APPEND_EVICT.name
        codes, scale = self._quantised(made if by_op else before, side.new, codec)

        dtype, whole, past = self.write.types[side.new], side.whole, side.past
        self._retype(past, ir.Shape((self.form.batch, heads, rows, side.told.size // codec.per_byte)))
        self.states.take(state, low=codec.low, high=codec.high)
        scale_in = self.states.begin(
            f"{state.name}.scale",
            _FLOAT,
            ir.Shape((self.form.batch, heads, rows)),
            by=f"{state.input}.scale",
            low=0,
            high=1 / codec.largest,
        )
        if by_op:
            made.replace_input_with(list(made.inputs).index(side.new), codes)
            self._retype(whole, past.shape)
        else:
            whole = self._written(before, past, codes, slots)
            take_over(side.whole, whole)
            whole.shape = past.shape
            self.going.append(made)
        scale_out = self._written(before, scale_in, scale, slots)
        self.states.end(f"{state.name}.scale", scale_out, by=f"{state.output}.scale", in_place=state.in_place)
        self._read(layer, at, side, codec, dtype, (past, scale_in), (whole, scale_out))
        return msgspec.structs.replace(side.told, bits=bits, scale=f"{state.name}.scale")

    def _retype(self, value: ir.Value, shape: ir.Shape | None) -> None:
        value.type, value.shape = ir.TensorType(_INT8), shape
        self.write.types[value] = _INT8

    def _quantised(self, before: ir.Node, vectors: ir.Value, codec: Codec) -> Sequence[ir.Value]:
        """Return the codes of `vectors` (batch, kv_heads, seq, size), and their scales (batch, kv_heads, seq)."""
        op = self.used.setdefault(codec.quantise.name, codec.quantise)
        name = self.write.names.new(f"{STEM}_{op.name.lower()}")
        node = ir.node(op.name, [vectors], op.node_attributes({}), domain=op.domain, num_outputs=2, name=name)
        return self.write.place(before, node, [_INT8, _FLOAT])

    def _read(
        self,
        layer: FixedLayer,
        at: int,
        side: FixedSide,
        codec: Codec,
        dtype: ir.DataType,
        past: tuple[ir.Value, ir.Value],
        whole: tuple[ir.Value, ir.Value],
    ) -> None:
        """Let attention read, as its input `at`, what the codes stand for: of the slots as they are, or as they were.

        Behind those as they were stand the tokens of the step, which it reads as they came.
        """
        before, read = layer.attention, layer.attention.inputs[at]
        size = side.told.size
        joined = read.producer() if read is not None else None
        if read is whole[0]:
            before.replace_input_with(at, self._vectors(before, codec, whole, dtype, size))
            return
        if joined is None or joined.op_type != "Concat" or list(joined.inputs) != [side.past, side.new]:
            raise Unrecognised("it reads something else than its cache", layer.told.attention)
        new = self._turned(before, side.new, size) if codec.turned else side.new
        held = self._vectors(before, codec, past, dtype, size)
        before.replace_input_with(at, self._op(before, "Concat", [held, new], axis=2))
        self.going.append(joined)

    def _vectors(
        self, before: ir.Node, codec: Codec, held: tuple[ir.Value, ir.Value], dtype: ir.DataType, size: int
    ) -> ir.Value:
        """Return the vectors (batch, kv_heads, slots, size) of codes and scales, rotated ones as they lie."""
        op = self.used.setdefault(codec.dequantise.name, codec.dequantise)
        codes, scale = held
        shape = ir.Shape((*(codes.shape or ())[:3], size))
        like = self.write.number(0.0, dtype)
        name = self.write.names.new(f"{STEM}_{op.name.lower()}")
        node = ir.node(op.name, [codes, scale, like], op.node_attributes({}), domain=op.domain, name=name)
        (vectors,) = self.write.place(before, node, [dtype])
        vectors.shape = shape
        return vectors

    def _turned(self, before: ir.Node, vectors: ir.Value, size: int, *, back: bool = False) -> ir.Value:
        """Return `vectors` (..., size) in the basis of the codes, or with `back` those in that basis as they were."""
        dtype = self.write.types[vectors]
        matrix = rotation(size)
        by = self.write.constant(matrix if back else matrix.T, dtype)
        return self._op(before, "MatMul", [vectors, by], shape=vectors.shape)

    def _turn_queries(self, layer: FixedLayer) -> None:
        node, size = layer.attention, layer.key.told.size
        queries = node.inputs[0]
        assert queries is not None
        node.replace_input_with(0, self._turned(node, queries, size))

    def _turn_back(self, layer: FixedLayer) -> None:
        node = layer.attention
        given = node.outputs[0]
        uses = list(given.uses())
        turned = self._turned(self._following(node), given, layer.value.told.size, back=True)
        for use in uses:
            use.node.replace_input_with(use.idx, turned)

    def _following(self, node: ir.Node | None) -> ir.Node:
        """Return the node behind `node`, or the first."""
        nodes = list(self.graph)
        return nodes[nodes.index(node) + 1 if node is not None else 0]

    # Slots

    def _slots(self, layer: FixedLayer) -> Slots:
        kind = kind_of(layer)
        if kind == "ScatterElements":
            found = _chosen(layer.key)
            assert found is not None
            return Slots(at=found[0], real=found[1])
        node = layer.key.whole.producer()
        assert node is not None
        if kind == "TensorScatter":
            length = node.inputs[2]
            assert length is not None
            return self._slots_behind(length, layer.told.kv_heads)
        return self._of_op(layer.attention, node.outputs[5])

    def _slots_behind(self, length: ir.Value, heads: int) -> Slots:
        """Return the slots behind `length` (batch,): a step's tokens one after the other, padding among them."""
        if (length, heads) in self._behind:
            return self._behind[length, heads]
        first, integers = self._following(length.producer()), self.write.integers
        if isinstance(self.form.seq, int):
            rank = self.write.constant(np.arange(self.form.seq), _INT64)
        else:
            tokens = self._op(first, "Shape", [self.form.mask], _INT64, start=1, end=2)
            zero, one = self.write.number(0, _INT64), self.write.number(1, _INT64)
            rank = self._op(first, "Range", [zero, self._op(first, "Squeeze", [tokens]), one])
        since = self._op(first, "Unsqueeze", [length, integers(1, 2)])
        at = self._op(first, "Expand", [self._op(first, "Add", [since, rank]), integers(1, heads, 1)])
        return self._behind.setdefault((length, heads), Slots(at=at))

    def _of_op(self, before: ir.Node, slot: ir.Value) -> Slots:
        """Return where KVAppendEvict put the tokens, `slot` (batch, kv_heads, seq), -1 for those that it left out.

        Those repeat the write of the first that is kept; where none is, slot 0 is written as it was.
        """
        zero, last = self.write.number(0, _INT64), self.write.integers(-1)
        at = self._op(before, "Cast", [slot], _INT64, to=int(_INT64))
        placed = self._op(before, "GreaterOrEqual", [at, zero], _BOOL)
        least = self._op(before, "Max", [at, zero])
        if self.form.seq == 1:
            return Slots(at=least, real=placed)
        one = self.write.number(1, _INT64)
        tokens = self._op(before, "Squeeze", [self._op(before, "Shape", [slot], _INT64, start=2, end=3)])
        rank = self._op(before, "Range", [zero, tokens, one])
        turn = self._op(before, "Where", [placed, rank, tokens], _INT64)
        first = self._op(before, "ReduceMin", [turn, last], keepdims=1)
        some = self._op(before, "Less", [first, tokens], _BOOL)
        first = self._op(before, "Min", [first, self._op(before, "Sub", [tokens, one])])
        source = self._op(before, "Where", [placed, rank, first], _INT64)
        return Slots(at=self._op(before, "GatherElements", [least, source], axis=2), real=some, source=source)

    def _written(self, before: ir.Node, past: ir.Value, rows: ir.Value, slots: Slots) -> ir.Value:
        """Return `past` (batch, kv_heads, slots, ...) with `rows` (batch, kv_heads, seq, ...) in their slots."""
        at, real = slots.at, slots.real
        if slots.source is not None:
            assert past.shape is not None and len(past.shape) == 3  # noqa: PT018
            rows = self._op(before, "GatherElements", [rows, slots.source], axis=2)
        if past.shape is not None and len(past.shape) == 4:
            width = past.shape[3]
            assert isinstance(width, int)
            if (at, width) not in self._spread:
                early = self._following(at.producer())
                deep = self._op(early, "Unsqueeze", [at, self.write.integers(3)])
                self._spread[at, width] = self._op(early, "Expand", [deep, self.write.integers(1, 1, 1, width)])
            at = self._spread[at, width]
            real = self._op(before, "Unsqueeze", [real, self.write.integers(3)]) if real is not None else None
        if real is not None:
            kept = self._op(before, "GatherElements", [past, at], axis=2)
            rows = self._op(before, "Where", [real, rows, kept], self.write.types[past])
        return self._op(before, "ScatterElements", [past, at, rows], shape=past.shape, axis=2)
