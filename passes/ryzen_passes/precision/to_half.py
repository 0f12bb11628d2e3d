"""The rewrite to half precision, from the evidence to the casts."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import onnx_ir as ir

from ryzen_compile.errors import BackendError, did_you_mean
from ryzen_compile.ir.analysis.element_types import HALVES, Types, element_types
from ryzen_compile.spec.passes import Change, Context, Range, Refusal
from ryzen_passes.opset import raise_opset, standard_opset
from ryzen_passes.precision.cache_dtypes import Kept, kept_of, tell
from ryzen_passes.precision.casts import to_half
from ryzen_passes.precision.mask_fills import clamp_fills
from ryzen_passes.precision.placement import Labels, find_moves, find_positional, find_statistics, gains, label
from ryzen_passes.precision.rules import Evidence, Half, constant_sizes
from ryzen_passes.precision.to_fp32 import to_single

_BF16_OPSET = 13
"""The first opset in which an op computes in bf16."""
_MOST_OPS = 22
"""The opset in which convolutions, pools and many others came to compute in bf16."""


def narrow(
    model: ir.Model,
    context: Context,
    half: Half,
    *,
    keep: tuple[str, ...],
    trust: tuple[str, ...],
    io: bool,
    headroom: float,
) -> Change | Refusal:
    """Take `model` to half precision in place; the options are those of the pass."""
    opset = standard_opset(model)
    if half.dtype == ir.DataType.BFLOAT16 and opset < _BF16_OPSET:
        return Refusal(
            says=f"ops compute in bf16 from opset {_BF16_OPSET} on, and the model is of opset {opset}",
            where=model.graph.name or "the graph",
            hint="export it at opset 18 or later, or use precision{to=fp16}",
        )
    if isinstance(kept := _matching(keep, model.graph), Refusal):
        return kept
    if isinstance(trusted := _matching(trust, model.graph), Refusal):
        return trusted
    types, widened = element_types(model), Change()
    if not (other := HALVES - {half.dtype}).isdisjoint(types.values()):
        # What is in the other half type goes through fp32, which holds all of its values.
        widened = to_single(model, other, io=io)
        types = element_types(model)
    raised = _raise_opset(model, types, half)
    moves, stuck = find_moves(model.graph, types, half.dtype)
    sizes = constant_sizes(model.graph, types)
    fills, clamped = clamp_fills(sizes, half, half.largest / headroom)
    ranges, how = _measure(model, context)
    evidence = Evidence(
        half=half,
        types=types,
        moves=moves,
        headroom=headroom,
        ranges=ranges,
        sizes=sizes,
        fills=fills,
        positional=find_positional(types, moves),
        statistics=find_statistics(types, moves),
    )
    states = () if io else kept_of(model, types, {ir.DataType.FLOAT})
    labels, states, border = _labels(evidence, kept, trusted, states, _border(model, types) if io else frozenset())
    tell(model, states, half.dtype)
    touched = to_half(model, types, half, labels.half, moves, border=border)
    reasons = {**stuck, **labels.reasons}
    inserted = [name for name in (*widened.inserted, *touched.inserted) if name not in touched.removed]
    removed = [name for name in (*widened.removed, *touched.removed) if name not in widened.inserted]
    changed = [_name(node) for node in moves if node in labels.half]
    casts = f"{len(inserted)} casts" + (f", and {len(states)} states of keys and values too" if states else "")
    respelt = [model.graph.name or "graph"] if standard_opset(model) != opset else []
    return Change(
        inserted=tuple(inserted),
        removed=tuple(removed),
        changed=(*changed, *clamped, *respelt),
        says=f"{len(changed)} nodes are {half.name} and {len(reasons)} fp32, with {casts}; {how}{raised}",
        notes=(*(f"{_name(node)}: {reason}" for node, reason in reasons.items()), *_told(clamped, half)),
    )


def _labels(
    evidence: Evidence,
    keep: frozenset[ir.Node],
    trust: frozenset[ir.Node],
    states: tuple[Kept, ...],
    border: frozenset[ir.Value],
) -> tuple[Labels, tuple[Kept, ...], frozenset[ir.Value]]:
    """Decide for the nodes, and for the states: those go to half precision whose new values are made in it."""
    while True:
        whole = border | {value for one in states for value in (one.past, one.present)}
        labels = label(evidence, keep, trust, border=whole)
        made = tuple(one for one in states if (maker := one.present.producer()) is not None and maker in labels.half)
        if made == states:
            return labels, states, whole
        states = made


def _border(model: ir.Model, types: Types) -> frozenset[ir.Value]:
    both = (*model.graph.inputs, *model.graph.outputs)
    return frozenset(value for value in both if types.get(value) == ir.DataType.FLOAT)


def _raise_opset(model: ir.Model, types: Types, half: Half) -> str:
    """Bring the model to the opset in which most ops have the type, where one of its ops gains by that; tell what was done."""
    have = standard_opset(model)
    if have >= _MOST_OPS or not gains(model.graph, types, half.dtype, _MOST_OPS):
        return ""
    reason = raise_opset(model, _MOST_OPS)
    return f"; opset {have} became {_MOST_OPS}" if reason is None else f"; opset {have} stays: {reason}"


def _name(node: ir.Node) -> str:
    return node.name or node.op_type


def _told(clamped: list[str], half: Half) -> list[str]:
    return [
        f"{name}: fill: pulled to -{half.largest / 2:.4g}, so that two of them and the scores add up to a finite number"
        for name in clamped
    ]


def _matching(patterns: tuple[str, ...], graph: ir.Graph) -> frozenset[ir.Node] | Refusal:
    found: set[ir.Node] = set()
    for pattern in patterns:
        hits = [node for node in graph if fnmatchcase(node.name or "", pattern) or fnmatchcase(node.op_type, pattern)]
        if not hits:
            return Refusal(
                says=f"`{pattern}` is neither a node nor an op type of this model",
                where=graph.name or "the graph",
                hint=did_you_mean(pattern, sorted({node.op_type for node in graph})),
            )
        found.update(hits)
    return frozenset(found)


def _measure(model: ir.Model, context: Context) -> tuple[Mapping[str, Range] | None, str]:
    """Return the ranges on the calibration samples, or None, and how they were come by."""
    if context.observe is None or not context.samples:
        return None, "by the static rules alone, as there are no calibration samples"
    try:
        with context.progress.stage("calibrate"):
            ranges = context.observe(model, context.samples)
    except BackendError as error:
        return None, f"by the static rules alone: {error.says}"
    return ranges, f"ranges measured on {len(context.samples)} samples"
