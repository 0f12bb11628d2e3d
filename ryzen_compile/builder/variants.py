"""Variants: a graph as one plan leaves it, written over the package's weight store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import Variant
from ryzen_compile.builder.default_pipelines import Plan, settle
from ryzen_compile.pipeline.pass_manager import holding, run
from ryzen_compile.spec.passes import Context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

    from ryzen_compile.artifacts.package.write import Staging
    from ryzen_compile.builder.config import Planned
    from ryzen_compile.builder.sources import Source
    from ryzen_compile.builder.target_assignment import Lot
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.passes import Feed

STORE_BYTES = 4096
"""From this size on a weight lies in the store; smaller ones stay in the graph's file."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every variant of a build shares."""

    staging: Staging
    samples: Callable[[Source], Sequence[Feed]]
    """Calibration samples of a graph; called only when a pass measures."""
    seed: int
    progress: Progress


def make(work: Work, source: Source, planned: Planned) -> Variant:
    """Run its plan on the graph of `source` and write what it leaves; raises PlanError, ModelError."""
    from ryzen_compile.ir.save import save_to_store

    model = source.load()
    facts = registry.facts_of(planned.plan.passes)
    plan, moves = settle(planned.plan, holding(model, facts))
    for move in moves:
        work.progress.say(f"{source.name}: {move}")
    steps = run(model, plan.passes, _context(work, source, plan, planned.lots), facts)
    states = _carry_interface(model, source)
    path = layout.graph_path(source.name, plan.variant)
    with work.progress.stage(f"write {path}"):
        place = work.staging.path(path)
        stored = save_to_store(model, place, place.parent / "weights", threshold_bytes=STORE_BYTES)
    weights = [(f"graphs/{weight.path}", weight.sha256) for weight in stored.weights]
    for file, digest in ((path, stored.sha256), *weights):
        work.staging.add(file, sha256=digest)
    return Variant(
        name=plan.variant,
        path=path,
        backend=plan.backend,
        precision=plan.precision,
        portable=plan.portable,
        weights=tuple(file for file, _ in weights),
        steps=steps,
        states=states,
    )


def _context(work: Work, source: Source, plan: Plan, lots: Sequence[Lot]) -> Context:
    from ryzen_compile.pipeline.range_measurement import observe

    return Context(
        backend=plan.backend,
        targets=tuple(target for lot in lots for target in lot.targets),
        interface=source.known.interface,
        samples=work.samples(source) if plan.calibrates else (),
        observe=observe,
        seed=work.seed,
        progress=work.progress,
    )


def _carry_interface(model: ir.Model, source: Source) -> dict[str, str]:
    """Write the source's interface into the variant, with the element types that its inputs and outputs have now.

    Return those of the states that have another, by their names.
    """
    from ryzen_compile.ir.interface_metadata import attach, interface_of
    from ryzen_compile.spec.interface import retyped

    found = interface_of(model)
    dtypes = {spec.name: spec.dtype for spec in (*found.inputs, *found.outputs)}
    told = source.known.interface
    attach(model, retyped(told, dtypes))
    return {state.name: now for state in told.states if (now := dtypes[state.input]) != told.input(state.input).dtype}
