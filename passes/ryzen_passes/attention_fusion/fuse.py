"""Fuse each attention that the matcher finds into one ONNX Attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_compile.ir.traversal import nested_graphs
from ryzen_compile.spec.passes import Change
from ryzen_passes.attention_fusion.masks import Mask, MaskBuilder
from ryzen_passes.attention_fusion.match import AttentionMatch, AttentionMatcher
from ryzen_passes.attention_fusion.unflatten_heads import HeadUnflattener
from ryzen_passes.opset import raise_opset


def fuse_attention(model_info: ModelInfo, opset: int, *, only_grouped_query: bool = False) -> Change:
    """Replace every decomposed attention of the model by an Attention node; raise the model to `opset` if needed.

    The notes of the returned change list the near misses with their reasons. With `only_grouped_query`, attention in which
    every query head has its own key head stays decomposed. Otherwise, flattened batch and head axes are unflattened first.
    """
    model, matcher = model_info.model, AttentionMatcher(model_info.shapes)
    graphs = tuple(nested_graphs(model.graph))
    unflatteners = (
        []
        if only_grouped_query
        else [HeadUnflattener(graph, model_info) for graph in graphs if _may_contain_attention(graph, matcher)]
    )
    unflatteners = [unflattener for unflattener in unflatteners if unflattener.find()]
    if unflatteners and (reason := raise_opset(model, opset)) is not None:
        return _opset_too_low(opset, reason)
    for unflattener in unflatteners:
        unflattener.run()
    change = _fuse_matches(model_info, graphs, opset, only_grouped_query)
    inserted = (*(name for unflattener in unflatteners for name in unflattener.writer.inserted), *change.inserted)
    removed = (*(name for unflattener in unflatteners for name in unflattener.removed), *change.removed)
    transient = {*inserted} & {*removed}
    unflattened = any(unflattener.removed for unflattener in unflatteners)
    return dataclasses.replace(
        change,
        inserted=tuple(name for name in inserted if name not in transient),
        removed=tuple(name for name in removed if name not in transient),
        summary=f"batch and head axes unflattened, {change.summary}" if unflattened else change.summary,
    )


def _may_contain_attention(graph: ir.Graph, matcher: AttentionMatcher) -> bool:
    softmaxes = (node for node in graph if node.op_type == "Softmax" and node.domain == "")
    return any(node.inputs[0] is not None and matcher.comes_from_matmul(node.inputs[0]) for node in softmaxes)


def _opset_too_low(opset: int, reason: str) -> Change:
    return Change(summary=f"Attention needs opset {opset}: {reason}")


def _fuse_matches(model_info: ModelInfo, graphs: Sequence[ir.Graph], opset: int, only_grouped_query: bool) -> Change:
    model, matcher = model_info.model, AttentionMatcher(model_info.shapes)
    softmaxes = [(graph, node) for graph in graphs for node in graph if node.op_type == "Softmax" and node.domain == ""]
    notes: list[str] = []
    matches = [_try_match(matcher, node, notes) for _, node in softmaxes]
    if not any(matches):
        summary = "no decomposed attention" if not notes else "no attention that can be fused; the notes list the near misses"
        return Change(summary=summary, notes=tuple(notes))
    if only_grouped_query and not any(match is not None and match.is_grouped_query for match in matches):
        return Change(
            summary="unchanged: no grouped-query attention, and fusing other attention is not faster on this backend",
            notes=tuple(notes),
        )
    if (reason := raise_opset(model, opset)) is not None:
        return dataclasses.replace(_opset_too_low(opset, reason), notes=tuple(notes))
    notes.clear()
    fusers = {graph: AttentionFuser(graph, model_info) for graph, _ in softmaxes}
    removed: list[str] = []
    fused: list[str] = []
    for graph, softmax in softmaxes:
        # Match again: fusing an earlier attention replaced its output tensor.
        match = _try_match(matcher, softmax, notes)
        if match is not None and (match.is_grouped_query or not only_grouped_query):
            dead = fusers[graph].fuse(match, softmax)
            fused.append(dead.name or "")
            removed += remove_dead_nodes([dead])[1:]
    return Change(
        inserted=tuple(name for fuser in fusers.values() for name in fuser.writer.inserted),
        removed=tuple(removed),
        changed=tuple(fused),
        summary=f"{len(fused)} attention{'s' * (len(fused) != 1)} fused",
        notes=tuple(notes),
    )


def _try_match(matcher: AttentionMatcher, softmax: ir.Node, notes: list[str]) -> AttentionMatch | None:
    try:
        return matcher.match(softmax)
    except PatternNotMatched as failure:
        notes.append(f"{softmax.name}: {failure.description}")
        return None


class AttentionFuser:
    """Fuses the attention matches of one graph."""

    def __init__(self, graph: ir.Graph, model_info: ModelInfo) -> None:
        self.writer = NodeBuilder(graph, model_info)
        self.masks = MaskBuilder(self.writer, model_info.shapes)
        self.shapes, self.types = model_info.shapes, model_info.types

    def fuse(self, match: AttentionMatch, softmax: ir.Node) -> ir.Node:
        """Insert an Attention for `match`, found at `softmax`; return the output node that it replaces, which is then dead."""
        output_node, dtype = match.output_node, self.types.get(match.query, ir.DataType.FLOAT)
        mask = self._build_mask(match, dtype, softmax)
        query, key, value = match.query, match.key, match.value
        for op, scalar in match.dynamic_scales:
            query = self.writer.op(output_node, op, [query, scalar], shape=query.shape)
        if match.key_perm is not None:
            key = self.writer.op(output_node, "Transpose", [key], {"perm": match.key_perm})
        if match.rank == 3:
            unsqueeze_axes = self.writer.int64_vector(1)
            query, key, value = (
                self.writer.op(output_node, "Unsqueeze", [tensor, unsqueeze_axes]) for tensor in (query, key, value)
            )
            if mask is not None and self._mask_rank(match) == 3:
                mask = self.writer.op(output_node, "Unsqueeze", [mask, unsqueeze_axes])
        if mask is not None:
            mask = self.masks.expand_rows(match.query, mask, output_node)
        attributes: dict[str, object] = {"scale": float(match.scale)}
        if match.softcap:
            attributes["softcap"] = match.softcap
        if match.softmax_precision is not None and match.softmax_precision != dtype:
            attributes["softmax_precision"] = int(match.softmax_precision)
        inputs = [query, key, value] if mask is None else [query, key, value, mask]
        shape = output_node.outputs[0].shape if match.rank == 4 else None
        output_node.name = output_node.name or self.writer.names.allocate("attention")
        output = self.writer.op(output_node, "Attention", inputs, attributes, dtype=dtype, shape=shape, name=output_node.name)
        if match.rank == 3:
            output = self.writer.op(output_node, "Squeeze", [output, self.writer.int64_vector(1)])
        replace_value(output_node.outputs[0], output)
        return output_node

    def _mask_rank(self, match: AttentionMatch) -> int:
        return max(self.shapes.rank(mask.value) or 0 for mask in match.masks)

    def _build_mask(self, match: AttentionMatch, dtype: ir.DataType, before: ir.Node) -> ir.Value | None:
        """Return the mask of the Attention: boolean if fully masked rows must be zero, else additive; None without a mask.

        ONNX Attention returns zero for a row whose keys are all masked by a boolean mask. A decomposed attention that adds
        minus infinity returns NaN for such a row, or zero if an IsNaN guards it: zero is valid for both. A decomposed attention
        that adds the most negative finite number returns the average of all values; `MaskBuilder.attention_mask` keeps that.
        """
        masks = tuple(mask for mask in match.masks if not self.masks.is_noop(mask))
        if not masks:
            return None
        return self._boolean_mask(masks, before) or self.masks.attention_mask(masks, dtype, before)

    def _boolean_mask(self, masks: tuple[Mask, ...], before: ir.Node) -> ir.Value | None:
        return self.masks.boolean_mask(masks, before) if all(mask.fills_with_inf for mask in masks) else None
