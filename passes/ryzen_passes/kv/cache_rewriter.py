"""The common part of the rewrites of static caches: node insertion, states, masks, and the updated specification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.kv_cache import LayerCacheSpec, write_kv_cache_spec
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.slot_writes import SlotWriter
from ryzen_passes.kv.state_editor import StateEditor
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView, StaticKVTensor
from ryzen_passes.kv.static.step_positions import NODE_NAME_PREFIX, visible_positions, window_start
from ryzen_passes.opset import standard_opset


class CacheRewriter:
    """The rewrite of the static caches of one graph.

    A subclass inserts the nodes of its method, calls `record_layer` for each layer that it rewrites, and ends with `finish`.
    """

    def __init__(self, view: StaticCacheView, model_info: ModelInfo) -> None:
        self.view, self.model_info = view, model_info
        self.graph = view.model.graph
        self.writer = NodeBuilder(self.graph, model_info)
        self.states = StateEditor(self.writer, view.interface)
        self.slot_writer = SlotWriter(self.writer)
        self.insertion_point = view.first_node_after_positions()
        """Nodes in front of it depend on positions only and precede every layer."""
        self.single_token = view.seq == 1
        self.dead_candidates: list[ir.Node] = []
        """Nodes that `finish` removes if nothing uses them."""
        self._custom_ops: dict[str, Op] = {}
        self._layer_specs: dict[str, LayerCacheSpec] = {}
        self._shared: dict[object, ir.Value] = {}

    def op(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Insert a node in front of `before` and return its output, with the element type of the first input by default."""
        return self.writer.op(before, op_type, inputs, attributes, dtype=dtype, shape=shape, name_prefix=NODE_NAME_PREFIX)

    def unsqueeze(self, before: ir.Node, value: ir.Value, *axes: int) -> ir.Value:
        """Return `value` with new axes of size 1 at `axes`."""
        return self.op(before, "Unsqueeze", [value, self.writer.int64_vector(*axes)])

    def reshape(self, before: ir.Node, value: ir.Value, *dims: int, shape: ir.Shape | None = None) -> ir.Value:
        """Return `value` reshaped to `dims`, in which 0 keeps a dim and -1 is computed; `shape` is recorded for the result."""
        return self.op(before, "Reshape", [value, self.writer.int64_vector(*dims)], shape=shape)

    def expand(self, before: ir.Node, value: ir.Value, *dims: int) -> ir.Value:
        """Return `value` repeated along its axes of size 1 to `dims`, in which 1 keeps a dim."""
        return self.op(before, "Expand", [value, self.writer.int64_vector(*dims)])

    def slice(self, before: ir.Node, value: ir.Value, start: int, end: int, *, axis: int) -> ir.Value:
        """Return `value` from `start` to before `end` along `axis`."""
        integers = self.writer.int64_vector
        return self.op(before, "Slice", [value, integers(start), integers(end), integers(axis)])

    def cast(self, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return `value` cast to `dtype`."""
        return self.op(before, "Cast", [value], dtype, to=int(dtype))

    def shared(self, key: object, make: Callable[[], ir.Value]) -> ir.Value:
        """Return the value that `make` returned at the first call with `key`."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def bool_mask(self) -> ir.Value:
        """Return (batch, seq) bool: true for the tokens of the step, false for padding."""
        return self.cast(self.insertion_point, self.view.mask, ir.DataType.BOOL)

    def token_count(self) -> ir.Value:
        """Return (batch, 1) int64: the number of tokens of each row in the step."""
        return self.op(self.insertion_point, "ReduceSum", [self.view.mask, self.writer.int64_vector(1)], keepdims=1)

    def custom_op(
        self, before: ir.Node, op: Op, inputs: Sequence[ir.Value], dtypes: Sequence[ir.DataType], **attributes: int
    ) -> Sequence[ir.Value]:
        """Insert a node of a custom op in front of `before` and return its outputs, of the element types `dtypes`."""
        self._custom_ops.setdefault(op.name, op)
        name = self.writer.names.allocate(f"{NODE_NAME_PREFIX}_{op.name.lower()}")
        node = ir.node(op.name, inputs, op.node_attributes(attributes), domain=op.domain, num_outputs=len(dtypes), name=name)
        return self.writer.insert_node(before, node, dtypes)

    def int64(self, number: int) -> ir.Value:
        """Return an int64 scalar."""
        return self.writer.scalar(number, ir.DataType.INT64)

    def arange(self, start: int, end: int) -> ir.Value:
        """Return (end - start,) int64: the integers from `start` to `end` - 1."""
        return self.writer.constant(np.arange(start, end), ir.DataType.INT64)

    def window_start(self, before: ir.Node, query: ir.Value, window: int | None) -> ir.Value | None:
        """Return the last position outside the attention window of each query; None if the window is unlimited."""
        return window_start(self.writer, before, query, window)

    def visible_positions(
        self,
        before: ir.Node,
        key: ir.Value,
        *,
        query: ir.Value | None = None,
        window: int | None = None,
        start: ir.Value | None = None,
        has_free_slots: bool = False,
    ) -> ir.Value:
        """Return bool: whether queries see the keys at the positions `key`; see `step_positions.visible_positions`.

        `window` is the attention window of the queries at `query`; it replaces `start`.
        """
        if query is not None and window is not None:
            start = self.window_start(before, query, window)
        return visible_positions(self.writer, before, key, query=query, start=start, has_free_slots=has_free_slots)

    def cache_shape(self, layer: StaticCacheLayer, *dims: int) -> ir.Shape:
        """Return the shape (batch, kv_heads, ...) with further `dims`."""
        return ir.Shape((self.view.batch, layer.spec.kv_heads, *dims))

    def set_slots(self, layer: StaticCacheLayer, slots: int) -> None:
        """Set the number of slots of the states of keys and values."""
        for tensor in (layer.key, layer.value):
            tensor.past.shape = self.cache_shape(layer, slots, tensor.spec.head_size)

    def replace_cache(self, tensor: StaticKVTensor, cache: ir.Value) -> None:
        """Make `cache` the state after the step, for every reader, under the name of the old one."""
        producer = tensor.cache.producer()
        replace_value(tensor.cache, cache)
        cache.shape = tensor.past.shape
        self.dead_candidates += [producer] if producer is not None else []

    def replace_mask(self, layer: StaticCacheLayer, mask: ir.Value) -> None:
        """Replace the attention mask of `layer`."""
        old = layer.attention.inputs[3]
        layer.attention.replace_input_with(3, mask)
        if old is not None and (producer := old.producer()) is not None:
            self.dead_candidates.append(producer)

    def past_and_update(self, layer: StaticCacheLayer, tensor: StaticKVTensor) -> ir.Value:
        """Return (batch, kv_heads, slots + seq, head_size): the slots from before the step, then the step's tokens."""
        return self.shared(tensor.past, lambda: self.op(layer.attention, "Concat", [tensor.past, tensor.update], axis=2))

    def record_layer(self, layer: StaticCacheLayer, **spec_fields: Any) -> None:
        """Record the changed fields of the specification of `layer`."""
        self._layer_specs[layer.spec.attention_node] = msgspec.structs.replace(layer.spec, **spec_fields)

    def finish(
        self, summary: str, *, changed: Sequence[StaticCacheLayer] | None = None, interface: Interface | None = None
    ) -> Change:
        """Remove dead nodes, write interface and specification to the model, and return the change.

        `changed` are the layers whose attention node reads other tensors than before (default: all); `interface` is the
        interface without the new states (default: that of the view).
        """
        model, spec = self.view.model, self.view.spec
        removed = remove_dead_nodes([node for node in self.dead_candidates if node.graph is not None])
        for op in self._custom_ops.values():
            op.add_to(model)
            model.functions[op.ir_function().identifier()].opset_imports[""] = standard_opset(model)
        self.states.write_interface(model, self.view.interface if interface is None else interface)
        layers = tuple(self._layer_specs.get(layer.attention_node, layer) for layer in spec.layers)
        write_kv_cache_spec(model, msgspec.structs.replace(spec, layers=layers))
        return Change(
            inserted=tuple(self.writer.inserted),
            removed=tuple(removed),
            changed=tuple(layer.attention.name or "" for layer in (self.view.layers if changed is None else changed)),
            summary=summary,
        )
