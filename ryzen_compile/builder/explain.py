"""What a build would do and why, without building."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.builder import sources
from ryzen_compile.builder.config import resolve
from ryzen_compile.pipeline.ordering import order_passes as put_in_order
from ryzen_compile.pipeline.rules import Problem, find_problems, load_rules
from ryzen_compile.spec.passes import PassContext
from ryzen_compile.spec.profile import Profile
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.builder.config import BuildConfig, PlannedVariant, ResolvedBuild
    from ryzen_compile.builder.sources import Model, SourceGraph
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Property


class PropertyPreview(Record, frozen=True):
    """A fact of a model, with where it fails."""

    name: str
    holds: bool
    message: str


class PassPreview(Record, frozen=True):
    """A pass of a plan."""

    pass_spec: str
    estimate: str


class PipelinePreview(Record, frozen=True):
    """The plan of one variant."""

    variant: str
    targets: tuple[str, ...]
    passes: tuple[PassPreview, ...]
    notes: tuple[str, ...]
    moves: tuple[str, ...]
    problems: tuple[Problem, ...]


class GraphPreview(Record, frozen=True):
    """One graph."""

    name: str
    source: str
    nodes: int
    profiles: tuple[Profile, ...]
    properties: tuple[PropertyPreview, ...]
    pipelines: tuple[PipelinePreview, ...]


class UnsupportedTargetPreview(Record, frozen=True):
    """A target that nobody here builds for."""

    target: str
    reason: str
    hint: str | None


class BuildPreview(Record, frozen=True):
    """A build that was not done."""

    graphs: tuple[GraphPreview, ...]
    unsupported_targets: tuple[UnsupportedTargetPreview, ...]


def explain(model: Model | Mapping[str, Model], config: BuildConfig, progress: Progress) -> BuildPreview:
    """Return what `build` would do with these wishes; raises as it does for what cannot be read."""
    order = resolve(sources.graph_files(model), config, None, progress)
    return BuildPreview(
        graphs=tuple(_preview_graph(source, order) for source in order.sources),
        unsupported_targets=tuple(
            UnsupportedTargetPreview(target=one.target.name, reason=one.reason, hint=one.hint)
            for one in order.unsupported_targets
        ),
    )


def _preview_graph(source: SourceGraph, build: ResolvedBuild) -> GraphPreview:
    model = source.load()
    failures = {fact: fact.check(model) for fact in sorted(registry.properties(), key=str)}
    holds = frozenset(fact for fact, failure in failures.items() if failure is None)
    return GraphPreview(
        name=source.name,
        source=source.file_name,
        nodes=sum(1 for _ in model.graph.all_nodes()),
        profiles=build.profiles[source.name],
        properties=tuple(
            PropertyPreview(name=fact.name, holds=failure is None, message=failure or fact.description)
            for fact, failure in failures.items()
        ),
        pipelines=tuple(
            _preview_pipeline(source, model, holds, planned, build.config.seed)
            for planned in build.planned_variants[source.name]
        ),
    )


def _preview_pipeline(
    source: SourceGraph, model: ir.Model, properties: frozenset[Property], planned: PlannedVariant, seed: int
) -> PipelinePreview:
    plan = planned.pipeline
    passes, moves = put_in_order(plan.passes, properties)
    targets = tuple(target for lot in planned.target_groups for target in lot.targets)
    context = PassContext(backend=plan.backend, targets=targets, interface=source.summary.interface, seed=seed)
    return PipelinePreview(
        variant=plan.variant,
        targets=tuple(target.name for target in targets),
        passes=tuple(
            PassPreview(pass_spec=str(pass_), estimate=_format_pass_estimate(pass_, model, context)) for pass_ in passes
        ),
        notes=plan.notes,
        moves=tuple(map(str, moves)),
        problems=tuple(find_problems(passes, properties, load_rules())),
    )


def _format_pass_estimate(pass_: Pass, model: ir.Model, context: PassContext) -> str:
    """Return what a pass is expected to change, on the model as it came in."""
    estimate = pass_.estimate(model, context)
    parts = [
        f"{estimate.nodes:+d} nodes" if estimate.nodes else "",
        f"{estimate.weight_bytes / 1e6:+.1f} MB of weights" if estimate.weight_bytes else "",
        f"{estimate.state_bytes / 1e6:+.1f} MB of states" if estimate.state_bytes else "",
        estimate.reason,
    ]
    return ", ".join(part for part in parts if part) or "no change expected"
