"""What a build would do and why, without building."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.builder import sources
from ryzen_compile.builder.config import resolve
from ryzen_compile.pipeline.ordering import order as put_in_order
from ryzen_compile.pipeline.rules import Problem, known, problems
from ryzen_compile.spec.passes import Context
from ryzen_compile.spec.profile import Profile
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.builder.config import Planned, Resolved, Wishes
    from ryzen_compile.builder.sources import Model, Source
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Fact


class FactSeen(Record, frozen=True):
    """A fact of a model, with where it fails."""

    name: str
    holds: bool
    says: str


class PassSeen(Record, frozen=True):
    """A pass of a plan."""

    spelling: str
    estimate: str


class PlanSeen(Record, frozen=True):
    """The plan of one variant."""

    variant: str
    targets: tuple[str, ...]
    passes: tuple[PassSeen, ...]
    notes: tuple[str, ...]
    moves: tuple[str, ...]
    problems: tuple[Problem, ...]


class GraphSeen(Record, frozen=True):
    """One graph."""

    name: str
    source: str
    nodes: int
    profiles: tuple[Profile, ...]
    facts: tuple[FactSeen, ...]
    plans: tuple[PlanSeen, ...]


class RefusedTarget(Record, frozen=True):
    """A target that nobody here builds for."""

    target: str
    reason: str
    hint: str | None


class Explained(Record, frozen=True):
    """A build that was not done."""

    graphs: tuple[GraphSeen, ...]
    refused: tuple[RefusedTarget, ...]


def explain(model: Model | Mapping[str, Model], wishes: Wishes, progress: Progress) -> Explained:
    """Return what `build` would do with these wishes; raises as it does for what cannot be read."""
    order = resolve(sources.named(model), wishes, None, progress)
    return Explained(
        graphs=tuple(_graph(source, order) for source in order.sources),
        refused=tuple(RefusedTarget(target=one.target.name, reason=one.reason, hint=one.hint) for one in order.misfits),
    )


def _graph(source: Source, order: Resolved) -> GraphSeen:
    model = source.load()
    failures = {fact: fact.check(model) for fact in sorted(registry.facts(), key=str)}
    holds = frozenset(fact for fact, failure in failures.items() if failure is None)
    return GraphSeen(
        name=source.name,
        source=source.file,
        nodes=sum(1 for _ in model.graph.all_nodes()),
        profiles=order.profiles[source.name],
        facts=tuple(
            FactSeen(name=fact.name, holds=failure is None, says=failure or fact.says) for fact, failure in failures.items()
        ),
        plans=tuple(_plan(source, model, holds, planned, order.wishes.seed) for planned in order.planned[source.name]),
    )


def _plan(source: Source, model: ir.Model, holds: frozenset[Fact], planned: Planned, seed: int) -> PlanSeen:
    plan = planned.plan
    passes, moves = put_in_order(plan.passes, holds)
    targets = tuple(target for lot in planned.lots for target in lot.targets)
    context = Context(backend=plan.backend, targets=targets, interface=source.known.interface, seed=seed)
    return PlanSeen(
        variant=plan.variant,
        targets=tuple(target.name for target in targets),
        passes=tuple(PassSeen(spelling=str(pass_), estimate=_estimate(pass_, model, context)) for pass_ in passes),
        notes=plan.notes,
        moves=tuple(map(str, moves)),
        problems=tuple(problems(passes, holds, known())),
    )


def _estimate(pass_: Pass, model: ir.Model, context: Context) -> str:
    """Return what a pass is expected to change, on the model as it came in."""
    estimate = pass_.estimate(model, context)
    parts = [
        f"{estimate.nodes:+d} nodes" if estimate.nodes else "",
        f"{estimate.weight_bytes / 1e6:+.1f} MB of weights" if estimate.weight_bytes else "",
        f"{estimate.state_bytes / 1e6:+.1f} MB of states" if estimate.state_bytes else "",
        estimate.why,
    ]
    return ", ".join(part for part in parts if part) or "no change expected"
