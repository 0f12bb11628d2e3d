"""Fixed caches: growing ones become states of a fixed number of slots, each token in the slot of its position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import attribute
from ryzen_compile.ir.edit.builder import Known, Writer, remove_dead, take_over
from ryzen_compile.spec.interface import Dim, InputSpec, TensorSpec
from ryzen_compile.spec.kv_cache import CachedLayer, CachedTensor, CacheMap
from ryzen_compile.spec.kv_cache import attach as attach_map
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.recognition.decoder import Decoder, Layer, Side, Unrecognised
from ryzen_passes.kv.states import States, dtype_of
from ryzen_passes.kv.static.positions import STEM, Time, seen_slots, set_clock, sloped, write_as, write_time
from ryzen_passes.opset import raise_opset

OPSET = 24
"""The opset that TensorScatter came with."""
_CHUNK = 512
"""How many tokens a step has at most where nothing tells."""
PAST, PRESENT = "past_key_values", "present"
"""How caches are called, as Optimum does, where a model has none of its own."""

Spec = TypeVar("Spec", bound=TensorSpec)


def fix(decoder: Decoder, known: Known, capacity: int, step: int | None = None) -> Change:
    """Rewrite `decoder` in place so that every cache is a state of `capacity` slots. Raises Unrecognised.

    With `step` every step takes that many tokens.
    """
    if step is not None:
        _pin(decoder, step)
    return _Fixer(decoder, known, capacity).run()


def _pin(decoder: Decoder, step: int) -> None:
    """Let the dim of a step's tokens be the number `step` wherever a shape names it."""
    graph = decoder.model.graph
    ids = next(value for value in graph.inputs if value.name == decoder.ids.name)
    dim = ids.shape[1] if ids.shape is not None else None
    if isinstance(dim, int):
        if dim != step:
            raise Unrecognised(f"its steps are of {dim} tokens, not of {step}", decoder.ids.name)
        return
    name = dim.value if dim is not None else None
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value == name and value.shape is not None:
                if value.shape.frozen:
                    value.shape = value.shape.copy()
                value.shape[axis] = step
    old = decoder.interface

    def pinned(spec: Spec) -> Spec:
        dims = None if spec.dims is None else tuple(step if size == name else size for size in spec.dims)
        return msgspec.structs.replace(spec, dims=dims)

    decoder.interface = msgspec.structs.replace(
        old, inputs=tuple(map(pinned, old.inputs)), outputs=tuple(map(pinned, old.outputs))
    )
    decoder.ids = pinned(decoder.ids)


class _Fixer:
    def __init__(self, decoder: Decoder, known: Known, capacity: int) -> None:
        self.decoder, self.known, self.capacity = decoder, known, capacity
        self.graph = decoder.model.graph
        self.write = Writer(self.graph, known)
        self.first: ir.Node = next(iter(self.graph))
        self.nodes = set(self.graph)
        dims = self._input(decoder.ids.name).shape
        if dims is None or len(dims) != 2:
            raise Unrecognised("expected token ids (batch, seq)", decoder.ids.name)
        self.batch, self.seq = dims[0], dims[1]
        self.going: list[ir.Node] = []
        self.states = States(self.write, decoder.interface)
        self.layers: list[CachedLayer] = []

    def run(self) -> Change:
        decoder = self.decoder
        if (reason := raise_opset(decoder.model, OPSET)) is not None:
            raise Unrecognised(f"fixed caches need opset {OPSET}: {reason}", decoder.layers[0].attention.name or "Attention")
        old_mask = self._input(decoder.mask.name) if decoder.mask is not None else None
        if old_mask is not None:
            old_mask.name, name = f"{old_mask.name}_was", old_mask.name
            self.known.names.taken.discard(name or "")
        mask_name = decoder.mask.name if decoder.mask else "attention_mask"
        time = write_time(self.write, self.states, self.first, self.batch, self.seq, mask_name, self.capacity - self._most())
        for clock in decoder.clocks:
            node = clock.value.producer()
            set_clock(self.write, self.first, clock, time)
            if node is not None:
                self.going.append(node)
        for value in self._old_positions():
            value.replace_all_uses_with(write_as(self.write, self.first, time.positions, self.known.types[value]))
        masks: dict[tuple[object, ...], ir.Value] = {}
        for index, layer in enumerate(decoder.layers):
            key = (layer.sight.window, layer.sight.slopes, layer.key.dtype)
            if key not in masks:
                masks[key] = self._mask(layer, time)
            self._fix_layer(index, layer, time, masks[key])
        removed = remove_dead([node for node in self.going if node.graph is not None])
        self._drop_dead_clockwork(removed)
        self._check_nothing_tells_time(old_mask)
        self._attach(time)
        self._map(time)
        changed = [layer.attention.name or "" for layer in decoder.layers]
        return Change(
            inserted=tuple(self.write.written),
            removed=tuple(removed),
            changed=tuple(changed),
            says=f"{len(decoder.layers)} layers keep their keys and values in {self.capacity} slots each",
        )

    def _input(self, name: str) -> ir.Value:
        return next(value for value in self.graph.inputs if value.name == name)

    def _mask(self, layer: Layer, time: Time) -> ir.Value:
        """Return what the attention of `layer` is masked with: a condition, or numbers that are added where it has biases."""
        sight, before = layer.sight, self.first
        seen = seen_slots(self.write, before, time, self.capacity, sight.window)
        if not sight.slopes:
            return seen
        return sloped(self.write, before, time, seen, self.capacity, sight.slopes, layer.key.dtype)

    def _fix_layer(self, index: int, layer: Layer, time: Time, mask: ir.Value) -> None:
        node = layer.attention
        told: list[CachedTensor] = []
        for at, (side, word) in enumerate(((layer.key, "key"), (layer.value, "value")), 1):
            name = side.state.name if side.state is not None else f"{PAST}.{index}.{word}"
            whole = self._write_side(node, side, layer.kv_heads, time, name, f"{PRESENT}.{index}.{word}")
            told.append(
                CachedTensor(
                    state=name, new=side.new.name or "", whole=whole.name or "", size=side.size, dtype=dtype_of(side.new)
                )
            )
            read = node.inputs[at]
            node.replace_input_with(at, whole)
            if read is not None and (maker := read.producer()) is not None:
                self.going.append(maker)
        old = node.inputs[3] if len(node.inputs) > 3 else None
        node.resize_inputs(4)
        node.replace_input_with(3, mask)
        node.attributes.pop("is_causal", None)
        if old is not None and (maker := old.producer()) is not None:
            self.going.append(maker)
        self.layers.append(
            CachedLayer(
                attention=node.name or "",
                heads=layer.heads,
                kv_heads=layer.kv_heads,
                key=told[0],
                value=told[1],
                window=layer.sight.window,
                slots=self.capacity,
            )
        )

    def _write_side(self, before: ir.Node, side: Side, heads: int, time: Time, name: str, written: str) -> ir.Value:
        """Return what attention reads: the state `name`, with the tokens of the step in their slots."""
        shape = ir.Shape((self.batch, heads, self.capacity, side.size))
        if side.state is not None:
            cache = self._input(side.state.input)
            cache.shape = shape
            self.states.take(msgspec.structs.replace(side.state, grows=None, in_place=True))
        else:
            cache = self.states.begin(name, self.known.types[side.new], shape, by=name)
        attributes = {"axis": 2, "mode": "linear"}
        whole = self.write.op(before, "TensorScatter", [cache, side.new, time.length], attributes, shape=shape, stem=STEM)
        if side.state is None:
            self.states.end(name, whole, by=written)
            return whole
        if (maker := side.whole.producer()) is not None:
            self.going.append(maker)
        take_over(side.whole, whole)
        whole.shape = shape
        return whole

    def _drop_dead_clockwork(self, removed: list[str]) -> None:
        dead = [node for node in self.graph if not any(output.uses() or output.is_graph_output() for output in node.outputs)]
        removed += remove_dead(dead)

    def _check_nothing_tells_time(self, old_mask: ir.Value | None) -> None:
        """Refuse where something still reads what has gone: sizes of growing caches, the old mask."""
        timed = self.decoder.clockwork.timed
        self._measure_ids(old_mask)
        gone = [*self._old_positions(), *([old_mask] if old_mask is not None else [])]
        for value in gone:
            if uses := [use.node for use in value.uses()]:
                raise Unrecognised(
                    f"it reads `{value.name}`, and is no mask and no position of an attention", uses[0].name or uses[0].op_type
                )
        for node in self.graph:
            if node in self.nodes and node.op_type in ("Shape", "Size") and timed.get(node.outputs[0]):
                raise Unrecognised(
                    "it reads how long a cache has grown, and is no mask and no position", node.name or node.op_type
                )
        for value in gone:
            self.graph.inputs.remove(value)

    def _measure_ids(self, mask: ir.Value | None) -> None:
        """Let what reads the batch off a cache or the old mask read it off the ids; the shape, where there was no cache."""
        ids = self._input(self.decoder.ids.name)
        sides = [side for layer in self.decoder.layers for side in (layer.key, layer.value)]
        caches = [self._input(side.state.input) for side in sides if side.state is not None]
        for value in (*caches, *([mask] if mask is not None else [])):
            for node in [use.node for use in value.uses() if use.node.op_type == "Shape"]:
                is_batch = attribute(node, "start", 0) == 0 and attribute(node, "end", 0) == 1
                if is_batch or not caches:
                    node.replace_input_with(0, ids)

    def _most(self) -> int:
        """Return how many tokens a step has at most: they must fit behind those before them."""
        seq = self.decoder.ids.dims[1] if self.decoder.ids.dims else None
        most = seq if isinstance(seq, int) else self.decoder.interface.largest.get(seq or "", _CHUNK)
        return min(most, self.capacity)

    def _old_positions(self) -> list[ir.Value]:
        named = {spec.name for spec in self.decoder.interface.inputs if spec.role == "positions"}
        return [value for value in self.graph.inputs if value.name in named]

    def _attach(self, time: Time) -> None:
        interface = self.decoder.interface
        batch, seq = (interface.batch or str(self.batch), self.decoder.ids.dims[1] if self.decoder.ids.dims else "seq")
        new = msgspec.structs.replace(
            interface,
            batch=batch,
            task=interface.task or "language-model",
            capacity=self.capacity,
            typical=_of(interface.typical, (batch, seq)),
            smallest=_of(interface.smallest, (batch, seq)),
            largest=_of(interface.largest, (batch, seq)) | ({seq: self._most()} if isinstance(seq, str) else {}),
        )
        mask = InputSpec(name=time.mask.name or "", dtype="int64", dims=(batch, seq), role="mask", low=0, high=1)
        self.states.attach(self.decoder.model, new, mask)

    def _map(self, time: Time) -> None:
        cache_map = CacheMap(
            layers=tuple(self.layers),
            positions=self.decoder.style,
            longest=self.decoder.longest,
            padding=True,
            mask=time.mask.name,
            token_positions=time.positions.name,
        )
        attach_map(self.decoder.model, cache_map)


def _of(sizes: Mapping[str, int], names: tuple[Dim, ...]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name in names}
