"""Writing attention that was found down as one ONNX Attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from ryzen_compile.ir.edit.builder import Known, Writer, remove_dead, take_over
from ryzen_compile.spec.passes import Change
from ryzen_passes.attention.masks import Mask, Masks
from ryzen_passes.attention.match import Matcher, Miss, Site
from ryzen_passes.attention.unflatten_heads import Lifter
from ryzen_passes.opset import raise_opset


def raise_all(known: Known, opset: int, *, only_shared: bool = False) -> Change:
    """Put an Attention in the place of every site of the model, at `opset` or above, and tell what was left alone.

    With `only_shared` sites at which every query head has keys of its own are left alone too. Else axes of batch and heads
    that were made one are parted first.
    """
    model, matcher = known.model, Matcher(known.sizes)
    graphs = (model.graph, *model.graph.subgraphs())
    lifters = [] if only_shared else [Lifter(graph, known) for graph in graphs if _may_attend(graph, matcher)]
    lifters = [one for one in lifters if one.has_joined()]
    if lifters and (reason := raise_opset(model, opset)) is not None:
        return _too_old(opset, reason)
    for lifter in lifters:
        lifter.run()
    change = _raise(known, graphs, opset, only_shared)
    inserted = (*(name for one in lifters for name in one.write.written), *change.inserted)
    removed = (*(name for one in lifters for name in one.removed), *change.removed)
    passing = {*inserted} & {*removed}
    parted = any(one.removed for one in lifters)
    return dataclasses.replace(
        change,
        inserted=tuple(name for name in inserted if name not in passing),
        removed=tuple(name for name in removed if name not in passing),
        says=f"axes of batch and heads parted, {change.says}" if parted else change.says,
    )


def _may_attend(graph: ir.Graph, matcher: Matcher) -> bool:
    softmaxes = (node for node in graph if node.op_type == "Softmax" and node.domain == "")
    return any(node.inputs[0] is not None and matcher.comes_from_product(node.inputs[0]) for node in softmaxes)


def _too_old(opset: int, reason: str) -> Change:
    return Change(says=f"Attention needs opset {opset}: {reason}")


def _raise(known: Known, graphs: Sequence[ir.Graph], opset: int, only_shared: bool) -> Change:
    model, matcher = known.model, Matcher(known.sizes)
    softmaxes = [(graph, node) for graph in graphs for node in graph if node.op_type == "Softmax" and node.domain == ""]
    notes: list[str] = []
    sites = [_site(matcher, node, notes) for _, node in softmaxes]
    if not any(sites):
        says = "no attention is written out" if not notes else "what looks like attention is none that can be raised"
        return Change(says=says, notes=tuple(notes))
    if only_shared and not any(site is not None and site.shared for site in sites):
        return Change(says="left as it is: no heads share their keys, and one node is no faster than many", notes=tuple(notes))
    if (reason := raise_opset(model, opset)) is not None:
        return dataclasses.replace(_too_old(opset, reason), notes=tuple(notes))
    notes.clear()
    raisers = {graph: Raiser(graph, known) for graph, _ in softmaxes}
    removed: list[str] = []
    raised: list[str] = []
    for graph, softmax in softmaxes:
        # Found anew: what an earlier one gave is now another tensor.
        site = _site(matcher, softmax, notes)
        if site is not None and (site.shared or not only_shared):
            dead = raisers[graph].put(site, softmax)
            raised.append(dead.name or "")
            removed += remove_dead([dead])[1:]
    return Change(
        inserted=tuple(name for raiser in raisers.values() for name in raiser.write.written),
        removed=tuple(removed),
        changed=tuple(raised),
        says=f"{len(raised)} attention{'s' * (len(raised) != 1)} raised",
        notes=tuple(notes),
    )


def _site(matcher: Matcher, softmax: ir.Node, notes: list[str]) -> Site | None:
    try:
        return matcher.site(softmax)
    except Miss as miss:
        notes.append(f"{softmax.name}: {miss}")
        return None


class Raiser:
    """Writes the sites of one graph."""

    def __init__(self, graph: ir.Graph, known: Known) -> None:
        self.write = Writer(graph, known)
        self.masks = Masks(self.write, known.sizes)
        self.sizes, self.types = known.sizes, known.types

    def put(self, site: Site, softmax: ir.Node) -> ir.Node:
        """Put an Attention in the place of `site`, and return the node that is now dead."""
        product, dtype = site.product, self.types.get(site.query, ir.DataType.FLOAT)
        mask = self._mask(site, dtype, softmax)
        query, key, value = site.query, site.key, site.value
        for op, scalar in site.scalars:
            query = self.write.op(product, op, [query, scalar], shape=query.shape)
        if site.key_perm is not None:
            key = self.write.op(product, "Transpose", [key], {"perm": site.key_perm})
        if site.rank == 3:
            ones = self.write.integers(1)
            query, key, value = (self.write.op(product, "Unsqueeze", [one, ones]) for one in (query, key, value))
            if mask is not None and self._rank(site) == 3:
                mask = self.write.op(product, "Unsqueeze", [mask, ones])
        if mask is not None:
            mask = self.masks.for_rows_of(site.query, mask, softmax)
        attributes: dict[str, object] = {"scale": float(site.scale)}
        if site.precision is not None and site.precision != dtype:
            attributes["softmax_precision"] = int(site.precision)
        inputs = [query, key, value] if mask is None else [query, key, value, mask]
        shape = product.outputs[0].shape if site.rank == 4 else None
        product.name = product.name or self.write.names.new("attention")
        output = self.write.op(product, "Attention", inputs, attributes, dtype=dtype, shape=shape, name=product.name)
        if site.rank == 3:
            output = self.write.op(product, "Squeeze", [output, self.write.integers(1)])
        take_over(product.outputs[0], output)
        return product

    def _rank(self, site: Site) -> int:
        return max(self.sizes.rank(mask.value) or 0 for mask in site.masks)

    def _mask(self, site: Site, dtype: ir.DataType, before: ir.Node) -> ir.Value | None:
        """Return the mask of the Attention: a condition where rows without keys are to be zero, else what is added.

        ONNX gives zero for such a row. Where a written-out attention adds minus infinity it gives NaN, or zero by an IsNaN
        that guards it: zero serves both. Where it adds the lowest number, such a row averages all values, and still does.
        """
        masks = tuple(mask for mask in site.masks if not self.masks.is_nothing(mask))
        if not masks:
            return None
        return self._condition(masks, before) or self.masks.added(masks, dtype, before)

    def _condition(self, masks: tuple[Mask, ...], before: ir.Node) -> ir.Value | None:
        return self.masks.condition(masks, before) if all(mask.hides for mask in masks) else None
