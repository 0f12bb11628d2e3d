"""Variants: a graph as one plan leaves it, written over the package's weight store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import VariantRecord
from ryzen_compile.builder.default_pipelines import VariantPipeline, order_and_validate
from ryzen_compile.pipeline.pass_manager import run_passes, satisfied_properties
from ryzen_compile.spec.passes import PassContext

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

    from ryzen_compile.artifacts.package.write import Staging
    from ryzen_compile.builder.config import PlannedVariant
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.builder.target_assignment import TargetGroup
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.passes import Inputs

WEIGHT_STORE_THRESHOLD_BYTES = 4096
"""From this size on a weight lies in the store; smaller ones stay in the graph's file."""


@dataclass(frozen=True, kw_only=True)
class VariantContext:
    """What every variant of a build shares."""

    staging: Staging
    samples: Callable[[SourceGraph], Sequence[Inputs]]
    """Calibration samples of a graph; called only when a pass measures."""
    seed: int
    progress: Progress


def build_variant(context: VariantContext, source: SourceGraph, planned: PlannedVariant) -> VariantRecord:
    """Run its plan on the graph of `source` and write what it leaves; raises PlanError, ModelError."""
    from ryzen_compile.ir.save import save_to_store

    model = source.load()
    facts = registry.properties_of(planned.pipeline.passes)
    plan, moves = order_and_validate(planned.pipeline, satisfied_properties(model, facts))
    for move in moves:
        context.progress.message(f"{source.name}: {move}")
    steps = run_passes(model, plan.passes, _pass_context(context, source, plan, planned.target_groups), facts)
    states = _write_interface(model, source)
    path = layout.graph_path(source.name, plan.variant)
    with context.progress.stage(f"write {path}"):
        place = context.staging.path(path)
        stored = save_to_store(model, place, place.parent / "weights", threshold_bytes=WEIGHT_STORE_THRESHOLD_BYTES)
    weights = [(f"graphs/{weight.path}", weight.sha256) for weight in stored.weights]
    for file, digest in ((path, stored.sha256), *weights):
        context.staging.add(file, sha256=digest)
    return VariantRecord(
        name=plan.variant,
        path=path,
        backend=plan.backend,
        precision=plan.precision,
        portable=plan.portable,
        weights=tuple(file for file, _ in weights),
        passes=steps,
        state_dtypes=states,
    )


def _pass_context(
    context: VariantContext, source: SourceGraph, pipeline: VariantPipeline, target_groups: Sequence[TargetGroup]
) -> PassContext:
    from ryzen_compile.pipeline.range_measurement import measure_ranges

    return PassContext(
        backend=pipeline.backend,
        targets=tuple(target for lot in target_groups for target in lot.targets),
        interface=source.summary.interface,
        samples=context.samples(source) if pipeline.needs_calibration else (),
        measure_ranges=measure_ranges,
        seed=context.seed,
        progress=context.progress,
    )


def _write_interface(model: ir.Model, source: SourceGraph) -> dict[str, str]:
    """Write the source's interface into the variant, with the element types that its inputs and outputs have now.

    Return those of the states that have another, by their names.
    """
    from ryzen_compile.ir.interface_metadata import interface_of, write_interface
    from ryzen_compile.spec.interface import with_dtypes

    found = interface_of(model)
    dtypes = {spec.name: spec.dtype for spec in (*found.inputs, *found.outputs)}
    told = source.summary.interface
    write_interface(model, with_dtypes(told, dtypes))
    return {state.name: now for state in told.states if (now := dtypes[state.input]) != told.input(state.input).dtype}
