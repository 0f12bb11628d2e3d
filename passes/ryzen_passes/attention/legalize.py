"""Legalize ONNX Attention for TensorRT: convert it to TRT_Attention if that is equivalent, else decompose it.

Features that the TensorRT parser rejects are rewritten: past and present, 3-D inputs, a mask together with is_causal, a softmax
in another precision. `nonpad_kv_seqlen`, which the parser ignores without a message, becomes the lengths input of TRT_Attention
or a mask. Attention with features that TensorRT does not compute (soft-capping, windows, the scores as an output, values of
another head size than the keys) is decomposed into MatMul and Softmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import float_attribute, int_attribute
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.ir.patterns import Match, MatchFailure, NodePattern, RewriteRule, RuleSet
from ryzen_compile.ir.traversal import nested_graphs
from ryzen_compile.spec.passes import Change, Refusal
from ryzen_passes.attention.decompose import AttentionDecomposer
from ryzen_passes.attention_fusion import AttentionMatcher, Mask, MaskBuilder
from ryzen_passes.opset import raise_opset, standard_opset
from ryzen_plugins.trt_attention import TRT_ATTENTION
from ryzen_plugins.trt_attention.reference import OPSET

_LENGTHS_HEAD_SIZE_MULTIPLE = 8
"""Kernels with a lengths input need a head size that is a multiple of this (a head size of 36 failed to build)."""


def legalize_attention(model_info: ModelInfo, change: Change, *, strict: bool = False) -> Change | Refusal:
    """Legalize every Attention of the model for TensorRT; return `change` extended by these edits.

    With `strict`, the build fails if there is no fused kernel for an attention, and the pass is refused if TRT_Attention cannot
    express one.
    """
    model = model_info.model
    graphs = tuple(nested_graphs(model.graph))
    candidates = [(graph, [node for node in graph if node.op_type == "Attention" and node.domain == ""]) for graph in graphs]
    graphs_to_legalize = [(graph, nodes) for graph, nodes in candidates if nodes]
    if not graphs_to_legalize:
        return change
    if (opset_reason := raise_opset(model, OPSET)) is not None:
        return Refusal(
            reason=f"TRT_Attention needs opset {OPSET}: {opset_reason}",
            location=graphs_to_legalize[0][1][0].name or "Attention",
        )
    inserted, removed, notes = [*change.inserted], [*change.removed], [*change.notes]
    changed: list[str] = []
    decomposed: list[str] = []
    for graph, nodes in graphs_to_legalize:
        legalizer = AttentionLegalizer(graph, model_info, strict=strict)
        for node in nodes:
            node.name = node.name or model_info.names.allocate("attention")
            outcome = ATTENTION_RULES.apply(node, legalizer)
            if outcome.applied is None:
                raise ValueError(f"`{node.name}`: {outcome.failures[-1].reason}")
            reason = outcome.failures[0].reason if outcome.failures else None
            if strict and reason is not None:
                hint = "omit `strict` to decompose it into other ops"
                return Refusal(reason=f"TensorRT has no fused attention for this node: {reason}", location=node.name, hint=hint)
            (changed if reason is None else decomposed).append(node.name)
            if reason is not None:
                notes.append(f"{node.name}: decomposed into other ops: {reason}")
            removed += remove_dead_nodes([node])[1:]
        inserted += legalizer.writer.inserted
    if changed:
        TRT_ATTENTION.add_to(model)
        # The function must import the opset of the model; newer opsets extend Attention and do not change it.
        model.functions[TRT_ATTENTION.ir_function().identifier()].opset_imports[""] = standard_opset(model)
    counts = ((len(changed), "converted to TRT_Attention"), (len(decomposed), "decomposed"))
    parts = [f"{count} {outcome}" for count, outcome in counts if count]
    transient = {*inserted} & {*removed}
    return dataclasses.replace(
        change,
        inserted=tuple(name for name in inserted if name not in transient),
        removed=tuple(name for name in (*removed, *decomposed) if name not in transient),
        changed=tuple(changed),
        summary=", ".join([*([change.summary] if change else []), *parts]),
        notes=tuple(notes),
    )


@dataclass
class AttentionNode:
    """The inputs of one Attention as 4-D tensors.

    Dims: B batch, H query heads, G KV heads, S queries, N keys, D head size.
    """

    node: ir.Node
    dtype: ir.DataType
    query: ir.Value
    """(B, H, S, D)"""
    key: ir.Value
    """(B, G, N, D): past keys, then new keys."""
    value: ir.Value
    new_key: ir.Value
    """(B, G, new, D): the new keys only."""
    past_key: ir.Value | None
    masks: tuple[Mask, ...] = ()
    kv_lengths: ir.Value | None = None
    """(B,) int64: the number of valid keys."""
    is_causal: bool = False
    is_3d: bool = False
    """Whether the inputs and the output of the node are (B, S, H*D)."""

    def output(self, index: int) -> ir.Value | None:
        """Return output `index` if it is used, else None."""
        return _used_output(self.node, index)


class AttentionLegalizer:
    """Legalizes the Attention nodes of one graph."""

    def __init__(self, graph: ir.Graph, model_info: ModelInfo, *, strict: bool = False) -> None:
        self.strict = strict
        self.matcher = AttentionMatcher(model_info.shapes)
        self.shapes, self.types = model_info.shapes, model_info.types
        self.writer = NodeBuilder(graph, model_info)
        self.masks = MaskBuilder(self.writer, self.shapes)
        self._position_masks: dict[tuple[object, ...], Mask] = {}

    def replace(self, node: ir.Node, write: Callable[[AttentionNode], ir.Value]) -> None:
        """Replace `node` by the ops that `write` inserts for it; `write` returns the output (B, H, S, D)."""
        attention = self._read_attention(node)
        for index, concatenated in ((1, attention.key), (2, attention.value)):
            present = attention.output(index)
            if present is not None:
                replace_value(present, self.writer.op(node, "Identity", [concatenated]))
        output = write(attention)
        if attention.is_3d:
            transposed = self.writer.op(node, "Transpose", [output], {"perm": (0, 2, 1, 3)})
            output = self.writer.op(node, "Reshape", [transposed, self.writer.int64_vector(0, 0, -1)])
        replace_value(node.outputs[0], output)

    def write_decomposed(self, attention: AttentionNode) -> ir.Value:
        """Insert MatMul and Softmax, with all masks and the scores as an output."""
        self._convert_to_masks(attention)
        decomposer = AttentionDecomposer(self.writer, self.masks, self.shapes)
        output, weights = decomposer.decompose(
            attention.node, self._scaled_query(attention), attention.key, attention.value, attention.masks, attention.dtype
        )
        scores = attention.output(3)
        if scores is not None:
            replace_value(scores, weights)
        return output

    def _read_attention(self, node: ir.Node) -> AttentionNode:
        inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
        query, key, value, mask, past_key, past_value, lengths = inputs[:7]
        if query is None or key is None or value is None:
            raise ValueError(f"`{node.name}` has no query, key or value")
        dtype = self.types.get(query, ir.DataType.FLOAT)
        is_3d = self.shapes.rank(query) == 3 or (self.shapes.rank(query) is None and "q_num_heads" in node.attributes)
        if is_3d:
            heads, kv_heads = int_attribute(node, "q_num_heads", 1), int_attribute(node, "kv_num_heads", 1)
            query, key, value = (
                self._split_heads(node, query, heads),
                self._split_heads(node, key, kv_heads),
                self._split_heads(node, value, kv_heads),
            )
        else:
            unrepeated_key, unrepeated_value = self.matcher.before_repeat_kv(key), self.matcher.before_repeat_kv(value)
            if unrepeated_key is not None and unrepeated_value is not None and past_key is None:
                key, value = unrepeated_key, unrepeated_value
        new_key = key
        if past_key is not None and past_value is not None:
            key = self.writer.op(node, "Concat", [past_key, key], {"axis": 2})
            value = self.writer.op(node, "Concat", [past_value, value], {"axis": 2})
        masks: tuple[Mask, ...] = ()
        if mask is not None:
            mask_term = Mask(mask, float("-inf")) if self.types.get(mask) == ir.DataType.BOOL else Mask(mask)
            masks = () if self.masks.is_noop(mask_term) else (self._pad_mask(mask_term, key, node),)
        is_causal = bool(int_attribute(node, "is_causal", 0))
        return AttentionNode(node, dtype, query, key, value, new_key, past_key, masks, lengths, is_causal, is_3d)

    def _split_heads(self, node: ir.Node, value: ir.Value, heads: int) -> ir.Value:
        """Reshape `value` (B, S, H*D) to (B, H, S, D)."""
        unmerged = self.writer.op(node, "Reshape", [value, self.writer.int64_vector(0, 0, heads, -1)])
        return self.writer.op(node, "Transpose", [unmerged], {"perm": (0, 2, 1, 3)})

    def _pad_mask(self, mask: Mask, key: ir.Value, node: ir.Node) -> Mask:
        """Return `mask` padded to one column per key; ONNX treats keys without a column as masked."""
        mask_dims, key_dims = self.shapes.dims(mask.value), self.shapes.dims(key)
        if (
            mask_dims is None
            or key_dims is None
            or mask_dims[-1] == key_dims[2]
            or not isinstance(mask_dims[-1], int)
            or not isinstance(key_dims[2], int)
        ):
            return mask
        pads = self.writer.int64_vector(*[0] * (2 * len(mask_dims) - 1), key_dims[2] - mask_dims[-1])
        fill = -np.inf if mask.fill is None else 0.0
        dtype = self.types.get(mask.value, ir.DataType.FLOAT)
        return dataclasses.replace(mask, value=self.writer.op(node, "Pad", [mask.value, pads, self.writer.scalar(fill, dtype)]))

    def _scaled_query(self, attention: AttentionNode) -> ir.Value:
        """Return the query multiplied by the scale of the scores."""
        scale = float_attribute(attention.node, "scale", None)
        dims = self.shapes.dims(attention.query)
        head_size = dims[3] if dims is not None else None
        if scale is not None or isinstance(head_size, int):
            factor = scale if scale is not None else 1 / float(head_size) ** 0.5  # type: ignore[arg-type]
            if factor == 1.0:
                return attention.query
            number = self.writer.scalar(factor, attention.dtype)
            return self.writer.op(attention.node, "Mul", [attention.query, number], shape=attention.query.shape)
        size = self.writer.op(attention.node, "Shape", [attention.query], {"start": 3, "end": 4}, dtype=ir.DataType.INT64)
        number = self.writer.op(attention.node, "Cast", [size], {"to": int(attention.dtype)}, dtype=attention.dtype)
        return self.writer.op(attention.node, "Div", [attention.query, self.writer.op(attention.node, "Sqrt", [number])])

    def write_trt_attention(self, attention: AttentionNode) -> ir.Value:
        """Insert a TRT_Attention, and zero the output rows that have no visible key."""
        kind = self._causal_kind(attention)
        attention.is_causal = attention.is_causal and kind == "none"
        if not self._can_use_lengths(attention):
            self._convert_to_masks(attention)
        node = attention.node
        nonempty = self.masks.nonempty_rows(attention.masks, node)
        mask = None
        if attention.masks:
            mask = self.masks.expand_rows(
                attention.query, self.masks.finite_additive_mask(attention.masks, attention.dtype, node), node
            )
            mask = self._unsqueeze_to_4d(mask, node)
        output = self.writer.op(
            node,
            TRT_ATTENTION.name,
            [self._scaled_query(attention), attention.key, attention.value, mask, None, attention.kv_lengths],
            {"causal_kind": kind, "TRT_decomposable": int(not self.strict)},
            domain=TRT_ATTENTION.domain,
            name=node.name,
            shape=None if attention.is_3d else node.outputs[0].shape,
        )
        if nonempty is None:
            return output
        zero = self.writer.scalar(0.0, attention.dtype)
        return self.writer.op(node, "Where", [nonempty, output, zero], dtype=attention.dtype, shape=output.shape)

    def _causal_kind(self, attention: AttentionNode) -> str:
        """Return the `causal_kind` of TRT_Attention that expresses `is_causal`, or "none" if there is none."""
        if not attention.is_causal or attention.masks or attention.kv_lengths is not None:
            return "none"
        if attention.past_key is None:
            return "upper_left"
        # ONNX aligns the first query after the past, TensorRT aligns the last query with the last key.
        query_dims, new_dims = self.shapes.dims(attention.query), self.shapes.dims(attention.new_key)
        return "lower_right" if query_dims is not None and new_dims is not None and query_dims[2] == new_dims[2] else "none"

    def _can_use_lengths(self, attention: AttentionNode) -> bool:
        """Return whether no mask is needed: no causality, and lengths only without a mask and for a supported head size.

        Causality over a single query is dropped, since lengths imply it.
        """
        if attention.kv_lengths is None or attention.masks:
            return attention.kv_lengths is None and not attention.is_causal
        dims = self.shapes.dims(attention.query)
        if dims is None or not isinstance(dims[3], int) or dims[3] % _LENGTHS_HEAD_SIZE_MULTIPLE:
            return False
        attention.is_causal = attention.is_causal and dims[2] != 1
        return not attention.is_causal

    def _convert_to_masks(self, attention: AttentionNode) -> None:
        """Convert lengths, causality and window into boolean masks."""
        if attention.kv_lengths is not None or attention.is_causal or self._window(attention) != (-1, -1):
            attention.masks = (*attention.masks, self._position_mask(attention))
        attention.kv_lengths, attention.is_causal = None, False

    def _window(self, attention: AttentionNode) -> tuple[int, int]:
        return int_attribute(attention.node, "left_window_size", -1), int_attribute(attention.node, "right_window_size", -1)

    def _position_mask(self, attention: AttentionNode) -> Mask:
        """Return the mask of lengths, causality and window; equal masks are built once."""
        query_dims, key_dims = self.shapes.dims(attention.query), self.shapes.dims(attention.key)
        sequence_lengths = (query_dims[2] if query_dims else attention.query, key_dims[2] if key_dims else attention.key)
        options = (attention.is_causal, self._window(attention), attention.kv_lengths, attention.past_key is None)
        if (sequence_lengths, options) not in self._position_masks:
            self._position_masks[sequence_lengths, options] = Mask(self._write_position_mask(attention), float("-inf"))
        return self._position_masks[sequence_lengths, options]

    def _write_position_mask(self, attention: AttentionNode) -> ir.Value:
        node, key_positions = attention.node, self._arange(attention.node, attention.key)
        lengths = attention.kv_lengths
        terms: list[ir.Value] = []
        if lengths is not None:
            lengths = self.writer.op(node, "Unsqueeze", [lengths, self.writer.int64_vector(1, 2, 3)])
            terms.append(self.writer.op(node, "Less", [key_positions, lengths], dtype=ir.DataType.BOOL))
        left, right = self._window(attention)
        if attention.is_causal:
            right = 0
        query_positions = self._query_positions(attention, lengths) if left >= 0 or right >= 0 else None
        for distance, direction, op in ((right, 1, "LessOrEqual"), (left, -1, "GreaterOrEqual")):
            if query_positions is not None and distance >= 0:
                bound = self.writer.op(
                    node, "Add", [query_positions, self.writer.constant(np.array(direction * distance), ir.DataType.INT64)]
                )
                terms.append(self.writer.op(node, op, [key_positions, bound], dtype=ir.DataType.BOOL))
        visible = terms[0]
        for term in terms[1:]:
            visible = self.writer.op(node, "And", [visible, term])
        return visible

    def _query_positions(self, attention: AttentionNode, kv_lengths: ir.Value | None) -> ir.Value:
        """Return the key position of each query, (S, 1) or (B, 1, S, 1): after the past, or at the end of the valid keys."""
        indices = self.writer.op(
            attention.node, "Unsqueeze", [self._arange(attention.node, attention.query), self.writer.int64_vector(-1)]
        )
        if attention.past_key is not None:
            return self.writer.op(attention.node, "Add", [indices, self._seq_length(attention.node, attention.past_key)])
        if kv_lengths is None:
            return indices
        offset = self.writer.op(attention.node, "Sub", [kv_lengths, self._seq_length(attention.node, attention.query)])
        return self.writer.op(attention.node, "Add", [indices, offset])

    def _seq_length(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return the sequence length of `value` (B, H, S, D), as a tensor of shape (1,)."""
        return self.writer.op(node, "Shape", [value], {"start": 2, "end": 3}, dtype=ir.DataType.INT64)

    def _arange(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return 0, 1, ..., S - 1 for `value` (B, H, S, D)."""
        size = self.writer.op(node, "Squeeze", [self._seq_length(node, value)])
        ends = [self.writer.constant(np.array(number), ir.DataType.INT64) for number in (0, 1)]
        return self.writer.op(node, "Range", [ends[0], size, ends[1]], shape=ir.Shape([None]))

    def _unsqueeze_to_4d(self, mask: ir.Value, node: ir.Node) -> ir.Value:
        rank = self.shapes.rank(mask)
        if rank is None or rank >= 4:
            return mask
        return self.writer.op(node, "Unsqueeze", [mask, self.writer.int64_vector(*range(4 - rank))])


def _used_output(node: ir.Node, index: int) -> ir.Value | None:
    value = node.outputs[index] if index < len(node.outputs) else None
    return value if value is not None and value.name and (value.uses() or value.is_graph_output()) else None


_PATTERN = NodePattern("Attention", ("query", "key", "value", "mask?", "past_key?", "past_value?", "kv_lengths?"))


class ConvertToTrtAttention(RewriteRule[AttentionLegalizer, None]):
    """Convert Attention to TRT_Attention, if TensorRT computes all of its options."""

    pattern = _PATTERN

    def check(self, match: Match, context: AttentionLegalizer) -> MatchFailure | None:
        """Find an option that TensorRT does not compute."""
        node = match.node
        if _used_output(node, 3) is not None:
            return MatchFailure.at("its scores are an output", node)
        if float_attribute(node, "softcap", 0.0):
            return MatchFailure.at("its scores are soft-capped", node)
        if any(int_attribute(node, side, -1) >= 0 for side in ("left_window_size", "right_window_size")):
            return MatchFailure.at("it has an attention window", node)
        key_size = _head_size(node, match["query"], "q_num_heads", context.shapes)
        value_size = _head_size(node, match["value"], "kv_num_heads", context.shapes)
        if key_size != value_size and key_size is not None and value_size is not None:
            return MatchFailure.at(f"its values have head size {value_size} and its keys {key_size}", node)
        return None

    def rewrite(self, match: Match, context: AttentionLegalizer) -> None:
        """Insert the TRT_Attention."""
        context.replace(match.node, context.write_trt_attention)


class DecomposeAttention(RewriteRule[AttentionLegalizer, None]):
    """Decompose any Attention into MatMul and Softmax."""

    pattern = _PATTERN

    def rewrite(self, match: Match, context: AttentionLegalizer) -> None:
        """Insert the decomposition."""
        context.replace(match.node, context.write_decomposed)


def _head_size(node: ir.Node, value: ir.Value, heads_attribute: str, shapes: ShapeInference) -> int | None:
    """Return the head size of `value`, (B, H, S, D) or (B, S, H*D), or None if it is unknown."""
    dims = shapes.dims(value)
    if dims is None or not isinstance(dims[-1], int):
        return None
    return dims[-1] // int_attribute(node, heads_attribute, 1) if len(dims) == 3 else dims[-1]


ATTENTION_RULES: RuleSet[AttentionLegalizer, None] = RuleSet(ConvertToTrtAttention(), DecomposeAttention())
"""The rules in order: a node that TRT_Attention cannot express is decomposed."""
