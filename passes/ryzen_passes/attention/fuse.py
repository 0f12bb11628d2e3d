"""Writing attention that was found down as one ONNX Attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.spec.passes import Change
from ryzen_passes.attention.masks import Mask, MaskBuilder
from ryzen_passes.attention.match import AttentionMatch, AttentionMatcher, MatchFailure
from ryzen_passes.attention.unflatten_heads import HeadUnflattener
from ryzen_passes.opset import raise_opset


def fuse_attention(model_info: ModelInfo, opset: int, *, only_grouped_query: bool = False) -> Change:
    """Put an Attention in the place of every site of the model, at `opset` or above, and tell what was left alone.

    With `only_shared` sites at which every query head has keys of its own are left alone too. Else axes of batch and heads
    that were made one are parted first.
    """
    model, matcher = model_info.model, AttentionMatcher(model_info.shapes)
    graphs = (model.graph, *model.graph.subgraphs())
    lifters = (
        []
        if only_grouped_query
        else [HeadUnflattener(graph, model_info) for graph in graphs if _may_contain_attention(graph, matcher)]
    )
    lifters = [one for one in lifters if one.may_apply()]
    if lifters and (reason := raise_opset(model, opset)) is not None:
        return _opset_too_low(opset, reason)
    for lifter in lifters:
        lifter.run()
    change = _fuse_matches(model_info, graphs, opset, only_grouped_query)
    inserted = (*(name for one in lifters for name in one.writer.inserted), *change.inserted)
    removed = (*(name for one in lifters for name in one.removed), *change.removed)
    passing = {*inserted} & {*removed}
    parted = any(one.removed for one in lifters)
    return dataclasses.replace(
        change,
        inserted=tuple(name for name in inserted if name not in passing),
        removed=tuple(name for name in removed if name not in passing),
        summary=f"axes of batch and heads parted, {change.summary}" if parted else change.summary,
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
    sites = [_try_match(matcher, node, notes) for _, node in softmaxes]
    if not any(sites):
        says = "no attention is written out" if not notes else "what looks like attention is none that can be raised"
        return Change(summary=says, notes=tuple(notes))
    if only_grouped_query and not any(site is not None and site.is_grouped_query for site in sites):
        return Change(
            summary="left as it is: no heads share their keys, and one node is no faster than many", notes=tuple(notes)
        )
    if (reason := raise_opset(model, opset)) is not None:
        return dataclasses.replace(_opset_too_low(opset, reason), notes=tuple(notes))
    notes.clear()
    raisers = {graph: AttentionFuser(graph, model_info) for graph, _ in softmaxes}
    removed: list[str] = []
    raised: list[str] = []
    for graph, softmax in softmaxes:
        # Found anew: what an earlier one gave is now another tensor.
        site = _try_match(matcher, softmax, notes)
        if site is not None and (site.is_grouped_query or not only_grouped_query):
            dead = raisers[graph].fuse(site, softmax)
            raised.append(dead.name or "")
            removed += remove_dead_nodes([dead])[1:]
    return Change(
        inserted=tuple(name for raiser in raisers.values() for name in raiser.writer.inserted),
        removed=tuple(removed),
        changed=tuple(raised),
        summary=f"{len(raised)} attention{'s' * (len(raised) != 1)} raised",
        notes=tuple(notes),
    )


def _try_match(matcher: AttentionMatcher, softmax: ir.Node, notes: list[str]) -> AttentionMatch | None:
    try:
        return matcher.match(softmax)
    except MatchFailure as miss:
        notes.append(f"{softmax.name}: {miss}")
        return None


class AttentionFuser:
    """Writes the sites of one graph."""

    def __init__(self, graph: ir.Graph, model_info: ModelInfo) -> None:
        self.writer = NodeBuilder(graph, model_info)
        self.masks = MaskBuilder(self.writer, model_info.shapes)
        self.shapes, self.types = model_info.shapes, model_info.types

    def fuse(self, match: AttentionMatch, softmax: ir.Node) -> ir.Node:
        """Put an Attention in the place of `site`, and return the node that is now dead."""
        product, dtype = match.output_node, self.types.get(match.query, ir.DataType.FLOAT)
        mask = self._build_mask(match, dtype, softmax)
        query, key, value = match.query, match.key, match.value
        for op, scalar in match.dynamic_scales:
            query = self.writer.op(product, op, [query, scalar], shape=query.shape)
        if match.key_perm is not None:
            key = self.writer.op(product, "Transpose", [key], {"perm": match.key_perm})
        if match.rank == 3:
            ones = self.writer.int64_vector(1)
            query, key, value = (self.writer.op(product, "Unsqueeze", [one, ones]) for one in (query, key, value))
            if mask is not None and self._mask_rank(match) == 3:
                mask = self.writer.op(product, "Unsqueeze", [mask, ones])
        if mask is not None:
            mask = self.masks.expand_rows(match.query, mask, softmax)
        attributes: dict[str, object] = {"scale": float(match.scale)}
        if match.softmax_precision is not None and match.softmax_precision != dtype:
            attributes["softmax_precision"] = int(match.softmax_precision)
        inputs = [query, key, value] if mask is None else [query, key, value, mask]
        shape = product.outputs[0].shape if match.rank == 4 else None
        product.name = product.name or self.writer.names.allocate("attention")
        output = self.writer.op(product, "Attention", inputs, attributes, dtype=dtype, shape=shape, name=product.name)
        if match.rank == 3:
            output = self.writer.op(product, "Squeeze", [output, self.writer.int64_vector(1)])
        replace_value(product.outputs[0], output)
        return product

    def _mask_rank(self, match: AttentionMatch) -> int:
        return max(self.shapes.rank(mask.value) or 0 for mask in match.masks)

    def _build_mask(self, match: AttentionMatch, dtype: ir.DataType, before: ir.Node) -> ir.Value | None:
        """Return the mask of the Attention: a condition where rows without keys are to be zero, else what is added.

        ONNX gives zero for such a row. Where a written-out attention adds minus infinity it gives NaN, or zero by an IsNaN
        that guards it: zero serves both. Where it adds the lowest number, such a row averages all values, and still does.
        """
        masks = tuple(mask for mask in match.masks if not self.masks.is_noop(mask))
        if not masks:
            return None
        return self._boolean_mask(masks, before) or self.masks.additive_mask(masks, dtype, before)

    def _boolean_mask(self, masks: tuple[Mask, ...], before: ir.Node) -> ir.Value | None:
        return self.masks.boolean_mask(masks, before) if all(mask.fills_with_inf for mask in masks) else None
