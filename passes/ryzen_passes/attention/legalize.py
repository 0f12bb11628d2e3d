"""Legalising ONNX Attention for TensorRT: as TRT_Attention where that says the same, else in other ops.

What TensorRT's parser refuses is rewritten: past and present, 3-D inputs, a mask beside is_causal, a softmax in another
precision. What it ignores in silence becomes what it reads: nonpad_kv_seqlen. What no attention of TensorRT computes
(soft-capping, windows, the scores as an output, values of another width than the keys) is written out in MatMul and Softmax.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.spec.passes import Change, Refusal
from ryzen_passes.attention.decompose import AttentionDecomposer
from ryzen_passes.attention.masks import Mask, MaskBuilder
from ryzen_passes.attention.match import AttentionMatcher
from ryzen_passes.opset import raise_opset, standard_opset
from ryzen_plugins.trt_attention import TRT_ATTENTION
from ryzen_plugins.trt_attention.reference import OPSET

_LENGTHS_HEAD_SIZE_MULTIPLE = 8
"""Kernels that read lengths take head sizes that are a multiple of this (36 was seen to fail)."""


def legalize_attention(model_info: ModelInfo, change: Change, *, strict: bool = False) -> Change | Refusal:
    """Let every Attention of the model build on TensorRT, and add to `change` what that took.

    With `strict` those for which there is no fused kernel do not build.
    """
    model = model_info.model
    graphs = (model.graph, *model.graph.subgraphs())
    listed = [(graph, [node for node in graph if node.op_type == "Attention" and node.domain == ""]) for graph in graphs]
    found = [(graph, nodes) for graph, nodes in listed if nodes]
    if not found:
        return change
    if (reason := raise_opset(model, OPSET)) is not None:
        return Refusal(reason=f"TRT_Attention needs opset {OPSET}: {reason}", location=found[0][1][0].name or "Attention")
    inserted, removed, notes = [*change.inserted], [*change.removed], [*change.notes]
    changed: list[str] = []
    written_out: list[str] = []
    for graph, nodes in found:
        legaliser = AttentionLegalizer(graph, model_info, strict=strict)
        for node in nodes:
            node.name = node.name or model_info.names.allocate("attention")
            why = legaliser.legalize(node)
            if strict and why is not None:
                hint = "leave `strict` out to have it written in other ops"
                return Refusal(reason=f"TensorRT has no fused attention for it: {why}", location=node.name, hint=hint)
            (changed if why is None else written_out).append(node.name)
            if why is not None:
                notes.append(f"{node.name}: written out in other ops: {why}")
            removed += remove_dead_nodes([node])[1:]
        inserted += legaliser.writer.inserted
    if changed:
        TRT_ATTENTION.add_to(model)
        # A function and the model that holds it must be of one opset; newer ones add to Attention and change nothing.
        model.functions[TRT_ATTENTION.ir_function().identifier()].opset_imports[""] = standard_opset(model)
    said = [f"{len(changed)} made TRT_Attention"] * bool(changed) + [f"{len(written_out)} written out"] * bool(written_out)
    passing = {*inserted} & {*removed}
    return dataclasses.replace(
        change,
        inserted=tuple(name for name in inserted if name not in passing),
        removed=tuple(name for name in (*removed, *written_out) if name not in passing),
        changed=tuple(changed),
        summary=", ".join([*([change.summary] if change else []), *said]),
        notes=tuple(notes),
    )


@dataclass
class AttentionNode:
    """What an Attention is given, as four-dimensional tensors."""

    node: ir.Node
    dtype: ir.DataType
    query: ir.Value
    """(B, H, S, D)"""
    key: ir.Value
    """(B, G, N, D), the past before the new."""
    value: ir.Value
    new_key: ir.Value
    """(B, G, new, D): the new keys alone."""
    past_key: ir.Value | None
    masks: tuple[Mask, ...] = ()
    kv_lengths: ir.Value | None = None
    """(B,): how many keys there are."""
    is_causal: bool = False
    is_3d: bool = False
    """Whether the node itself takes and gives (B, S, H*D)."""

    def output(self, index: int) -> ir.Value | None:
        """Return output `at` where something reads it."""
        value = self.node.outputs[index] if index < len(self.node.outputs) else None
        return value if value is not None and value.name and (value.uses() or value.is_graph_output()) else None


class AttentionLegalizer:
    """Rewrites the attentions of one graph."""

    def __init__(self, graph: ir.Graph, model_info: ModelInfo, *, strict: bool = False) -> None:
        self.strict = strict
        self.matcher = AttentionMatcher(model_info.shapes)
        self.shapes, self.types = model_info.shapes, model_info.types
        self.writer = NodeBuilder(graph, model_info)
        self.masks = MaskBuilder(self.writer, self.shapes)
        self._position_masks: dict[tuple[object, ...], Mask] = {}

    def legalize(self, node: ir.Node) -> str | None:
        """Put ops that build in the place of `node`; return why it had to be written out, or None where it had not."""
        call = self._read_attention(node)
        for at, whole in ((1, call.key), (2, call.value)):
            present = call.output(at)
            if present is not None:
                replace_value(present, self.writer.op(node, "Identity", [whole]))
        why = self._unsupported_reason(call)
        if why is None:
            output = self._write_trt_attention(call)
        else:
            self._convert_to_masks(call)
            expander = AttentionDecomposer(self.writer, self.masks, self.shapes)
            output, weights = expander.decompose(
                call.node, self._scaled_query(call), call.key, call.value, call.masks, call.dtype
            )
            scores = call.output(3)
            if scores is not None:
                replace_value(scores, weights)
        if call.is_3d:
            rows = self.writer.op(node, "Transpose", [output], {"perm": (0, 2, 1, 3)})
            output = self.writer.op(node, "Reshape", [rows, self.writer.int64_vector(0, 0, -1)])
        replace_value(node.outputs[0], output)
        return why

    def _read_attention(self, node: ir.Node) -> AttentionNode:
        inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
        query, key, value, mask, past_key, past_value, lengths = inputs[:7]
        if query is None or key is None or value is None:
            raise ValueError(f"`{node.name}` lacks a query, a key or a value")
        dtype = self.types.get(query, ir.DataType.FLOAT)
        flat = self.shapes.rank(query) == 3 or (self.shapes.rank(query) is None and "q_num_heads" in node.attributes)
        if flat:
            heads, groups = int_attribute(node, "q_num_heads", 1), int_attribute(node, "kv_num_heads", 1)
            query, key, value = (
                self._split_heads(node, query, heads),
                self._split_heads(node, key, groups),
                self._split_heads(node, value, groups),
            )
        else:
            few_keys, few_values = self.matcher.before_repeat_kv(key), self.matcher.before_repeat_kv(value)
            if few_keys is not None and few_values is not None and past_key is None:
                key, value = few_keys, few_values
        fresh = key
        if past_key is not None and past_value is not None:
            key = self.writer.op(node, "Concat", [past_key, key], {"axis": 2})
            value = self.writer.op(node, "Concat", [past_value, value], {"axis": 2})
        masks: tuple[Mask, ...] = ()
        if mask is not None:
            one = Mask(mask, float("-inf")) if self.types.get(mask) == ir.DataType.BOOL else Mask(mask)
            masks = () if self.masks.is_noop(one) else (self._pad_mask(one, key, node),)
        causal = bool(int_attribute(node, "is_causal", 0))
        return AttentionNode(node, dtype, query, key, value, fresh, past_key, masks, lengths, causal, flat)

    def _split_heads(self, node: ir.Node, value: ir.Value, heads: int) -> ir.Value:
        """Return (B, H, S, D) of (B, S, H*D)."""
        apart = self.writer.op(node, "Reshape", [value, self.writer.int64_vector(0, 0, heads, -1)])
        return self.writer.op(node, "Transpose", [apart], {"perm": (0, 2, 1, 3)})

    def _pad_mask(self, mask: Mask, key: ir.Value, node: ir.Node) -> Mask:
        """Return `mask` with a column for each key: ONNX masks the keys for which there is none."""
        have, keys = self.shapes.dims(mask.value), self.shapes.dims(key)
        if have is None or keys is None or have[-1] == keys[2] or not isinstance(have[-1], int) or not isinstance(keys[2], int):
            return mask
        pads = self.writer.int64_vector(*[0] * (2 * len(have) - 1), keys[2] - have[-1])
        out = -np.inf if mask.fill is None else 0.0
        dtype = self.types.get(mask.value, ir.DataType.FLOAT)
        return dataclasses.replace(mask, value=self.writer.op(node, "Pad", [mask.value, pads, self.writer.scalar(out, dtype)]))

    def _unsupported_reason(self, attention: AttentionNode) -> str | None:
        """Return what this attention does that none of TensorRT does, or None."""
        node = attention.node
        if attention.output(3) is not None:
            return "its scores are an output"
        cap = node.attributes.get("softcap")
        if cap is not None and cap.as_float():
            return "its scores are soft-capped"
        if any(int_attribute(node, side, -1) >= 0 for side in ("left_window_size", "right_window_size")):
            return "it attends in a window"
        query, value = self.shapes.dims(attention.query), self.shapes.dims(attention.value)
        widths = (query[3], value[3]) if query is not None and value is not None else (0, 0)
        if widths[0] != widths[1] and all(isinstance(width, int) for width in widths):
            return f"its values are {widths[1]} wide and its keys {widths[0]}"
        return None

    def _scaled_query(self, attention: AttentionNode) -> ir.Value:
        """Return the query times the scale of the scores."""
        scale = attention.node.attributes.get("scale")
        dims = self.shapes.dims(attention.query)
        width = dims[3] if dims is not None else None
        if scale is not None or isinstance(width, int):
            factor = scale.as_float() if scale is not None else 1 / float(width) ** 0.5  # type: ignore[arg-type]
            if factor == 1.0:
                return attention.query
            number = self.writer.scalar(factor, attention.dtype)
            return self.writer.op(attention.node, "Mul", [attention.query, number], shape=attention.query.shape)
        size = self.writer.op(attention.node, "Shape", [attention.query], {"start": 3, "end": 4}, dtype=ir.DataType.INT64)
        number = self.writer.op(attention.node, "Cast", [size], {"to": int(attention.dtype)}, dtype=attention.dtype)
        return self.writer.op(attention.node, "Div", [attention.query, self.writer.op(attention.node, "Sqrt", [number])])

    def _write_trt_attention(self, attention: AttentionNode) -> ir.Value:
        """Write a TRT_Attention, and zero in its rows that see no key."""
        kind = self._causal_kind(attention)
        attention.is_causal = attention.is_causal and kind == "none"
        if not self._can_use_lengths(attention):
            self._convert_to_masks(attention)
        node = attention.node
        visible = self.masks.nonempty_rows(attention.masks, node)
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
        if visible is None:
            return output
        zero = self.writer.scalar(0.0, attention.dtype)
        return self.writer.op(node, "Where", [visible, output, zero], dtype=attention.dtype, shape=output.shape)

    def _causal_kind(self, attention: AttentionNode) -> str:
        """Return the word of TensorRT for the causality of `call`, or "none" where there is no such word for it."""
        if not attention.is_causal or attention.masks or attention.kv_lengths is not None:
            return "none"
        if attention.past_key is None:
            return "upper_left"
        # ONNX puts the first query behind the past, TensorRT the last one at the last key.
        query, fresh = self.shapes.dims(attention.query), self.shapes.dims(attention.new_key)
        return "lower_right" if query is not None and fresh is not None and query[2] == fresh[2] else "none"

    def _can_use_lengths(self, attention: AttentionNode) -> bool:
        """Whether lengths can stay lengths: alone, for a width that has a kernel, and causal only for one query."""
        if attention.kv_lengths is None or attention.masks:
            return attention.kv_lengths is None and not attention.is_causal
        dims = self.shapes.dims(attention.query)
        if dims is None or not isinstance(dims[3], int) or dims[3] % _LENGTHS_HEAD_SIZE_MULTIPLE:
            return False
        attention.is_causal = attention.is_causal and dims[2] != 1
        return not attention.is_causal

    def _convert_to_masks(self, attention: AttentionNode) -> None:
        """Turn lengths and order into conditions."""
        if attention.kv_lengths is not None or attention.is_causal or self._window(attention) != (-1, -1):
            attention.masks = (*attention.masks, self._position_mask(attention))
        attention.kv_lengths, attention.is_causal = None, False

    def _window(self, attention: AttentionNode) -> tuple[int, int]:
        return int_attribute(attention.node, "left_window_size", -1), int_attribute(attention.node, "right_window_size", -1)

    def _position_mask(self, attention: AttentionNode) -> Mask:
        """Return the condition under which a query sees a key, by lengths, causality and window; written once for all alike."""
        query, key = self.shapes.dims(attention.query), self.shapes.dims(attention.key)
        same = (query[2] if query else attention.query, key[2] if key else attention.key)
        marks = (attention.is_causal, self._window(attention), attention.kv_lengths, attention.past_key is None)
        if (same, marks) not in self._position_masks:
            self._position_masks[same, marks] = Mask(self._write_position_mask(attention), float("-inf"))
        return self._position_masks[same, marks]

    def _write_position_mask(self, attention: AttentionNode) -> ir.Value:
        node, columns = attention.node, self._arange(attention.node, attention.key)
        lengths = attention.kv_lengths
        terms: list[ir.Value] = []
        if lengths is not None:
            lengths = self.writer.op(node, "Unsqueeze", [lengths, self.writer.int64_vector(1, 2, 3)])
            terms.append(self.writer.op(node, "Less", [columns, lengths], dtype=ir.DataType.BOOL))
        left, right = self._window(attention)
        if attention.is_causal:
            right = 0
        place = self._query_positions(attention, lengths) if left >= 0 or right >= 0 else None
        for reach, way, op in ((right, 1, "LessOrEqual"), (left, -1, "GreaterOrEqual")):
            if place is not None and reach >= 0:
                edge = self.writer.op(node, "Add", [place, self.writer.constant(np.array(way * reach), ir.DataType.INT64)])
                terms.append(self.writer.op(node, op, [columns, edge], dtype=ir.DataType.BOOL))
        seen = terms[0]
        for term in terms[1:]:
            seen = self.writer.op(node, "And", [seen, term])
        return seen

    def _query_positions(self, attention: AttentionNode, kv_lengths: ir.Value | None) -> ir.Value:
        """Return the key that each query stands at, (S, 1) or (B, 1, S, 1): behind the past, or at the end of the lengths."""
        rows = self.writer.op(
            attention.node, "Unsqueeze", [self._arange(attention.node, attention.query), self.writer.int64_vector(-1)]
        )
        if attention.past_key is not None:
            return self.writer.op(attention.node, "Add", [rows, self._seq_length(attention.node, attention.past_key)])
        if kv_lengths is None:
            return rows
        before = self.writer.op(attention.node, "Sub", [kv_lengths, self._seq_length(attention.node, attention.query)])
        return self.writer.op(attention.node, "Add", [rows, before])

    def _seq_length(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return the number of rows of (B, H, rows, D), as a vector of one."""
        return self.writer.op(node, "Shape", [value], {"start": 2, "end": 3}, dtype=ir.DataType.INT64)

    def _arange(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return 0, 1, 2, ... for the rows of (B, H, rows, D)."""
        size = self.writer.op(node, "Squeeze", [self._seq_length(node, value)])
        ends = [self.writer.constant(np.array(number), ir.DataType.INT64) for number in (0, 1)]
        return self.writer.op(node, "Range", [ends[0], size, ends[1]], shape=ir.Shape([None]))

    def _unsqueeze_to_4d(self, mask: ir.Value, node: ir.Node) -> ir.Value:
        rank = self.shapes.rank(mask)
        if rank is None or rank >= 4:
            return mask
        return self.writer.op(node, "Unsqueeze", [mask, self.writer.int64_vector(*range(4 - rank))])
