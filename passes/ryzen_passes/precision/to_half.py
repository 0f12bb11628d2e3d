"""Convert a model to half precision: analyze it, assign a precision to each node, and insert casts."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import onnx_ir as ir

from ryzen_compile.errors import BackendError, did_you_mean
from ryzen_compile.ir.analysis.element_types import HALF_TYPES, ElementTypes, element_types
from ryzen_compile.spec.passes import Change, PassContext, Refusal, ValueRange
from ryzen_passes.kv_cache_dtypes import StaticCacheState, record_state_dtypes, static_cache_states
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
from ryzen_passes.precision.mask_fills import clamp_mask_fills
from ryzen_passes.precision.rules import MIN_BF16_OPSET, HalfType, PrecisionAnalysis, measure_constant_magnitudes
from ryzen_passes.to_fp32 import to_fp32

_UNMET_HINT = (
    "the ranges and the compared values come from a seed: give real samples (--data), which decide what stays in fp32, or use "
    "--bf16, which has the range of fp32"
)
_FULL_BF16_OPSET = 22
"""The opset that added bf16 to convolutions, pools and many other ops."""


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
    """Convert `model` to half precision in place; the options are those of ConvertPrecision.

    On a refusal `model` is unchanged.
    """
    opset = standard_opset(model)
    if half.dtype == ir.DataType.BFLOAT16 and opset < MIN_BF16_OPSET:
        return Refusal(
            reason=f"bf16 needs opset {MIN_BF16_OPSET} or later, the model has opset {opset}",
            location=model.graph.name or "the graph",
            hint="export the model at opset 18 or later, or convert the file: "
            'onnx.save(onnx.version_converter.convert_version(onnx.load("model.onnx"), 18), "model18.onnx")',
        )
    if isinstance(keep_nodes := _match_nodes(keep, model.graph), Refusal):
        return keep_nodes
    if isinstance(force_nodes := _match_nodes(force, model.graph), Refusal):
        return force_nodes
    types, fp32_change = element_types(model), Change()
    if not (other_half := HALF_TYPES - {half.dtype}).isdisjoint(types.values()):
        # Tensors of the other half type go through fp32, which represents all of its values.
        fp32_change = to_fp32(model, other_half, io=io)
        types = element_types(model)
    opset_note = _raise_opset(model, types, half)
    cast_plans, unconvertible = find_cast_plans(model.graph, types, half.dtype)
    magnitudes = measure_constant_magnitudes(model.graph, types)
    mask_fills, clamped = clamp_mask_fills(magnitudes, half, half.max / range_margin)
    ranges, range_source = _measured_ranges(model, context)
    analysis = PrecisionAnalysis(
        half=half,
        types=types,
        cast_plans=cast_plans,
        range_margin=range_margin,
        ranges=ranges,
        constant_magnitudes=magnitudes,
        mask_fills=mask_fills,
        positional_nodes=find_positional_nodes(types, cast_plans),
        statistics_nodes=find_statistics_nodes(types, cast_plans),
    )
    states = () if io else static_cache_states(model, types, {ir.DataType.FLOAT})
    assignment, states, converted_io = _assign(
        analysis, keep_nodes, force_nodes, states, _fp32_io(model, types) if io else frozenset()
    )
    record_state_dtypes(model, states, half.dtype)
    edited = insert_casts(model, types, half, assignment.half_nodes, cast_plans, converted_io=converted_io)
    reasons = {**unconvertible, **assignment.fp32_reasons}
    overflows = sum(reason.startswith("overflow:") for reason in reasons.values())
    inserted = [name for name in (*fp32_change.inserted, *edited.inserted) if name not in edited.removed]
    removed = [name for name in (*fp32_change.removed, *edited.removed) if name not in fp32_change.inserted]
    changed = [_node_name(node) for node in cast_plans if node in assignment.half_nodes]
    casts = f"{len(inserted)} casts" + (f" and {len(states)} KV cache states converted" if states else "")
    raised_graph = [model.graph.name or "graph"] if standard_opset(model) != opset else []
    return Change(
        inserted=tuple(inserted),
        removed=tuple(removed),
        changed=(*changed, *clamped, *raised_graph),
        summary=f"{len(changed)} nodes in {half.name}, {len(reasons)} in fp32, with {casts}; {range_source}"
        + (f"; {overflows} nodes stay in fp32 because their values come close to {half.max:g}" if overflows else "")
        + opset_note,
        notes=(*(f"{_node_name(node)}: {reason}" for node, reason in reasons.items()), *_clamp_notes(clamped, half)),
        warnings=_range_warnings(context, half, range_source if ranges is None else None),
        unmet_hint=_UNMET_HINT if half.dtype == ir.DataType.FLOAT16 and context.samples_origin == "random" else None,
    )


def _assign(
    analysis: PrecisionAnalysis,
    keep: frozenset[ir.Node],
    force: frozenset[ir.Node],
    states: tuple[StaticCacheState, ...],
    converted_io: frozenset[ir.Value],
) -> tuple[PrecisionAssignment, tuple[StaticCacheState, ...], frozenset[ir.Value]]:
    """Assign a precision to nodes and KV cache states; a state is converted if its new value is produced in half precision."""
    while True:
        all_converted_io = converted_io | {value for state in states for value in (state.past, state.present)}
        assignment = assign_precision(analysis, keep, force, converted_io=all_converted_io)
        converted_states = tuple(
            state
            for state in states
            if (producer := state.present.producer()) is not None and producer in assignment.half_nodes
        )
        if converted_states == states:
            return assignment, states, all_converted_io
        states = converted_states


def _fp32_io(model: ir.Model, types: ElementTypes) -> frozenset[ir.Value]:
    io_values = (*model.graph.inputs, *model.graph.outputs)
    return frozenset(value for value in io_values if types.get(value) == ir.DataType.FLOAT)


def _raise_opset(model: ir.Model, types: ElementTypes, half: HalfType) -> str:
    """Raise the model to the opset in which most ops support the type, if an op gains from it; return a note on the result."""
    current = standard_opset(model)
    if current >= _FULL_BF16_OPSET or not gains_from_opset(model.graph, types, half.dtype, _FULL_BF16_OPSET):
        return ""
    reason = raise_opset(model, _FULL_BF16_OPSET)
    return (
        f"; opset raised from {current} to {_FULL_BF16_OPSET}" if reason is None else f"; opset {current} not raised: {reason}"
    )


def _node_name(node: ir.Node) -> str:
    return node.name or node.op_type


def _clamp_notes(clamped: list[str], half: HalfType) -> list[str]:
    return [
        f"{name}: fill: clamped to -{half.max / 2:.4g}, so that the sum of two fill values and the scores is finite"
        for name in clamped
    ]


def _match_nodes(patterns: tuple[str, ...], graph: ir.Graph) -> frozenset[ir.Node] | Refusal:
    nodes: set[ir.Node] = set()
    for pattern in patterns:
        matches = [node for node in graph if fnmatchcase(node.name or "", pattern) or fnmatchcase(node.op_type, pattern)]
        if not matches:
            return Refusal(
                reason=f"`{pattern}` matches no node name and no op type of this model",
                location=graph.name or "the graph",
                hint=did_you_mean(pattern, sorted({node.op_type for node in graph})),
            )
        nodes.update(matches)
    return frozenset(nodes)


def _measured_ranges(model: ir.Model, context: PassContext) -> tuple[Mapping[str, ValueRange] | None, str]:
    """Return the ranges measured on the calibration samples, or None, and a phrase that states their source."""
    if context.measure_ranges is None or not context.samples:
        return None, "static rules only: no calibration samples"
    try:
        with context.progress.stage("measure value ranges"):
            ranges = context.measure_ranges(model, context.samples)
    except BackendError as error:
        return None, f"static rules only: {error.message}"
    origin = {"given": "", "texts": " of short texts", "random": ", drawn from a seed"}[context.samples_origin]
    return ranges, f"ranges measured on {len(context.samples)} samples{origin}"


def _range_warnings(context: PassContext, half: HalfType, not_measured: str | None) -> tuple[str, ...]:
    """Return what is unknown about the ranges; empty for bf16, which has the range of fp32."""
    if half.dtype != ir.DataType.FLOAT16:
        return ()
    hint = "give real samples (--data), or use bf16"
    if not_measured is not None:
        return (f"no ranges were measured ({not_measured}): values above {half.max:g} become infinite; {hint}",)
    reads_tokens = context.interface is not None and any(spec.role == "ids" for spec in context.interface.inputs)
    if context.samples_origin == "random" and reads_tokens:
        return (
            f"the ranges come from token ids drawn from a seed, and real text may reach larger values, which become infinite "
            f"above {half.max:g}; {hint}",
        )
    return ()
