"""Operators of ONNX Runtime's own, as its GenAI model builder writes them, said in ONNX's: attention, RoPE, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import ShapeInference, constant_tensor, int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_passes.opset import raise_opset

MSFT_DOMAIN = "com.microsoft"
_OPSET = 24
_INT64, _BOOL = ir.DataType.INT64, ir.DataType.BOOL
_SEQ_AXIS = 2
_MAX_DISTANCE = 16
_LAST_DIM_PRESERVING_OPS = frozenset(
    {"Reshape", "Transpose", "RotaryEmbedding", "RMSNormalization", "SimplifiedLayerNormalization"}
)
"""Ops between a projection and its attention that give as many elements a token as they take."""


class UnsupportedContribOp(Exception):
    """What an operator does that cannot be said in ONNX's; the node is named."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(f"{node.op_type} of `{node.domain or 'ai.onnx'}` {reason}")
        self.location = node.name or node.op_type


def legalize_contrib_ops(model: ir.Model) -> None:
    """Put ONNX's operators in the place of those of `com.microsoft` that decoders are written with, in place.

    Masks are causal afterwards and hide no padding: GroupQueryAttention takes from its mask no more than how long each row is.
    Raises Foreign where an operator does more than can be said.
    """
    found = [node for node in model.graph if _rule_for(node) is not None]
    if not found:
        return
    if (reason := raise_opset(model, _OPSET)) is not None:
        raise UnsupportedContribOp(found[0], f"needs opset {_OPSET}: {reason}")
    known = ModelInfo(model)
    writer = _ContribOpLegalizer(NodeBuilder(model.graph, known), known.shapes)
    for node in found:
        rule = _rule_for(node)
        if rule is not None:
            rule(writer, node)
            remove_dead_nodes([node])
    _resolve_cache_head_sizes(model.graph, ShapeInference())


def _resolve_cache_head_sizes(graph: ir.Graph, shapes: ShapeInference) -> None:
    """Let the sizes of a head that follow from what caches are joined to be numbers in their shapes, before and after."""
    for node in graph:
        past = node.inputs[0] if node.op_type == "Concat" and int_attribute(node, "axis", 0) % 4 == _SEQ_AXIS else None
        found = shapes.dims(node.outputs[0]) if past is not None and past.is_graph_input() else None
        for value in (past, node.outputs[0]):
            if found is not None and value is not None and value.shape is not None and len(value.shape) == len(found) == 4:
                size = found[3] if isinstance(found[3], int) else value.shape[3]
                value.shape = ir.Shape([*value.shape.dims[:3], size])


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
        """SimplifiedLayerNormalization."""
        if any(output.uses() for output in node.outputs[1:]):
            raise UnsupportedContribOp(node, "gives more than its result")
        self._rms_norm(node, _required_input(node, 0), _required_input(node, 1))

    def skip_simplified_layer_norm(self, node: ir.Node) -> None:
        """SkipSimplifiedLayerNormalization: the norm of a sum, and the sum."""
        total = self.op(node, "Add", [_required_input(node, 0), _required_input(node, 1)])
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            total = self.op(node, "Add", [total, node.inputs[3]])
        if any(output.uses() for output in node.outputs[1:3]):
            raise UnsupportedContribOp(node, "gives its statistics")
        if len(node.outputs) > 3:
            replace_value(node.outputs[3], total)
        self._rms_norm(node, total, _required_input(node, 2))

    def _rms_norm(self, node: ir.Node, value: ir.Value, weight: ir.Value) -> None:
        epsilon = node.attributes.get("epsilon")
        least = epsilon.as_float() if epsilon is not None else 1e-5
        axis = int_attribute(node, "axis", -1)
        replace_value(node.outputs[0], self.op(node, "RMSNormalization", [value, weight], axis=axis, epsilon=least))

    def rotary_embedding(self, node: ir.Node) -> None:
        """RotaryEmbedding over (batch, seq, heads * size) or (batch, heads, seq, size)."""
        value, positions, cos, sin = (_required_input(node, at) for at in range(4))
        if int_attribute(node, "is_packed_batching", 0):
            raise UnsupportedContribOp(node, "takes sequences packed into one row")
        flat = value.shape is None or len(value.shape) == 3
        size = self._head_size_from_cos(node, cos)
        if flat:
            value = self._split_heads(node, value, size)
        value = self._apply_rotary(
            node,
            value,
            cos,
            sin,
            positions,
            int_attribute(node, "interleaved", 0),
            int_attribute(node, "rotary_embedding_dim", 0),
        )
        replace_value(node.outputs[0], self._merge_heads(node, value) if flat else value)

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
        how: dict[str, Any] = {"interleaved": interleaved} | ({"rotary_embedding_dim": rotary_dim} if rotary_dim else {})
        return self.op(node, "RotaryEmbedding", [value, cos, sin, positions], **how)

    def _head_size_from_cos(self, node: ir.Node, cos: ir.Value) -> int:
        """Return the size of a head, of which the table of cosines has half."""
        tensor = constant_tensor(cos)
        if tensor is None:
            raise UnsupportedContribOp(node, "has a table of cosines that is computed")
        return int_attribute(node, "rotary_embedding_dim", 0) or 2 * int(tensor.numpy().shape[1])

    def _split_heads(self, node: ir.Node, value: ir.Value, size: int) -> ir.Value:
        """Return (batch, heads, seq, size) of (batch, seq, heads * size)."""
        rows = self.op(node, "Reshape", [value, self.writer.int64_vector(0, 0, -1, size)])
        return self.op(node, "Transpose", [rows], perm=(0, 2, 1, 3))

    def _merge_heads(self, node: ir.Node, value: ir.Value) -> ir.Value:
        rows = self.op(node, "Transpose", [value], perm=(0, 2, 1, 3))
        return self.op(node, "Reshape", [rows, self.writer.int64_vector(0, 0, -1)])

    def group_query_attention(self, node: ir.Node) -> None:
        """GroupQueryAttention: the caches join in it, and RoPE may be in it."""
        inputs = [*node.inputs, *[None] * (14 - len(node.inputs))]
        heads, groups = int_attribute(node, "num_heads", 0), int_attribute(node, "kv_num_heads", 0)
        cap = node.attributes.get("softcap")
        if (
            (cap is not None and cap.as_float())
            or int_attribute(node, "smooth_softmax", 0)
            or any(one is not None for one in inputs[10:])
        ):
            raise UnsupportedContribOp(node, "caps its scores, or has a bias, a sink or quantised caches")
        query, key, value, past_key, past_value = inputs[:5]
        cos, sin, positions = inputs[7:10]
        if query is None or past_key is None or past_value is None:
            raise UnsupportedContribOp(node, "has no cache")
        size = self._head_size(node, query, cos, heads, groups, packed=key is None)
        if key is None or value is None:
            query, key, value = self._unpack_qkv(node, query, [heads * size, groups * size, groups * size])
        query, key, value = (self._split_heads(node, one, size) for one in (query, key, value))
        if int_attribute(node, "do_rotary", 0):
            if cos is None or sin is None:
                raise UnsupportedContribOp(node, "turns its keys by no table")
            at = positions if positions is not None else self._position_ids(node, past_key, query)
            interleaved = int_attribute(node, "rotary_interleaved", 0)
            query, key = (self._apply_rotary(node, one, cos, sin, at, interleaved, 0) for one in (query, key))
        whole = [self._append_to_cache(node, past, new, at) for past, new, at in ((past_key, key, 1), (past_value, value, 2))]
        window = int_attribute(node, "local_window_size", -1)
        seen = self._causal_mask(node, past_key, query, window)
        scale = node.attributes.get("scale")
        factor = scale.as_float() if scale is not None and scale.as_float() else float(size) ** -0.5
        output = self.op(node, "Attention", [query, *whole, seen], scale=factor)
        replace_value(node.outputs[0], self._merge_heads(node, output))

    def multi_head_attention(self, node: ir.Node) -> None:
        """MultiHeadAttention over (batch, rows, heads * size), with what is added to its scores, and caches or none."""
        inputs = [*node.inputs, *[None] * (10 - len(node.inputs))]
        query, key, value, bias, padding, added, past_key, past_value = inputs[:8]
        if query is None or key is None or value is None or bias is not None:
            raise UnsupportedContribOp(node, "splits one tensor into queries, keys and values, or adds to them")
        scores = [out for out in node.outputs[3:] if out.uses() or out.is_graph_output()]
        if padding is not None or scores or any(one is not None for one in inputs[8:]):
            raise UnsupportedContribOp(node, "masks its keys by their number, shares its caches' memory, or gives its scores")
        heads = int_attribute(node, "num_heads", 0)
        if not heads or any(self.shapes.rank(one) != 3 for one in (query, key, value)):
            raise UnsupportedContribOp(node, "has no queries, keys and values (batch, rows, heads * size)")
        if (past_key is not None or past_value is not None) and (None in (past_key, past_value) or len(node.outputs) < 3):
            raise UnsupportedContribOp(node, "has caches that it does not give back")
        size, wide = (self._last_dim(node, one) // heads for one in (query, value))
        query, key, value = (
            self._split_heads_or_reuse(node, one, heads, width) for one, width in ((query, size), (key, size), (value, wide))
        )
        whole = [key, value]
        for at, past in ((0, past_key), (1, past_value)):
            if past is not None:
                whole[at] = self.op(node, "Concat", [past, whole[at]], axis=_SEQ_AXIS)
            if len(node.outputs) > at + 1:
                replace_value(node.outputs[at + 1], whole[at])
        masks = [added] if added is not None else []
        how: dict[str, Any] = {}
        if int_attribute(node, "unidirectional", 0):
            if past_key is not None or added is not None:
                raise UnsupportedContribOp(node, "is causal, and has a cache or a bias")
            how["is_causal"] = 1
        scale = node.attributes.get("scale")
        how["scale"] = scale.as_float() if scale is not None and scale.as_float() else float(size) ** -0.5
        replace_value(node.outputs[0], self._merge_heads(node, self.op(node, "Attention", [query, *whole, *masks], **how)))

    def _last_dim(self, node: ir.Node, value: ir.Value) -> int:
        """Return the last size of `value`."""
        dims = self.shapes.dims(value)
        if not dims or not isinstance(dims[-1], int):
            raise UnsupportedContribOp(node, "has heads of a size that is not known")
        return dims[-1]

    def _split_heads_or_reuse(self, node: ir.Node, value: ir.Value, heads: int, size: int) -> ir.Value:
        """Return (batch, heads, rows, size) of `value`, which may have been that before its axes were joined."""
        rows = value.producer()
        turn = (
            rows.inputs[0].producer() if rows is not None and rows.op_type == "Reshape" and rows.inputs[0] is not None else None
        )
        perm = turn.attributes.get("perm") if turn is not None and turn.op_type == "Transpose" else None
        before = turn.inputs[0] if turn is not None and perm is not None and tuple(perm.as_ints()) == (0, 2, 1, 3) else None
        dims, joined = self.shapes.dims(before) if before is not None else None, self.shapes.dims(value)
        if before is None or dims is None or len(dims) != 4 or joined is None:
            return self._split_heads(node, value, size)
        return before if dims[1] == heads and joined[:2] == (dims[0], dims[2]) else self._split_heads(node, value, size)

    def _head_size(self, node: ir.Node, query: ir.Value, cos: ir.Value | None, heads: int, groups: int, *, packed: bool) -> int:
        if cos is not None:
            return self._head_size_from_cos(node, cos)
        width = query.shape[2] if query.shape is not None and len(query.shape) == 3 else None
        if not isinstance(width, int):
            width = self._trace_last_dim(query)
        if width is None:
            raise UnsupportedContribOp(node, "has heads of a size that is not known")
        return width // (heads + 2 * groups if packed else heads)

    def _trace_last_dim(self, value: ir.Value | None) -> int | None:
        """Return the last size of `value`, followed back to the weights that it is a product with."""
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
        whole = self.op(node, "Concat", [past, update], axis=_SEQ_AXIS)
        replace_value(node.outputs[output_index], whole)
        return whole

    def _seq_length(self, node: ir.Node, value: ir.Value) -> ir.Value:
        size = self.op(node, "Shape", [value], _INT64, start=_SEQ_AXIS, end=_SEQ_AXIS + 1)
        return self.op(node, "Squeeze", [size])

    def _arange(self, node: ir.Node, stop: ir.Value) -> ir.Value:
        zero, one = self.writer.scalar(0, _INT64), self.writer.scalar(1, _INT64)
        return self.op(node, "Range", [zero, stop, one])

    def _position_ids(self, node: ir.Node, past: ir.Value, query: ir.Value) -> ir.Value:
        """Return (batch, seq): where the tokens of the step stand."""
        tokens = self._arange(node, self._seq_length(node, query))
        at = self.op(node, "Add", [tokens, self._seq_length(node, past)])
        batch = self.op(node, "Shape", [query], _INT64, start=0, end=1)
        rows = self.op(node, "Shape", [query], _INT64, start=_SEQ_AXIS, end=_SEQ_AXIS + 1)
        return self.op(node, "Expand", [at, self.op(node, "Concat", [batch, rows], axis=0)])

    def _causal_mask(self, node: ir.Node, past: ir.Value, query: ir.Value, window: int) -> ir.Value:
        """Return (1, 1, seq, past+seq) bool: which keys a query sees."""
        before, new = self._seq_length(node, past), self._seq_length(node, query)
        key = self._arange(node, self.op(node, "Add", [before, new]))
        at = self.op(node, "Unsqueeze", [self.op(node, "Add", [self._arange(node, new), before]), self.writer.int64_vector(-1)])
        seen = self.op(node, "LessOrEqual", [key, at], _BOOL)
        if window > 0:
            since = self.op(node, "Sub", [at, self.writer.scalar(window, _INT64)])
            seen = self.op(node, "And", [seen, self.op(node, "Greater", [key, since], _BOOL)])
        return self.op(node, "Unsqueeze", [seen, self.writer.int64_vector(0, 1)])


_RULES: dict[str, Callable[[_ContribOpLegalizer, ir.Node], None]] = {
    "GroupQueryAttention": _ContribOpLegalizer.group_query_attention,
    "MultiHeadAttention": _ContribOpLegalizer.multi_head_attention,
    "RotaryEmbedding": _ContribOpLegalizer.rotary_embedding,
    "SkipSimplifiedLayerNormalization": _ContribOpLegalizer.skip_simplified_layer_norm,
}


def _required_input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise UnsupportedContribOp(node, f"lacks its input {index}")
    return value
