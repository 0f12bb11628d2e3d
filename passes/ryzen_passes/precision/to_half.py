"""The rewrite to half precision, from the evidence to the casts."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import onnx_ir as ir

from ryzen_compile.errors import BackendError, did_you_mean
from ryzen_compile.ir.analysis.element_types import HALF_TYPES, ElementTypes, element_types
from ryzen_compile.spec.passes import Change, PassContext, Refusal, ValueRange
from ryzen_passes.opset import raise_opset, standard_opset
from ryzen_passes.precision.assignment import (
    PrecisionAssignment,
    assign_precision,
    find_cast_plans,
    find_positional_nodes,
    find_statistics_nodes,
    gains_from_opset,
)
from ryzen_passes.precision.cast_insertion import insert_casts
from ryzen_passes.precision.kv_cache_dtypes import StaticCacheState, record_state_dtypes, static_cache_states
from ryzen_passes.precision.mask_fills import clamp_mask_fills
from ryzen_passes.precision.rules import HalfType, PrecisionAnalysis, measure_constant_magnitudes
from ryzen_passes.precision.to_fp32 import to_fp32

_MIN_BF16_OPSET = 13
"""The first opset in which an op computes in bf16."""
_FULL_BF16_OPSET = 22
"""The opset in which convolutions, pools and many others came to compute in bf16."""


def to_half(
    model: ir.Model,
    context: PassContext,
    half: HalfType,
    *,
    keep: tuple[str, ...],
    force: tuple[str, ...],
    io: bool,
    range_margin: float,
) -> Change | Refusal:
    """Take `model` to half precision in place; the options are those of the pass."""
    opset = standard_opset(model)
    if half.dtype == ir.DataType.BFLOAT16 and opset < _MIN_BF16_OPSET:
        return Refusal(
            reason=f"ops compute in bf16 from opset {_MIN_BF16_OPSET} on, and the model is of opset {opset}",
            location=model.graph.name or "the graph",
            hint="export it at opset 18 or later, or use precision{to=fp16}",
        )
    if isinstance(kept := _match_nodes(keep, model.graph), Refusal):
        return kept
    if isinstance(trusted := _match_nodes(force, model.graph), Refusal):
        return trusted
    types, widened = element_types(model), Change()
    if not (other := HALF_TYPES - {half.dtype}).isdisjoint(types.values()):
        # What is in the other half type goes through fp32, which holds all of its values.
        widened = to_fp32(model, other, io=io)
        types = element_types(model)
    raised = _raise_opset(model, types, half)
    moves, stuck = find_cast_plans(model.graph, types, half.dtype)
    sizes = measure_constant_magnitudes(model.graph, types)
    fills, clamped = clamp_mask_fills(sizes, half, half.max / range_margin)
    ranges, how = _measured_ranges(model, context)
    evidence = PrecisionAnalysis(
        half=half,
        types=types,
        cast_plans=moves,
        range_margin=range_margin,
        ranges=ranges,
        constant_magnitudes=sizes,
        mask_fills=fills,
        positional_nodes=find_positional_nodes(types, moves),
        statistics_nodes=find_statistics_nodes(types, moves),
    )
    states = () if io else static_cache_states(model, types, {ir.DataType.FLOAT})
    labels, states, border = _assign(evidence, kept, trusted, states, _fp32_io(model, types) if io else frozenset())
    record_state_dtypes(model, states, half.dtype)
    touched = insert_casts(model, types, half, labels.half_nodes, moves, converted_io=border)
    reasons = {**stuck, **labels.fp32_reasons}
    inserted = [name for name in (*widened.inserted, *touched.inserted) if name not in touched.removed]
    removed = [name for name in (*widened.removed, *touched.removed) if name not in widened.inserted]
    changed = [_node_name(node) for node in moves if node in labels.half_nodes]
    casts = f"{len(inserted)} casts" + (f", and {len(states)} states of keys and values too" if states else "")
    respelt = [model.graph.name or "graph"] if standard_opset(model) != opset else []
    return Change(
        inserted=tuple(inserted),
        removed=tuple(removed),
        changed=(*changed, *clamped, *respelt),
        summary=f"{len(changed)} nodes are {half.name} and {len(reasons)} fp32, with {casts}; {how}{raised}",
        notes=(*(f"{_node_name(node)}: {reason}" for node, reason in reasons.items()), *_clamp_notes(clamped, half)),
    )


def _assign(
    analysis: PrecisionAnalysis,
    keep: frozenset[ir.Node],
    force: frozenset[ir.Node],
    states: tuple[StaticCacheState, ...],
    converted_io: frozenset[ir.Value],
) -> tuple[PrecisionAssignment, tuple[StaticCacheState, ...], frozenset[ir.Value]]:
    """Decide for the nodes, and for the states: those go to half precision whose new values are made in it."""
    while True:
        whole = converted_io | {value for one in states for value in (one.past, one.present)}
        labels = assign_precision(analysis, keep, force, converted_io=whole)
        made = tuple(one for one in states if (maker := one.present.producer()) is not None and maker in labels.half_nodes)
        if made == states:
            return labels, states, whole
        states = made


def _fp32_io(model: ir.Model, types: ElementTypes) -> frozenset[ir.Value]:
    both = (*model.graph.inputs, *model.graph.outputs)
    return frozenset(value for value in both if types.get(value) == ir.DataType.FLOAT)


def _raise_opset(model: ir.Model, types: ElementTypes, half: HalfType) -> str:
    """Bring the model to the opset in which most ops have the type, where one of its ops gains by that; tell what was done."""
    have = standard_opset(model)
    if have >= _FULL_BF16_OPSET or not gains_from_opset(model.graph, types, half.dtype, _FULL_BF16_OPSET):
        return ""
    reason = raise_opset(model, _FULL_BF16_OPSET)
    return f"; opset {have} became {_FULL_BF16_OPSET}" if reason is None else f"; opset {have} stays: {reason}"


def _node_name(node: ir.Node) -> str:
    return node.name or node.op_type


def _clamp_notes(clamped: list[str], half: HalfType) -> list[str]:
    return [
        f"{name}: fill: pulled to -{half.max / 2:.4g}, so that two of them and the scores add up to a finite number"
        for name in clamped
    ]


def _match_nodes(patterns: tuple[str, ...], graph: ir.Graph) -> frozenset[ir.Node] | Refusal:
    found: set[ir.Node] = set()
    for pattern in patterns:
        hits = [node for node in graph if fnmatchcase(node.name or "", pattern) or fnmatchcase(node.op_type, pattern)]
        if not hits:
            return Refusal(
                reason=f"`{pattern}` is neither a node nor an op type of this model",
                location=graph.name or "the graph",
                hint=did_you_mean(pattern, sorted({node.op_type for node in graph})),
            )
        found.update(hits)
    return frozenset(found)


def _measured_ranges(model: ir.Model, context: PassContext) -> tuple[Mapping[str, ValueRange] | None, str]:
    """Return the ranges on the calibration samples, or None, and how they were come by."""
    if context.measure_ranges is None or not context.samples:
        return None, "by the static rules alone, as there are no calibration samples"
    try:
        with context.progress.stage("calibrate"):
            ranges = context.measure_ranges(model, context.samples)
    except BackendError as error:
        return None, f"by the static rules alone: {error.message}"
    return ranges, f"ranges measured on {len(context.samples)} samples"
