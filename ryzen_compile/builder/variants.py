"""Variants: a graph rewritten by one pipeline, stored with the package's shared weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile import registry
from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import VariantRecord
from ryzen_compile.builder.accuracy import AccuracyCheck, AccuracyPolicy, Checkpoints
from ryzen_compile.builder.default_pipelines import VariantPipeline, order_and_validate
from ryzen_compile.errors import PipelineError
from ryzen_compile.pipeline.pass_manager import run_passes, satisfied_properties
from ryzen_compile.spec.passes import PassContext

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

    from ryzen_compile.artifacts.package.write import Staging
    from ryzen_compile.builder.config import PlannedVariant
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.builder.target_assignment import TargetGroup
    from ryzen_compile.ir.save import StoredGraph
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.passes import Inputs

WEIGHT_STORE_THRESHOLD_BYTES = 4096
"""Weights of at least this size are files of the weight store; smaller ones are stored in the graph's file."""


@dataclass(frozen=True, kw_only=True)
class VariantContext:
    """What all variants of a build share."""

    staging: Staging
    samples: Callable[[SourceGraph], Sequence[Inputs]]
    """Return the calibration samples of a graph; called only if a pass needs calibration."""
    checkpoint_dir: Path | None
    """Temporary folder for the states of a graph between its passes; it exists until the variants are compared. None: the
    variants are not compared."""
    accuracy_policy: AccuracyPolicy
    seed: int
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class BuiltVariant:
    """A variant that was written, and the comparisons that check it."""

    record: VariantRecord
    sha256: str
    """The digest of the graph's file."""
    requests: tuple[int, ...]
    """As in PlannedVariant."""
    checks: tuple[AccuracyCheck, ...]
    """Empty if the variants are not compared."""


def build_variant(
    context: VariantContext, source: SourceGraph, planned: PlannedVariant, earlier: Sequence[BuiltVariant]
) -> BuiltVariant:
    """Run the pipeline of `planned` on the graph of `source`, write the result and return its record.

    `earlier` has the variants of the graph that were built before. Raises PipelineError if the pipeline cannot run or is, once
    ordered, that of an earlier variant for the same backend, and ModelError if the source cannot be read.
    """
    model = source.load()
    properties = registry.properties_of(planned.pipeline.passes)
    pipeline, moves = order_and_validate(planned.pipeline, satisfied_properties(model, properties))
    same_name = [variant for variant in earlier if variant.record.name == pipeline.id]
    if any(variant.record.backend == pipeline.backend for variant in same_name):
        raise PipelineError(
            f"{source.name}: two pipelines are `{','.join(map(str, pipeline.passes))}` once their passes are ordered",
            hint="leave one of them out",
        )
    for move in moves:
        context.progress.message(f"{source.name}: {move}")
    checkpoints = None
    if context.checkpoint_dir is not None:
        folder = context.checkpoint_dir / f"{source.name}.{pipeline.id}@{pipeline.backend}"
        checkpoints = Checkpoints(pipeline.passes, Path(source.path), folder, context.accuracy_policy)
    pass_context = _pass_context(context, source, pipeline, planned.target_groups)
    on_pass_end = checkpoints.on_pass_end if checkpoints is not None else None
    pass_log = run_passes(model, pipeline.passes, pass_context, properties, on_pass_end=on_pass_end)
    state_dtypes = _write_interface(model, source)
    path, stored = _write_graph(context, model, source.name, pipeline, same_name)
    weights = [(f"graphs/{weight.path}", weight.sha256) for weight in stored.weights]
    for name, sha256 in ((path, stored.sha256), *weights):
        context.staging.add(name, sha256=sha256)
    record = VariantRecord(
        name=pipeline.id,
        path=path,
        backend=pipeline.backend,
        precision=pipeline.precision,
        portable=pipeline.portable,
        weights=tuple(name for name, _ in weights),
        passes=pass_log,
        state_dtypes=state_dtypes,
    )
    checks = checkpoints.checks(context.staging.path(path)) if checkpoints is not None else ()
    return BuiltVariant(record=record, sha256=stored.sha256, requests=planned.requests, checks=checks)


def _write_graph(
    context: VariantContext, model: ir.Model, graph: str, pipeline: VariantPipeline, same_name: Sequence[BuiltVariant]
) -> tuple[str, StoredGraph]:
    """Write `model` and return its path in the package: that of an equal graph in `same_name`, else a new one.

    `same_name` has the variants of the same name for other backends. The path contains the backend only if they exist and
    differ.
    """
    from ryzen_compile.ir.save import save_to_store

    path, path_with_backend = layout.graph_path(graph, pipeline.id), layout.graph_path(graph, pipeline.id, pipeline.backend)
    with context.progress.stage(f"write {path}"):
        file = context.staging.path(path_with_backend)
        stored = save_to_store(model, file, file.parent / "weights", threshold_bytes=WEIGHT_STORE_THRESHOLD_BYTES)
        equal = next((variant.record.path for variant in same_name if variant.sha256 == stored.sha256), None)
        if equal is not None:
            file.unlink()
            return equal, stored
        if same_name:
            return path_with_backend, stored
        file.rename(context.staging.path(path))
        return path, stored


def with_portable_forms(built: Sequence[BuiltVariant]) -> tuple[BuiltVariant, ...]:
    """Return the variants of one graph with the name of the portable variant of the same request in their records."""
    names = {request: variant.record.name for variant in built if variant.record.portable for request in variant.requests}
    return tuple(
        variant
        if variant.record.portable
        else replace(variant, record=msgspec.structs.replace(variant.record, portable_form=names[variant.requests[0]]))
        for variant in built
    )


def _pass_context(
    context: VariantContext, source: SourceGraph, pipeline: VariantPipeline, target_groups: Sequence[TargetGroup]
) -> PassContext:
    from ryzen_compile.pipeline.range_measurement import measure_ranges

    return PassContext(
        backend=pipeline.backend,
        targets=tuple(target for group in target_groups for target in group.targets),
        interface=source.summary.interface,
        samples=context.samples(source) if pipeline.needs_calibration else (),
        measure_ranges=measure_ranges,
        seed=context.seed,
        progress=context.progress,
    )


def _write_interface(model: ir.Model, source: SourceGraph) -> dict[str, str]:
    """Write the source's interface to the variant, with the element types of the variant's inputs and outputs.

    Return the element types of the states whose type differs from the source, by state name.
    """
    from ryzen_compile.ir.interface_metadata import interface_of, write_interface
    from ryzen_compile.spec.interface import with_dtypes

    rewritten = interface_of(model)
    dtypes = {spec.name: spec.dtype for spec in (*rewritten.inputs, *rewritten.outputs)}
    original = source.summary.interface
    write_interface(model, with_dtypes(original, dtypes))
    return {
        state.name: dtype for state in original.states if (dtype := dtypes[state.input]) != original.input(state.input).dtype
    }
