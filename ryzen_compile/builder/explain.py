"""Preview of a build: what it would do and why, without building."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.artifacts.package.diagnostics import target_refused
from ryzen_compile.builder import sources
from ryzen_compile.builder.resolve import resolve
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.pipeline.ordering import order_passes
from ryzen_compile.pipeline.pass_manager import refusal_diagnostic
from ryzen_compile.pipeline.pipeline_id import pipeline_id
from ryzen_compile.pipeline.rules import find_problems, load_rules
from ryzen_compile.spec.passes import PassContext, PassEstimate, Refusal
from ryzen_compile.spec.profile import Profile
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.builder.config import BuildConfig
    from ryzen_compile.builder.resolve import PlannedVariant, ResolvedBuild
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Property
    from ryzen_compile.utils.files import StrPath


class PropertyPreview(Record, frozen=True):
    """A property of a model: whether it holds and, if not, where it fails."""

    name: str
    holds: bool
    message: str


class PassPreview(Record, frozen=True):
    """A pass of a pipeline, with its expected effect."""

    pass_spec: str
    estimate: PassEstimate | None
    """The expected effect on the source model; None if the pass would refuse it."""
    refusal: Diagnostic | None
    """Why the pass would refuse the source model, as a warning: an earlier pass may change that; None if it would not."""


class PipelinePreview(Record, frozen=True):
    """The pipeline of one variant."""

    variant: str
    """The name of the variant: the id of the pipeline."""
    targets: tuple[str, ...]
    passes: tuple[PassPreview, ...]
    diagnostics: tuple[Diagnostic, ...]
    """Passes that were left out, added or moved, and every reason why the pipeline cannot run."""


class GraphPreview(Record, frozen=True):
    """One graph of the build."""

    name: str
    source: str
    nodes: int
    profiles: tuple[Profile, ...]
    properties: tuple[PropertyPreview, ...]
    pipelines: tuple[PipelinePreview, ...]


class BuildPreview(Record, frozen=True):
    """The preview of a build."""

    graphs: tuple[GraphPreview, ...]
    refused_targets: tuple[Diagnostic, ...]
    """The targets that no backend on this machine builds for."""

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Everything that the preview found, in the order of its report."""
        pipelines = [pipeline for graph in self.graphs for pipeline in graph.pipelines]
        refusals = (pass_.refusal for pipeline in pipelines for pass_ in pipeline.passes if pass_.refusal is not None)
        reported = (diagnostic for pipeline in pipelines for diagnostic in pipeline.diagnostics)
        return (*refusals, *reported, *self.refused_targets)


def explain(model: StrPath | Mapping[str, StrPath], config: BuildConfig, progress: Progress) -> BuildPreview:
    """Return what `build` would do with this configuration; raises as `build` does if a source or a setting is invalid."""
    build = resolve(sources.graph_files(model), config, None, progress)
    return BuildPreview(
        graphs=tuple(_preview_graph(source, build) for source in build.sources),
        refused_targets=tuple(
            target_refused(unsupported.target.name, unsupported.backend, unsupported.reason, unsupported.hint, severity="error")
            for unsupported in build.unsupported_targets
        ),
    )


def _preview_graph(source: SourceGraph, build: ResolvedBuild) -> GraphPreview:
    model = source.load()
    failures = {property_: property_.check(model) for property_ in sorted(registry.properties(), key=str)}
    satisfied = frozenset(property_ for property_, failure in failures.items() if failure is None)
    return GraphPreview(
        name=source.name,
        source=source.file_name,
        nodes=sum(1 for _ in model.graph.all_nodes()),
        profiles=build.profiles[source.name],
        properties=tuple(
            PropertyPreview(name=property_.name, holds=failure is None, message=failure or property_.description)
            for property_, failure in failures.items()
        ),
        pipelines=tuple(
            _preview_pipeline(source, model, satisfied, planned, build.config.seed)
            for planned in build.planned_variants[source.name]
        ),
    )


def _preview_pipeline(
    source: SourceGraph, model: ir.Model, properties: frozenset[Property], planned: PlannedVariant, seed: int
) -> PipelinePreview:
    pipeline = planned.pipeline
    passes, moves = order_passes(pipeline.passes, properties)
    targets = tuple(target for group in planned.target_groups for target in group.targets)
    context = PassContext(backend=pipeline.backend, targets=targets, interface=source.summary.interface, seed=seed)
    return PipelinePreview(
        variant=pipeline_id(passes),
        targets=tuple(target.name for target in targets),
        passes=tuple(_preview_pass(pass_, model, context) for pass_ in passes),
        diagnostics=(
            *pipeline.diagnostics,
            *(move.diagnostic() for move in moves),
            *find_problems(passes, properties, load_rules()),
        ),
    )


def _preview_pass(pass_: Pass, model: ir.Model, context: PassContext) -> PassPreview:
    outcome = pass_.estimate(model, context)
    if isinstance(outcome, Refusal):
        refusal = dataclasses.replace(refusal_diagnostic(pass_, outcome), severity="warning")
        return PassPreview(pass_spec=str(pass_), estimate=None, refusal=refusal)
    return PassPreview(pass_spec=str(pass_), estimate=outcome, refusal=None)
