"""Fixed caches: growing ones become states of a fixed number of slots, each token in the slot of its position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.spec.interface import Dim, InputSpec, TensorSpec
from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec, LayerCacheSpec, write_kv_cache_spec
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.recognition.recognized_decoder import AttentionLayer, KVTensor, PatternNotMatched, RecognizedDecoder
from ryzen_passes.kv.state_editor import StateEditor, dtype_of
from ryzen_passes.kv.static.step_positions import (
    NODE_NAME_PREFIX,
    StepPositions,
    alibi_bias,
    cast_to,
    replace_position_input,
    visible_slots,
    write_step_positions,
)
from ryzen_passes.opset import raise_opset

OPSET = 24
"""The opset that TensorScatter came with."""
_DEFAULT_STEP_TOKENS = 512
"""How many tokens a step has at most where nothing tells."""
PAST, PRESENT = "past_key_values", "present"
"""How caches are called, as Optimum does, where a model has none of its own."""

Spec = TypeVar("Spec", bound=TensorSpec)


def make_static(decoder: RecognizedDecoder, model_info: ModelInfo, capacity: int, step: int | None = None) -> Change:
    """Rewrite `decoder` in place so that every cache is a state of `capacity` slots. Raises Unrecognised.

    With `step` every step takes that many tokens.
    """
    if step is not None:
        _set_step_size(decoder, step)
    return _StaticCacheRewriter(decoder, model_info, capacity).run()


def _set_step_size(decoder: RecognizedDecoder, step: int) -> None:
    """Let the dim of a step's tokens be the number `step` wherever a shape names it."""
    graph = decoder.model.graph
    ids = next(value for value in graph.inputs if value.name == decoder.ids.name)
    dim = ids.shape[1] if ids.shape is not None else None
    if isinstance(dim, int):
        if dim != step:
            raise PatternNotMatched(f"its steps are of {dim} tokens, not of {step}", decoder.ids.name)
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


class _StaticCacheRewriter:
    def __init__(self, decoder: RecognizedDecoder, model_info: ModelInfo, capacity: int) -> None:
        self.decoder, self.model_info, self.capacity = decoder, model_info, capacity
        self.graph = decoder.model.graph
        self.writer = NodeBuilder(self.graph, model_info)
        self.insertion_point: ir.Node = next(iter(self.graph))
        self.original_nodes = set(self.graph)
        dims = self._input(decoder.ids.name).shape
        if dims is None or len(dims) != 2:
            raise PatternNotMatched("expected token ids (batch, seq)", decoder.ids.name)
        self.batch, self.seq = dims[0], dims[1]
        self.dead_candidates: list[ir.Node] = []
        self.states = StateEditor(self.writer, decoder.interface)
        self.layer_specs: list[LayerCacheSpec] = []

    def run(self) -> Change:
        decoder = self.decoder
        if (reason := raise_opset(decoder.model, OPSET)) is not None:
            raise PatternNotMatched(
                f"fixed caches need opset {OPSET}: {reason}", decoder.layers[0].attention.name or "Attention"
            )
        old_mask = self._input(decoder.mask.name) if decoder.mask is not None else None
        if old_mask is not None:
            old_mask.name, name = f"{old_mask.name}_was", old_mask.name
            self.model_info.names.used.discard(name or "")
        mask_name = decoder.mask.name if decoder.mask else "attention_mask"
        time = write_step_positions(
            self.writer,
            self.states,
            self.insertion_point,
            self.batch,
            self.seq,
            mask_name,
            self.capacity - self._max_step_tokens(),
        )
        for clock in decoder.position_inputs:
            node = clock.value.producer()
            replace_position_input(self.writer, self.insertion_point, clock, time)
            if node is not None:
                self.dead_candidates.append(node)
        for value in self._position_id_inputs():
            value.replace_all_uses_with(
                cast_to(self.writer, self.insertion_point, time.positions, self.model_info.types[value])
            )
        masks: dict[tuple[object, ...], ir.Value] = {}
        for index, layer in enumerate(decoder.layers):
            key = (layer.visibility.window, layer.visibility.alibi_slopes, layer.key.dtype)
            if key not in masks:
                masks[key] = self._mask(layer, time)
            self._make_layer_static(index, layer, time, masks[key])
        removed = remove_dead_nodes([node for node in self.dead_candidates if node.graph is not None])
        self._remove_dead_position_nodes(removed)
        self._check_no_step_dependence(old_mask)
        self._write_interface(time)
        self._write_kv_cache_spec(time)
        changed = [layer.attention.name or "" for layer in decoder.layers]
        return Change(
            inserted=tuple(self.writer.inserted),
            removed=tuple(removed),
            changed=tuple(changed),
            summary=f"{len(decoder.layers)} layers keep their keys and values in {self.capacity} slots each",
        )

    def _input(self, name: str) -> ir.Value:
        return next(value for value in self.graph.inputs if value.name == name)

    def _mask(self, layer: AttentionLayer, step_positions: StepPositions) -> ir.Value:
        """Return what the attention of `layer` is masked with: a condition, or numbers that are added where it has biases."""
        sight, before = layer.visibility, self.insertion_point
        seen = visible_slots(self.writer, before, step_positions, self.capacity, sight.window)
        if not sight.alibi_slopes:
            return seen
        return alibi_bias(self.writer, before, step_positions, seen, self.capacity, sight.alibi_slopes, layer.key.dtype)

    def _make_layer_static(self, index: int, layer: AttentionLayer, step_positions: StepPositions, mask: ir.Value) -> None:
        node = layer.attention
        told: list[CacheTensorSpec] = []
        for at, (side, word) in enumerate(((layer.key, "key"), (layer.value, "value")), 1):
            name = side.state.name if side.state is not None else f"{PAST}.{index}.{word}"
            whole = self._write_cache(node, side, layer.kv_heads, step_positions, name, f"{PRESENT}.{index}.{word}")
            told.append(
                CacheTensorSpec(
                    state=name,
                    update=side.update.name or "",
                    cache=whole.name or "",
                    head_size=side.head_size,
                    dtype=dtype_of(side.update),
                )
            )
            read = node.inputs[at]
            node.replace_input_with(at, whole)
            if read is not None and (maker := read.producer()) is not None:
                self.dead_candidates.append(maker)
        old = node.inputs[3] if len(node.inputs) > 3 else None
        node.resize_inputs(4)
        node.replace_input_with(3, mask)
        node.attributes.pop("is_causal", None)
        if old is not None and (maker := old.producer()) is not None:
            self.dead_candidates.append(maker)
        self.layer_specs.append(
            LayerCacheSpec(
                attention_node=node.name or "",
                heads=layer.heads,
                kv_heads=layer.kv_heads,
                key=told[0],
                value=told[1],
                window=layer.visibility.window,
                slots=self.capacity,
            )
        )

    def _write_cache(
        self, before: ir.Node, tensor: KVTensor, heads: int, step_positions: StepPositions, state_name: str, output_name: str
    ) -> ir.Value:
        """Return what attention reads: the state `name`, with the tokens of the step in their slots."""
        shape = ir.Shape((self.batch, heads, self.capacity, tensor.head_size))
        if tensor.state is not None:
            cache = self._input(tensor.state.input)
            cache.shape = shape
            self.states.register(msgspec.structs.replace(tensor.state, append_axis=None, in_place=True))
        else:
            cache = self.states.add_input(state_name, self.model_info.types[tensor.update], shape, input_name=state_name)
        attributes = {"axis": 2, "mode": "linear"}
        whole = self.writer.op(
            before,
            "TensorScatter",
            [cache, tensor.update, step_positions.length],
            attributes,
            shape=shape,
            name_prefix=NODE_NAME_PREFIX,
        )
        if tensor.state is None:
            self.states.set_output(state_name, whole, output_name=output_name)
            return whole
        if (maker := tensor.cache.producer()) is not None:
            self.dead_candidates.append(maker)
        replace_value(tensor.cache, whole)
        whole.shape = shape
        return whole

    def _remove_dead_position_nodes(self, removed: list[str]) -> None:
        dead = [node for node in self.graph if not any(output.uses() or output.is_graph_output() for output in node.outputs)]
        removed += remove_dead_nodes(dead)

    def _check_no_step_dependence(self, old_mask: ir.Value | None) -> None:
        """Refuse where something still reads what has gone: sizes of growing caches, the old mask."""
        timed = self.decoder.position_subgraph.step_dependent
        self._read_batch_from_ids(old_mask)
        gone = [*self._position_id_inputs(), *([old_mask] if old_mask is not None else [])]
        for value in gone:
            if uses := [use.node for use in value.uses()]:
                raise PatternNotMatched(
                    f"it reads `{value.name}`, and is no mask and no position of an attention", uses[0].name or uses[0].op_type
                )
        for node in self.graph:
            if node in self.original_nodes and node.op_type in ("Shape", "Size") and timed.get(node.outputs[0]):
                raise PatternNotMatched(
                    "it reads how long a cache has grown, and is no mask and no position", node.name or node.op_type
                )
        for value in gone:
            self.graph.inputs.remove(value)

    def _read_batch_from_ids(self, mask: ir.Value | None) -> None:
        """Let what reads the batch off a cache or the old mask read it off the ids; the shape, where there was no cache."""
        ids = self._input(self.decoder.ids.name)
        sides = [side for layer in self.decoder.layers for side in (layer.key, layer.value)]
        caches = [self._input(side.state.input) for side in sides if side.state is not None]
        for value in (*caches, *([mask] if mask is not None else [])):
            for node in [use.node for use in value.uses() if use.node.op_type == "Shape"]:
                is_batch = int_attribute(node, "start", 0) == 0 and int_attribute(node, "end", 0) == 1
                if is_batch or not caches:
                    node.replace_input_with(0, ids)

    def _max_step_tokens(self) -> int:
        """Return how many tokens a step has at most: they must fit behind those before them."""
        seq = self.decoder.ids.dims[1] if self.decoder.ids.dims else None
        most = seq if isinstance(seq, int) else self.decoder.interface.max_sizes.get(seq or "", _DEFAULT_STEP_TOKENS)
        return min(most, self.capacity)

    def _position_id_inputs(self) -> list[ir.Value]:
        named = {spec.name for spec in self.decoder.interface.inputs if spec.role == "positions"}
        return [value for value in self.graph.inputs if value.name in named]

    def _write_interface(self, step_positions: StepPositions) -> None:
        interface = self.decoder.interface
        batch, seq = (interface.batch or str(self.batch), self.decoder.ids.dims[1] if self.decoder.ids.dims else "seq")
        new = msgspec.structs.replace(
            interface,
            batch=batch,
            task=interface.task or "language-model",
            capacity=self.capacity,
            typical_sizes=_filter_sizes(interface.typical_sizes, (batch, seq)),
            min_sizes=_filter_sizes(interface.min_sizes, (batch, seq)),
            max_sizes=_filter_sizes(interface.max_sizes, (batch, seq))
            | ({seq: self._max_step_tokens()} if isinstance(seq, str) else {}),
        )
        mask = InputSpec(name=step_positions.mask.name or "", dtype="int64", dims=(batch, seq), role="mask", low=0, high=1)
        self.states.write_interface(self.decoder.model, new, mask)

    def _write_kv_cache_spec(self, step_positions: StepPositions) -> None:
        cache_map = KVCacheSpec(
            layers=tuple(self.layer_specs),
            position_encoding=self.decoder.position_encoding,
            max_positions=self.decoder.max_positions,
            padding=True,
            mask=step_positions.mask.name,
            token_positions=step_positions.positions.name,
        )
        write_kv_cache_spec(self.decoder.model, cache_map)


def _filter_sizes(sizes: Mapping[str, int], names: tuple[Dim, ...]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name in names}
