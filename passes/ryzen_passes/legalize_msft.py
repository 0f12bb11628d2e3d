"""Legalize ONNX Runtime contrib ops: replace `com.microsoft` attention, RoPE and norm ops by standard ONNX ops.

The ops are those that the model builder of ONNX Runtime GenAI writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_tensor, float_attribute, int_attribute, ints_attribute
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_passes.opset import raise_opset

MSFT_DOMAIN = "com.microsoft"
_OPSET = 24
_INT64, _BOOL = ir.DataType.INT64, ir.DataType.BOOL
_SEQ_AXIS = 2
_MAX_DISTANCE = 16
"""The maximum number of nodes to trace back from a tensor to the weight that determines its last dim."""
_LAST_DIM_PRESERVING_OPS = frozenset(
    {"Reshape", "Transpose", "RotaryEmbedding", "RMSNormalization", "SimplifiedLayerNormalization"}
)
"""Ops between a projection and its attention whose output has as many elements per token as their input."""


class UnsupportedContribOp(PatternNotMatched):
    """A contrib op that has no equivalent in standard ONNX ops; `location` is the name of the node."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(f"{node.op_type} of `{node.domain or 'ai.onnx'}` {reason}", node)


def legalize_contrib_ops(model: ir.Model) -> None:
    """Replace the `com.microsoft` ops that decoders use by standard ONNX ops, in place.

    GroupQueryAttention gets a causal mask that does not mask padding: the op reads only the length of each row from its mask.
    Raises UnsupportedContribOp if an op has no equivalent in standard ONNX ops.
    """
    contrib_nodes = [node for node in model.graph if _rule_for(node) is not None]
    if not contrib_nodes:
        return
    if (reason := raise_opset(model, _OPSET)) is not None:
        raise UnsupportedContribOp(contrib_nodes[0], f"needs opset {_OPSET}: {reason}")
    model_info = ModelInfo(model)
    legalizer = _ContribOpLegalizer(NodeBuilder(model.graph, model_info), model_info.shapes)
    for node in contrib_nodes:
        rule = _rule_for(node)
        if rule is not None:
            rule(legalizer, node)
            remove_dead_nodes([node])
    _resolve_cache_head_sizes(model.graph, ShapeInference())


def _resolve_cache_head_sizes(graph: ir.Graph, shapes: ShapeInference) -> None:
    """Write an inferred static head size into the shapes of each past cache and of the Concat output that extends it."""
    for node in graph:
        past = node.inputs[0] if node.op_type == "Concat" and int_attribute(node, "axis", 0) % 4 == _SEQ_AXIS else None
        dims = shapes.dims(node.outputs[0]) if past is not None and past.is_graph_input() else None
        for value in (past, node.outputs[0]):
            if dims is not None and value is not None and value.shape is not None and len(value.shape) == len(dims) == 4:
                head_size = dims[3] if isinstance(dims[3], int) else value.shape[3]
                value.shape = ir.Shape([*value.shape.dims[:3], head_size])


def _rule_for(node: ir.Node) -> Callable[[_ContribOpLegalizer, ir.Node], None] | None:
    if node.op_type == "SimplifiedLayerNormalization" and node.domain in ("", MSFT_DOMAIN):
        return _ContribOpLegalizer.simplified_layer_norm
    return _RULES.get(node.op_type) if node.domain == MSFT_DOMAIN else None


class _ContribOpLegalizer:
    def __init__(self, writer: NodeBuilder, shapes: ShapeInference) -> None:
        self.writer, self.shapes = writer, shapes

    def op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        return self.writer.op(before, op, inputs, attributes, dtype=dtype)

    def simplified_layer_norm(self, node: ir.Node) -> None:
        """Replace a SimplifiedLayerNormalization."""
        if any(output.uses() for output in node.outputs[1:]):
            raise UnsupportedContribOp(node, "has outputs besides the normalized tensor that are used")
        self._rms_norm(node, _required_input(node, 0), _required_input(node, 1))

    def skip_simplified_layer_norm(self, node: ir.Node) -> None:
        """Replace a SkipSimplifiedLayerNormalization: a sum, and the norm of the sum."""
        total = self.op(node, "Add", [_required_input(node, 0), _required_input(node, 1)])
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            total = self.op(node, "Add", [total, node.inputs[3]])
        if any(output.uses() for output in node.outputs[1:3]):
            raise UnsupportedContribOp(node, "has statistics outputs that are used")
        if len(node.outputs) > 3:
            replace_value(node.outputs[3], total)
        self._rms_norm(node, total, _required_input(node, 2))

    def _rms_norm(self, node: ir.Node, value: ir.Value, weight: ir.Value) -> None:
        axis, epsilon = int_attribute(node, "axis", -1), float_attribute(node, "epsilon", 1e-5)
        replace_value(node.outputs[0], self.op(node, "RMSNormalization", [value, weight], axis=axis, epsilon=epsilon))

    def rotary_embedding(self, node: ir.Node) -> None:
        """Replace a RotaryEmbedding over (batch, seq, heads * size) or (batch, heads, seq, size)."""
        value, positions, cos, sin = (_required_input(node, index) for index in range(4))
        if int_attribute(node, "is_packed_batching", 0):
            raise UnsupportedContribOp(node, "takes sequences packed into one row (`is_packed_batching`)")
        is_3d = value.shape is None or len(value.shape) == 3
        head_size = self._head_size_from_cos(node, cos)
        if is_3d:
            value = self._split_heads(node, value, head_size)
        value = self._apply_rotary(
            node,
            value,
            cos,
            sin,
            positions,
            int_attribute(node, "interleaved", 0),
            int_attribute(node, "rotary_embedding_dim", 0),
        )
        replace_value(node.outputs[0], self._merge_heads(node, value) if is_3d else value)

    def _apply_rotary(
        self,
        node: ir.Node,
        value: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        positions: ir.Value,
        interleaved: int,
        rotary_dim: int,
    ) -> ir.Value:
        attributes: dict[str, Any] = {"interleaved": interleaved} | ({"rotary_embedding_dim": rotary_dim} if rotary_dim else {})
        return self.op(node, "RotaryEmbedding", [value, cos, sin, positions], **attributes)

    def _head_size_from_cos(self, node: ir.Node, cos: ir.Value) -> int:
        """Return the head size; the cosine table has half of it as its last dim."""
        tensor = constant_tensor(cos)
        if tensor is None:
            raise UnsupportedContribOp(node, "has a cosine table that is not constant")
        return int_attribute(node, "rotary_embedding_dim", 0) or 2 * int(tensor.numpy().shape[1])

    def _split_heads(self, node: ir.Node, value: ir.Value, size: int) -> ir.Value:
        """Reshape `value` (batch, seq, heads * size) to (batch, heads, seq, size)."""
        unmerged = self.op(node, "Reshape", [value, self.writer.int64_vector(0, 0, -1, size)])
        return self.op(node, "Transpose", [unmerged], perm=(0, 2, 1, 3))

    def _merge_heads(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Reshape `value` (batch, heads, seq, size) to (batch, seq, heads * size)."""
        transposed = self.op(node, "Transpose", [value], perm=(0, 2, 1, 3))
        return self.op(node, "Reshape", [transposed, self.writer.int64_vector(0, 0, -1)])

    def group_query_attention(self, node: ir.Node) -> None:
        """Replace a GroupQueryAttention, which appends to its KV caches and may apply RoPE."""
        inputs = [*node.inputs, *[None] * (14 - len(node.inputs))]
        heads, kv_heads = int_attribute(node, "num_heads", 0), int_attribute(node, "kv_num_heads", 0)
        if (
            float_attribute(node, "softcap", 0.0)
            or int_attribute(node, "smooth_softmax", 0)
            or any(value is not None for value in inputs[10:])
        ):
            raise UnsupportedContribOp(node, "caps its scores, or has an attention bias, an attention sink or quantized caches")
        query, key, value, past_key, past_value = inputs[:5]
        cos, sin, positions = inputs[7:10]
        if query is None or past_key is None or past_value is None:
            raise UnsupportedContribOp(node, "has no query or no KV cache")
        head_size = self._head_size(node, query, cos, heads, kv_heads, packed=key is None)
        if key is None or value is None:
            query, key, value = self._unpack_qkv(node, query, [heads * head_size, kv_heads * head_size, kv_heads * head_size])
        query, key, value = (self._split_heads(node, tensor, head_size) for tensor in (query, key, value))
        if int_attribute(node, "do_rotary", 0):
            if cos is None or sin is None:
                raise UnsupportedContribOp(node, "applies RoPE (`do_rotary`) without cosine and sine tables")
            position_ids = positions if positions is not None else self._position_ids(node, past_key, query)
            interleaved = int_attribute(node, "rotary_interleaved", 0)
            query, key = (self._apply_rotary(node, tensor, cos, sin, position_ids, interleaved, 0) for tensor in (query, key))
        present = [
            self._append_to_cache(node, past, new, index) for past, new, index in ((past_key, key, 1), (past_value, value, 2))
        ]
        window = int_attribute(node, "local_window_size", -1)
        mask = self._causal_mask(node, past_key, query, window)
        scale = float_attribute(node, "scale", 0.0) or float(head_size) ** -0.5
        output = self.op(node, "Attention", [query, *present, mask], scale=scale)
        replace_value(node.outputs[0], self._merge_heads(node, output))

    def multi_head_attention(self, node: ir.Node) -> None:
        """Replace a MultiHeadAttention over (batch, seq, heads * size), with or without an attention bias and KV caches."""
        inputs = [*node.inputs, *[None] * (10 - len(node.inputs))]
        query, key, value, bias, key_padding_mask, attention_bias, past_key, past_value = inputs[:8]
        if query is None or key is None or value is None or bias is not None:
            raise UnsupportedContribOp(node, "has packed QKV, or a bias of its query, key and value projections")
        extra_outputs = [output for output in node.outputs[3:] if output.uses() or output.is_graph_output()]
        if key_padding_mask is not None or extra_outputs or any(tensor is not None for tensor in inputs[8:]):
            raise UnsupportedContribOp(
                node, "has a key padding mask, past and present caches that share memory, or scores as an output"
            )
        heads = int_attribute(node, "num_heads", 0)
        if not heads or any(self.shapes.rank(tensor) != 3 for tensor in (query, key, value)):
            raise UnsupportedContribOp(
                node, "has no `num_heads`, or a query, key or value that is not (batch, seq, heads * size)"
            )
        if (past_key is not None or past_value is not None) and (None in (past_key, past_value) or len(node.outputs) < 3):
            raise UnsupportedContribOp(node, "has only one of its two past caches, or past caches without present outputs")
        head_size, value_head_size = (self._last_dim(node, tensor) // heads for tensor in (query, value))
        query, key, value = (
            self._split_heads_or_reuse(node, tensor, heads, tensor_head_size)
            for tensor, tensor_head_size in ((query, head_size), (key, head_size), (value, value_head_size))
        )
        present = [key, value]
        for index, past in ((0, past_key), (1, past_value)):
            if past is not None:
                present[index] = self.op(node, "Concat", [past, present[index]], axis=_SEQ_AXIS)
            if len(node.outputs) > index + 1:
                replace_value(node.outputs[index + 1], present[index])
        mask_inputs = [attention_bias] if attention_bias is not None else []
        attributes: dict[str, Any] = {}
        if int_attribute(node, "unidirectional", 0):
            if past_key is not None or attention_bias is not None:
                raise UnsupportedContribOp(node, "is causal and has a cache or an attention bias")
            attributes["is_causal"] = 1
        attributes["scale"] = float_attribute(node, "scale", 0.0) or float(head_size) ** -0.5
        replace_value(
            node.outputs[0], self._merge_heads(node, self.op(node, "Attention", [query, *present, *mask_inputs], **attributes))
        )

    def _last_dim(self, node: ir.Node, value: ir.Value) -> int:
        """Return the last dim of `value`, which must be static."""
        dims = self.shapes.dims(value)
        if not dims or not isinstance(dims[-1], int):
            raise UnsupportedContribOp(node, "has an unknown head size")
        return dims[-1]

    def _split_heads_or_reuse(self, node: ir.Node, value: ir.Value, heads: int, size: int) -> ir.Value:
        """Return `value` as (batch, heads, seq, size): the tensor before its heads were merged if it exists, else a reshape."""
        reshape = value.producer()
        transpose = (
            reshape.inputs[0].producer()
            if reshape is not None and reshape.op_type == "Reshape" and reshape.inputs[0] is not None
            else None
        )
        is_merge = (
            transpose is not None and transpose.op_type == "Transpose" and ints_attribute(transpose, "perm") == (0, 2, 1, 3)
        )
        unmerged = transpose.inputs[0] if transpose is not None and is_merge else None
        dims, merged_dims = self.shapes.dims(unmerged) if unmerged is not None else None, self.shapes.dims(value)
        if unmerged is None or dims is None or len(dims) != 4 or merged_dims is None:
            return self._split_heads(node, value, size)
        return unmerged if dims[1] == heads and merged_dims[:2] == (dims[0], dims[2]) else self._split_heads(node, value, size)

    def _head_size(
        self, node: ir.Node, query: ir.Value, cos: ir.Value | None, heads: int, kv_heads: int, *, packed: bool
    ) -> int:
        if cos is not None:
            return self._head_size_from_cos(node, cos)
        width = query.shape[2] if query.shape is not None and len(query.shape) == 3 else None
        if not isinstance(width, int):
            width = self._trace_last_dim(query)
        if width is None:
            raise UnsupportedContribOp(node, "has an unknown head size")
        return width // (heads + 2 * kv_heads if packed else heads)

    def _trace_last_dim(self, value: ir.Value | None) -> int | None:
        """Return the last dim of `value`, read from the weight of the MatMul or Add that produces it; None if not found."""
        for _ in range(_MAX_DISTANCE):
            node = value.producer() if value is not None else None
            if node is None or not (node.op_type in ("MatMul", "Add") or node.op_type in _LAST_DIM_PRESERVING_OPS):
                return None
            tensor = constant_tensor(node.inputs[1]) if node.op_type in ("MatMul", "Add") else None
            if tensor is not None and tensor.shape.rank():
                return int(tensor.shape.numpy()[-1])
            if node.op_type == "MatMul":
                return None
            value = node.inputs[0]
        return None

    def _unpack_qkv(self, node: ir.Node, packed: ir.Value, widths: list[int]) -> list[ir.Value]:
        ends = np.cumsum([0, *widths])
        integers = self.writer.int64_vector
        return [
            self.op(node, "Slice", [packed, integers(int(start)), integers(int(end)), integers(2)])
            for start, end in zip(ends[:-1], ends[1:], strict=True)
        ]

    def _append_to_cache(self, node: ir.Node, past: ir.Value, update: ir.Value, output_index: int) -> ir.Value:
        present = self.op(node, "Concat", [past, update], axis=_SEQ_AXIS)
        replace_value(node.outputs[output_index], present)
        return present

    def _seq_length(self, node: ir.Node, value: ir.Value) -> ir.Value:
        size = self.op(node, "Shape", [value], _INT64, start=_SEQ_AXIS, end=_SEQ_AXIS + 1)
        return self.op(node, "Squeeze", [size])

    def _arange(self, node: ir.Node, stop: ir.Value) -> ir.Value:
        zero, one = self.writer.scalar(0, _INT64), self.writer.scalar(1, _INT64)
        return self.op(node, "Range", [zero, stop, one])

    def _position_ids(self, node: ir.Node, past: ir.Value, query: ir.Value) -> ir.Value:
        """Return the position ids of the new tokens, (batch, seq): they continue after the past."""
        tokens = self._arange(node, self._seq_length(node, query))
        positions = self.op(node, "Add", [tokens, self._seq_length(node, past)])
        batch = self.op(node, "Shape", [query], _INT64, start=0, end=1)
        seq = self.op(node, "Shape", [query], _INT64, start=_SEQ_AXIS, end=_SEQ_AXIS + 1)
        return self.op(node, "Expand", [positions, self.op(node, "Concat", [batch, seq], axis=0)])

    def _causal_mask(self, node: ir.Node, past: ir.Value, query: ir.Value, window: int) -> ir.Value:
        """Return the causal mask, (1, 1, seq, past + seq) bool, True where a query attends to a key.

        With `window` above 0, a query attends to the last `window` keys only.
        """
        past_length, new_length = self._seq_length(node, past), self._seq_length(node, query)
        key_positions = self._arange(node, self.op(node, "Add", [past_length, new_length]))
        query_positions = self.op(
            node,
            "Unsqueeze",
            [self.op(node, "Add", [self._arange(node, new_length), past_length]), self.writer.int64_vector(-1)],
        )
        visible = self.op(node, "LessOrEqual", [key_positions, query_positions], _BOOL)
        if window > 0:
            window_start = self.op(node, "Sub", [query_positions, self.writer.scalar(window, _INT64)])
            visible = self.op(node, "And", [visible, self.op(node, "Greater", [key_positions, window_start], _BOOL)])
        return self.op(node, "Unsqueeze", [visible, self.writer.int64_vector(0, 1)])


_RULES: dict[str, Callable[[_ContribOpLegalizer, ir.Node], None]] = {
    "GroupQueryAttention": _ContribOpLegalizer.group_query_attention,
    "MultiHeadAttention": _ContribOpLegalizer.multi_head_attention,
    "RotaryEmbedding": _ContribOpLegalizer.rotary_embedding,
    "SkipSimplifiedLayerNormalization": _ContribOpLegalizer.skip_simplified_layer_norm,
}


def _required_input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise UnsupportedContribOp(node, f"has no input {index}")
    return value
