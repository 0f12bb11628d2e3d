"""Rules for GroupQueryAttention and MultiHeadAttention of `com.microsoft`, which become the standard Attention."""

from __future__ import annotations

import itertools
from typing import Any

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import float_attribute, int_attribute, ints_attribute
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.edit.builder import replace_value
from ryzen_compile.ir.patterns import Match, MatchFailure, NodePattern, RewriteRule
from ryzen_passes.attention_fusion import Mask
from ryzen_passes.legalize_msft.contrib_writer import BOOL, INT64, MSFT_DOMAIN, SEQ_AXIS, ContribWriter

_GROUP_QUERY_ATTRIBUTES = frozenset(
    """causal do_rotary k_quant_type kv_cache_bit_width kv_num_heads local_window_size num_heads qk_norm_epsilon qk_output
    rotary_interleaved scale sliding_window_cache smooth_softmax softcap v_quant_type""".split()
)
"""The attributes of GroupQueryAttention whose meaning is known."""
_UNSUPPORTED_GROUP_QUERY_INPUTS = {
    10: "an attention bias",
    11: "an attention sink",
    12: "quantized caches",
    13: "quantized caches",
    14: "norms of its queries and keys",
    15: "norms of its queries and keys",
}
"""Input of GroupQueryAttention -> what it adds to the attention."""


class LegalizeGroupQueryAttention(RewriteRule[ContribWriter, None]):
    """GroupQueryAttention, which appends to its KV caches and may apply RoPE; the query may hold query, key and value.

    With `sliding_window_cache`, the caches of the op hold the last tokens only. The rule writes caches of all tokens, see
    `declare_full_caches`, and the mask hides what is outside of the window: the output is the same.
    """

    pattern = NodePattern(
        "GroupQueryAttention",
        (
            *("query", "key?", "value?", "past_key", "past_value"),
            *("seqlens_k?", "total_sequence_length?", "cos?", "sin?", "positions?", "*"),
        ),
        domain=MSFT_DOMAIN,
    )

    def check(self, match: Match, context: ContribWriter) -> MatchFailure | None:
        """The scores must be plain and causal, and the head size known."""
        node = match.node
        if (reason := _unsupported_group_query_options(node)) is not None:
            return MatchFailure.at(reason, node)
        head_size = self._head_size(match, context)
        if head_size is None:
            return MatchFailure.at("has an unknown head size", node)
        if not int_attribute(node, "do_rotary", 0):
            return None
        cos = match.get("cos")
        if cos is None or match.get("sin") is None:
            return MatchFailure.at("applies RoPE (`do_rotary`) without cosine and sine tables", node)
        if (choice := cos.producer()) is not None and choice.op_type == "If":
            reason = f"applies RoPE (`do_rotary`) with tables that `{choice.name}` [If] chooses by the length (longrope), so"
            return MatchFailure.at(f"{reason} a key depends on the length at the step that added it", node)
        half = context.last_dim(cos)
        if half is None or 2 * half > head_size:
            return MatchFailure.at(f"has a cosine table of width {half or 'unknown'}, the head size is {head_size}", node)
        return None

    def rewrite(self, match: Match, context: ContribWriter) -> None:
        """Write the rotation, the caches, the causal mask and the attention."""
        node, past_key, past_value = match.node, match["past_key"], match["past_value"]
        heads, kv_heads = _head_counts(node)
        head_size = self._head_size(match, context) or 0
        query, key, value = match["query"], match.get("key"), match.get("value")
        if key is None or value is None:
            widths = [heads * head_size, kv_heads * head_size, kv_heads * head_size]
            query, key, value = _unpack_qkv(context, node, query, widths)
        query, key, value = (context.split_heads(node, tensor, head_size) for tensor in (query, key, value))
        if int_attribute(node, "do_rotary", 0):
            positions = match.get("positions")
            if positions is None:
                positions = _position_ids(context, node, past_key, query)
            tables, interleaved = (match["cos"], match["sin"]), int_attribute(node, "rotary_interleaved", 0)
            query, key = (
                context.rotate(node, tensor, tables, positions, interleaved=interleaved, head_size=head_size)
                for tensor in (query, key)
            )
        present = []
        for index, (past, update) in enumerate(((past_key, key), (past_value, value))):
            present.append(context.op(node, "Concat", [past, update], axis=SEQ_AXIS))
            replace_value(node.outputs[index + 1], present[index])
        mask = _causal_mask(context, node, past_key, query, int_attribute(node, "local_window_size", -1))
        attributes: dict[str, Any] = {"scale": float_attribute(node, "scale", 0.0) or float(head_size) ** -0.5}
        if softcap := float_attribute(node, "softcap", 0.0):
            attributes["softcap"] = softcap
        output = context.op(node, "Attention", [query, *present, mask], **attributes)
        replace_value(node.outputs[0], context.merge_heads(node, output))

    def _head_size(self, match: Match, context: ContribWriter) -> int | None:
        """Return the head size, from the width of the query or else from the caches; None if both are unknown."""
        heads, kv_heads = _head_counts(match.node)
        width = context.last_dim(match["query"])
        if width is None:
            return context.last_dim(match["past_key"])
        return width // (heads + 2 * kv_heads if match.get("key") is None else heads)


def _unsupported_group_query_options(node: ir.Node) -> str | None:
    """Return what a GroupQueryAttention does that causal attention with a softmax over the keys does not, or None."""
    for index, value in enumerate(node.inputs[10:], start=10):
        if value is not None:
            return f"has {_UNSUPPORTED_GROUP_QUERY_INPUTS.get(index, f'an unknown input {index}')}"
    if unknown := sorted(set(node.attributes) - _GROUP_QUERY_ATTRIBUTES):
        return f"has the unknown attribute `{unknown[0]}`"
    if int_attribute(node, "smooth_softmax", 0):
        return "has an attention sink (`smooth_softmax`)"
    if not int_attribute(node, "causal", 1):
        return "attends to later tokens (`causal` is 0)"
    if any(output.uses() or output.is_graph_output() for output in node.outputs[3:]):
        return "has scores as an output"
    if int_attribute(node, "sliding_window_cache", 0) and int_attribute(node, "local_window_size", -1) < 1:
        return "has a `sliding_window_cache` without a `local_window_size`"
    return None


def declare_full_caches(graph: ir.Graph, shapes: ShapeInference) -> None:
    """Give the caches of GroupQueryAttention nodes with `sliding_window_cache` the dims of caches that hold all tokens.

    These are the lengths that the caches of the other layers, and the mask, have.
    """
    past_dim: int | ir.SymbolicDim | None = None
    sliding: list[ir.Node] = []
    for node in graph:
        if node.op_type != "GroupQueryAttention" or node.domain != MSFT_DOMAIN or len(node.inputs) < 5:
            continue
        if int_attribute(node, "sliding_window_cache", 0):
            sliding.append(node)
        elif (past := node.inputs[3]) is not None and past.shape is not None and len(past.shape) == 4:
            past_dim = past.shape[SEQ_AXIS]
    for node in sliding:
        total = node.inputs[6] if len(node.inputs) > 6 else None
        lengths = shapes.int_values(total) if total is not None else None
        total_shape = shapes.shape_of(lengths) if lengths is not None else None
        total_dim = total_shape[0] if total_shape else None
        for value, dim in [
            *((value, past_dim) for value in node.inputs[3:5]),
            *((value, total_dim) for value in node.outputs[1:3]),
        ]:
            if dim is not None and value is not None and value.shape is not None and len(value.shape) == 4:
                value.shape = ir.Shape([*value.shape.dims[:SEQ_AXIS], dim, value.shape[3]])


class LegalizeMultiHeadAttention(RewriteRule[ContribWriter, None]):
    """MultiHeadAttention over (batch, seq, heads * size), with or without an attention bias and KV caches."""

    pattern = NodePattern(
        "MultiHeadAttention",
        (
            *("query?", "key?", "value?", "bias?", "key_padding_mask?", "attention_bias?", "past_key?", "past_value?"),
            *("past_sequence_length?", "*"),
        ),
        domain=MSFT_DOMAIN,
    )

    def check(self, match: Match, context: ContribWriter) -> MatchFailure | None:
        """The inputs must be separate and of static width, and the outputs those of the standard op."""
        node = match.node
        reason = self._unsupported_inputs(match) or self._unsupported_sizes(match, context) or self._unsupported_options(match)
        return MatchFailure.at(reason, node) if reason else None

    def _unsupported_inputs(self, match: Match) -> str | None:
        node = match.node
        if any(match.get(name) is None for name in ("query", "key", "value")) or match.get("bias") is not None:
            return "has packed QKV, or a bias of its query, key and value projections"
        extra_outputs = [output for output in node.outputs[3:] if output.uses() or output.is_graph_output()]
        if match.get("key_padding_mask") is not None or extra_outputs or any(tensor is not None for tensor in node.inputs[8:]):
            return "has a key padding mask, past and present caches that share memory, or scores as an output"
        return None

    def _unsupported_sizes(self, match: Match, context: ContribWriter) -> str | None:
        node, tensors = match.node, [match[name] for name in ("query", "key", "value")]
        if int_attribute(node, "num_heads", 0) < 1 or any(context.shapes.rank(tensor) != 3 for tensor in tensors):
            return "has no `num_heads`, or a query, key or value that is not (batch, seq, heads * size)"
        pasts = [match.get("past_key"), match.get("past_value")]
        if any(past is not None for past in pasts) and (None in pasts or len(node.outputs) < 3):
            return "has only one of its two past caches, or past caches without present outputs"
        widths, heads = (
            (context.last_dim(match["query"]), context.last_dim(match["value"])),
            int_attribute(node, "num_heads", 0),
        )
        if None in widths or any(width % heads or width < heads for width in widths if width is not None):
            return "has an unknown head size, or a width that is not a multiple of `num_heads`"
        return None

    def _unsupported_options(self, match: Match) -> str | None:
        has_mask = match.get("past_key") is not None or match.get("attention_bias") is not None
        if int_attribute(match.node, "unidirectional", 0) and has_mask:
            return "is causal and has a cache or an attention bias"
        return None

    def rewrite(self, match: Match, context: ContribWriter) -> None:
        """Write the caches and the attention over separate heads."""
        node = match.node
        heads = int_attribute(node, "num_heads", 0)
        head_size, value_head_size = ((context.last_dim(match[name]) or 0) // heads for name in ("query", "value"))
        query, key, value = (
            _split_heads_or_reuse(context, node, match[name], heads, size)
            for name, size in (("query", head_size), ("key", head_size), ("value", value_head_size))
        )
        present = [key, value]
        for index, past in enumerate((match.get("past_key"), match.get("past_value"))):
            if past is not None:
                present[index] = context.op(node, "Concat", [past, present[index]], axis=SEQ_AXIS)
            if len(node.outputs) > index + 1:
                replace_value(node.outputs[index + 1], present[index])
        bias = match.get("attention_bias")
        if bias is not None:
            dtype = context.nodes.types.get(match["query"], ir.DataType.FLOAT)
            bias = context.masks.attention_mask((Mask(bias),), dtype, node)
        attributes: dict[str, Any] = {"is_causal": 1} if int_attribute(node, "unidirectional", 0) else {}
        attributes["scale"] = float_attribute(node, "scale", 0.0) or float(head_size) ** -0.5
        output = context.op(node, "Attention", [query, *present, *([bias] if bias is not None else [])], **attributes)
        replace_value(node.outputs[0], context.merge_heads(node, output))


def _head_counts(node: ir.Node) -> tuple[int, int]:
    """Return the number of query heads and of KV heads."""
    return int_attribute(node, "num_heads", 0), int_attribute(node, "kv_num_heads", 0)


def _split_heads_or_reuse(context: ContribWriter, node: ir.Node, value: ir.Value, heads: int, size: int) -> ir.Value:
    """Return `value` as (batch, heads, seq, size): the tensor before its heads were merged if it exists, else a reshape."""
    merge = _MERGED_HEADS.match(reshape) if (reshape := value.producer()) is not None and reshape.op_type == "Reshape" else None
    if isinstance(merge, Match) and ints_attribute(merge.nodes["transpose"], "perm") == (0, 2, 1, 3):
        dims, merged_dims = context.shapes.dims(merge["unmerged"]), context.shapes.dims(value)
        is_split = dims is not None and len(dims) == 4 and dims[1] == heads
        if dims is not None and merged_dims is not None and is_split and merged_dims[:2] == (dims[0], dims[2]):
            return merge["unmerged"]
    return context.split_heads(node, value, size)


_MERGED_HEADS = NodePattern("Reshape", (NodePattern("Transpose", ("unmerged",), name="transpose"), "shape"))


def _unpack_qkv(context: ContribWriter, node: ir.Node, packed: ir.Value, widths: list[int]) -> list[ir.Value]:
    ends, integers = [0, *itertools.accumulate(widths)], context.nodes.int64_vector
    return [
        context.op(node, "Slice", [packed, integers(start), integers(end), integers(2)])
        for start, end in itertools.pairwise(ends)
    ]


def _position_ids(context: ContribWriter, node: ir.Node, past: ir.Value, query: ir.Value) -> ir.Value:
    """Return the position ids of the new tokens, (batch, seq): they continue after the past."""
    tokens = context.arange(node, context.seq_length(node, query))
    positions = context.op(node, "Add", [tokens, context.seq_length(node, past)])
    batch = context.op(node, "Shape", [query], INT64, start=0, end=1)
    seq = context.op(node, "Shape", [query], INT64, start=SEQ_AXIS, end=SEQ_AXIS + 1)
    return context.op(node, "Expand", [positions, context.op(node, "Concat", [batch, seq], axis=0)])


def _causal_mask(context: ContribWriter, node: ir.Node, past: ir.Value, query: ir.Value, window: int) -> ir.Value:
    """Return the causal mask, (1, 1, seq, past + seq) bool, True where a query attends to a key.

    With `window` above 0, a query attends to the last `window` keys only.
    """
    integers = context.nodes.int64_vector
    past_length, new_length = context.seq_length(node, past), context.seq_length(node, query)
    key_positions = context.arange(node, context.op(node, "Add", [past_length, new_length]))
    new_positions = context.op(node, "Add", [context.arange(node, new_length), past_length])
    query_positions = context.op(node, "Unsqueeze", [new_positions, integers(-1)])
    visible = context.op(node, "LessOrEqual", [key_positions, query_positions], BOOL)
    if window > 0:
        window_start = context.op(node, "Sub", [query_positions, context.nodes.scalar(window, INT64)])
        visible = context.op(node, "And", [visible, context.op(node, "Greater", [key_positions, window_start], BOOL)])
    return context.op(node, "Unsqueeze", [visible, integers(0, 1)])
