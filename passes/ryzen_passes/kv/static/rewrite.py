"""Write static caches: growing caches become states with a fixed number of slots, each token in the slot of its position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_compile.spec.dims import Dim
from ryzen_compile.spec.interface import InputSpec, TensorSpec
from ryzen_compile.spec.kv_cache import (
    CacheTensorSpec,
    KVCacheSpec,
    LayerCacheSpec,
    StaticCache,
    StepTensorsSpec,
    write_kv_cache_spec,
)
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.recognition.recognized_decoder import AttentionLayer, KVTensor, RecognizedDecoder
from ryzen_passes.kv.state_editor import StateEditor, dtype_of
from ryzen_passes.kv.static.step_positions import (
    LENGTH_STATE,
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
"""The opset that introduces TensorScatter."""
_DEFAULT_STEP_TOKENS = 512
"""The maximum number of tokens of a step if the interface does not bound it."""
PAST, PRESENT = "past_key_values", "present"
"""Names of the state inputs and outputs, as in Optimum, for a model that has no caches."""

Spec = TypeVar("Spec", bound=TensorSpec)


def make_static(decoder: RecognizedDecoder, model_info: ModelInfo, capacity: int, step: int | None = None) -> Change:
    """Rewrite `decoder` in place so that every cache is a state of `capacity` slots. Raises PatternNotMatched.

    If `step` is given, every step has exactly that many tokens.
    """
    if step is not None:
        _set_step_size(decoder, step)
    return _StaticCacheRewriter(decoder, model_info, capacity).run()


def _set_step_size(decoder: RecognizedDecoder, step: int) -> None:
    """Replace the sequence dim by the number `step` in every shape."""
    graph = decoder.model.graph
    ids = next(value for value in graph.inputs if value.name == decoder.ids.name)
    dim = ids.shape[1] if ids.shape is not None else None
    if isinstance(dim, int):
        if dim != step:
            raise PatternNotMatched(
                f"the graph has a fixed step of {dim} tokens, which differs from `step` {step}", decoder.ids.name
            )
        return
    name = dim.value if dim is not None else None
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value == name and value.shape is not None:
                if value.shape.frozen:
                    value.shape = value.shape.copy()
                value.shape[axis] = step
    interface = decoder.interface

    def with_step(spec: Spec) -> Spec:
        dims = None if spec.dims is None else tuple(step if size == name else size for size in spec.dims)
        return msgspec.structs.replace(spec, dims=dims)

    decoder.interface = msgspec.structs.replace(
        interface, inputs=tuple(map(with_step, interface.inputs)), outputs=tuple(map(with_step, interface.outputs))
    )
    decoder.ids = with_step(decoder.ids)


class _StaticCacheRewriter:
    """The rewrite of one graph."""

    def __init__(self, decoder: RecognizedDecoder, model_info: ModelInfo, capacity: int) -> None:
        self.decoder, self.model_info, self.capacity = decoder, model_info, capacity
        self.graph = decoder.model.graph
        self.writer = NodeBuilder(self.graph, model_info)
        self.insertion_point: ir.Node = next(iter(self.graph))
        self.original_nodes = set(self.graph)
        dims = self._input(decoder.ids.name).shape
        if dims is None or len(dims) != 2:
            raise PatternNotMatched(
                f"expected token ids of shape (batch, seq) (got {'an unknown rank' if dims is None else f'rank {len(dims)}'})",
                decoder.ids.name,
            )
        self.batch, self.seq = dims[0], dims[1]
        self.dead_candidates: list[ir.Node] = []
        self.states = StateEditor(self.writer, decoder.interface)
        self.layer_specs: list[LayerCacheSpec] = []

    def run(self) -> Change:
        decoder = self.decoder
        if (problem := raise_opset(decoder.model, OPSET)) is not None:
            raise PatternNotMatched(
                f"static caches require opset {OPSET}: {problem}", decoder.layers[0].attention.name or "Attention"
            )
        old_mask = self._input(decoder.mask.name) if decoder.mask is not None else None
        if old_mask is not None:
            old_mask.name, name = f"{old_mask.name}_original", old_mask.name
            self.model_info.names.used.discard(name or "")
        mask_name = decoder.mask.name if decoder.mask else "attention_mask"
        step_positions = write_step_positions(
            self.writer,
            self.states,
            self.insertion_point,
            self.batch,
            self.seq,
            mask_name,
            self.capacity - self._max_step_tokens(),
        )
        for position_input in decoder.position_inputs:
            producer = position_input.value.producer()
            replace_position_input(self.writer, self.insertion_point, position_input, step_positions)
            if producer is not None:
                self.dead_candidates.append(producer)
        for value in self._position_id_inputs():
            value.replace_all_uses_with(
                cast_to(self.writer, self.insertion_point, step_positions.positions, self.model_info.types[value])
            )
        masks: dict[tuple[object, ...], ir.Value] = {}
        for index, layer in enumerate(decoder.layers):
            key = (layer.visibility.window, layer.visibility.alibi_slopes, layer.key.dtype)
            if key not in masks:
                masks[key] = self._mask(layer, step_positions)
            self._make_layer_static(index, layer, step_positions, masks[key])
        removed = remove_dead_nodes([node for node in self.dead_candidates if node.graph is not None])
        self._remove_dead_position_nodes(removed)
        self._check_no_step_dependence(old_mask)
        self._write_interface(step_positions)
        self._write_kv_cache_spec(step_positions)
        changed = [layer.attention.name or "" for layer in decoder.layers]
        return Change(
            inserted=tuple(self.writer.inserted),
            removed=tuple(removed),
            changed=tuple(changed),
            summary=f"{len(decoder.layers)} layers store their keys and values in {self.capacity} slots each",
        )

    def _input(self, name: str) -> ir.Value:
        return next(value for value in self.graph.inputs if value.name == name)

    def _mask(self, layer: AttentionLayer, step_positions: StepPositions) -> ir.Value:
        """Return the attention mask of `layer`: bool, or additive if the layer has ALiBi biases."""
        visibility, before = layer.visibility, self.insertion_point
        visible = visible_slots(self.writer, before, step_positions, self.capacity, visibility.window)
        if not visibility.alibi_slopes:
            return visible
        return alibi_bias(self.writer, before, step_positions, visible, self.capacity, visibility.alibi_slopes, layer.key.dtype)

    def _make_layer_static(self, index: int, layer: AttentionLayer, step_positions: StepPositions, mask: ir.Value) -> None:
        node = layer.attention
        specs: list[CacheTensorSpec] = []
        for input_index, (tensor, suffix) in enumerate(((layer.key, "key"), (layer.value, "value")), 1):
            name = tensor.state.name if tensor.state is not None else f"{PAST}.{index}.{suffix}"
            cache = self._write_cache(node, tensor, layer.kv_heads, step_positions, name, f"{PRESENT}.{index}.{suffix}")
            specs.append(
                CacheTensorSpec(
                    state=name,
                    update=tensor.update.name or "",
                    cache=cache.name or "",
                    head_size=tensor.head_size,
                    dtype=dtype_of(tensor.update),
                )
            )
            attended = node.inputs[input_index]
            node.replace_input_with(input_index, cache)
            if attended is not None and (producer := attended.producer()) is not None:
                self.dead_candidates.append(producer)
        old_mask = node.inputs[3] if len(node.inputs) > 3 else None
        node.resize_inputs(4)
        node.replace_input_with(3, mask)
        node.attributes.pop("is_causal", None)
        if old_mask is not None and (producer := old_mask.producer()) is not None:
            self.dead_candidates.append(producer)
        self.layer_specs.append(
            LayerCacheSpec(
                attention_node=node.name or "",
                heads=layer.heads,
                kv_heads=layer.kv_heads,
                key=specs[0],
                value=specs[1],
                window=layer.visibility.window,
                policy=StaticCache(slots=self.capacity),
            )
        )

    def _write_cache(
        self, before: ir.Node, tensor: KVTensor, heads: int, step_positions: StepPositions, state_name: str, output_name: str
    ) -> ir.Value:
        """Return the cache that attention reads: the state `state_name` with the step's tokens written to their slots."""
        shape = ir.Shape((self.batch, heads, self.capacity, tensor.head_size))
        if tensor.state is not None:
            past = self._input(tensor.state.input)
            past.shape = shape
            self.states.register(msgspec.structs.replace(tensor.state, append_axis=None, in_place=True))
        else:
            past = self.states.add_input(state_name, self.model_info.types[tensor.update], shape, input_name=state_name)
        attributes = {"axis": 2, "mode": "linear"}
        cache = self.writer.op(
            before,
            "TensorScatter",
            [past, tensor.update, step_positions.length],
            attributes,
            shape=shape,
            name_prefix=NODE_NAME_PREFIX,
        )
        if tensor.state is None:
            self.states.set_output(state_name, cache, output_name=output_name)
            return cache
        if (producer := tensor.cache.producer()) is not None:
            self.dead_candidates.append(producer)
        replace_value(tensor.cache, cache)
        cache.shape = shape
        return cache

    def _remove_dead_position_nodes(self, removed: list[str]) -> None:
        dead = [node for node in self.graph if not any(output.uses() or output.is_graph_output() for output in node.outputs)]
        removed += remove_dead_nodes(dead)

    def _check_no_step_dependence(self, old_mask: ir.Value | None) -> None:
        """Raise PatternNotMatched if a node still reads the length of a growing cache, the old mask or the position ids."""
        step_dependent = self.decoder.position_subgraph.step_dependent
        self._read_batch_from_ids(old_mask)
        obsolete = [*self._position_id_inputs(), *([old_mask] if old_mask is not None else [])]
        for value in obsolete:
            if uses := [use.node for use in value.uses()]:
                name = self.decoder.mask.name if self.decoder.mask is not None and value is old_mask else value.name
                raise PatternNotMatched(
                    f"reads `{name}` and is neither an attention mask nor a position of an attention",
                    uses[0].name or uses[0].op_type,
                )
        for node in self.graph:
            if node in self.original_nodes and node.op_type in ("Shape", "Size") and step_dependent.get(node.outputs[0]):
                raise PatternNotMatched(
                    "reads the length of a growing cache and is neither an attention mask nor a position",
                    node.name or node.op_type,
                )
        for value in obsolete:
            self.graph.inputs.remove(value)

    def _read_batch_from_ids(self, mask: ir.Value | None) -> None:
        """Make Shape nodes that read the batch size from a cache or the old mask read it from the token ids.

        In a model without caches every Shape of the mask is redirected, as its shape equals that of the ids.
        """
        ids = self._input(self.decoder.ids.name)
        tensors = [tensor for layer in self.decoder.layers for tensor in (layer.key, layer.value)]
        caches = [self._input(tensor.state.input) for tensor in tensors if tensor.state is not None]
        for value in (*caches, *([mask] if mask is not None else [])):
            for node in [use.node for use in value.uses() if use.node.op_type == "Shape"]:
                is_batch = int_attribute(node, "start", 0) == 0 and int_attribute(node, "end", 0) == 1
                if is_batch or not caches:
                    node.replace_input_with(0, ids)

    def _max_step_tokens(self) -> int:
        """Return the maximum number of tokens of a step; that many slots must be free before it."""
        seq = self.decoder.ids.dims[1] if self.decoder.ids.dims else None
        bound = seq if isinstance(seq, int) else self.decoder.interface.max_sizes.get(seq or "", _DEFAULT_STEP_TOKENS)
        return min(bound, self.capacity)

    def _position_id_inputs(self) -> list[ir.Value]:
        names = {spec.name for spec in self.decoder.interface.inputs if spec.role == "positions"}
        return [value for value in self.graph.inputs if value.name in names]

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
        mask = InputSpec(
            name=step_positions.mask.name or "", dtype="int64", dims=(batch, seq), role="mask", low=0, high=1, padding_value=0
        )
        self.states.write_interface(self.decoder.model, new, mask)

    def _write_kv_cache_spec(self, step_positions: StepPositions) -> None:
        spec = KVCacheSpec(
            layers=tuple(self.layer_specs),
            position_encoding=self.decoder.position_encoding,
            max_positions=self.decoder.max_positions,
            padding=True,
            step=StepTensorsSpec(
                mask=step_positions.mask.name or "",
                positions=step_positions.positions.name or "",
                length_state=LENGTH_STATE,
            ),
        )
        write_kv_cache_spec(self.decoder.model, spec)


def _filter_sizes(sizes: Mapping[str, int], names: tuple[Dim, ...]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name in names}
