"""The runner: runs a plan on a model, and holds each pass to its word."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ryzen_compile.errors import PipelineError, RyzenError
from ryzen_compile.spec.pass_record import PassRecord
from ryzen_compile.spec.passes import Change, Pass, PassContext, Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.spec.properties import Property

PassEndCallback = Callable[[PassRecord, "ir.Model"], None]
"""Called after every step with the model as it is then; must not modify it."""


def satisfied_properties(model: ir.Model, properties: Iterable[Property]) -> frozenset[Property]:
    """Return those of `facts` that hold of `model`."""
    return frozenset(fact for fact in properties if fact.check(model) is None)


def run_passes(
    model: ir.Model,
    passes: Sequence[Pass],
    context: PassContext,
    properties: Iterable[Property],
    *,
    on_pass_end: PassEndCallback | None = None,
) -> tuple[PassRecord, ...]:
    """Run `plan` on `model` in place and return its journal.

    Before each pass its `requires` are checked on the model, after it its `ensures`, and that no other fact was lost than
    those it `breaks`. Raises PlanError when a pass refuses or did not keep its word; `model` is then of no more use.
    """
    universe = frozenset(properties)
    journal: list[PassRecord] = []
    before = satisfied_properties(model, universe)
    for pass_ in passes:
        for fact in sorted(pass_.requires, key=str):
            if (failure := fact.check(model)) is not None:
                raise PipelineError(
                    f"`{pass_.name}` needs {fact} ({fact.description}): {failure}",
                    hint=f"leave `{pass_.name}` out, or give it a model of which that holds",
                )
        nodes, start = _count_nodes(model), time.perf_counter()
        with context.progress.stage(str(pass_)):
            outcome = _apply(pass_, model, context, journal)
        seconds = time.perf_counter() - start
        after = satisfied_properties(model, universe) if outcome else before
        _check_postconditions(pass_, model, outcome, before, after)
        journal.append(
            PassRecord(
                pass_spec=str(pass_),
                version=pass_.version,
                outcome="changed" if outcome else "nothing-to-do",
                reason=outcome.summary,
                nodes_before=nodes,
                nodes_after=_count_nodes(model),
                properties_before=tuple(sorted(map(str, before))),
                properties_after=tuple(sorted(map(str, after))),
                inserted=outcome.inserted,
                removed=outcome.removed,
                changed=outcome.changed,
                notes=outcome.notes,
                seconds=round(seconds, 4),
            )
        )
        if on_pass_end:
            on_pass_end(journal[-1], model)
        before = after
    return tuple(journal)


def _apply(pass_: Pass, model: ir.Model, context: PassContext, pass_log: Sequence[PassRecord]) -> Change:
    ran = f" (already run: {', '.join(f'`{step.pass_spec}`' for step in pass_log)})" if pass_log else ""
    try:
        outcome = pass_.rewrite(model, context)
    except RyzenError:
        raise
    except Exception as error:
        raise PipelineError(
            f"`{pass_}` failed with {type(error).__name__}: {error}{ran}",
            hint=f"leave `{pass_.name}` out, and report the model that it fails on",
        ) from error
    if isinstance(outcome, Refusal):
        raise PipelineError(
            f"`{pass_}` cannot apply: {outcome.location}: {outcome.reason}{ran}",
            hint=outcome.hint or f"leave `{pass_.name}` out",
        )
    return outcome


def _check_postconditions(
    pass_: Pass, model: ir.Model, outcome: Change, before: frozenset[Property], after: frozenset[Property]
) -> None:
    for fact in sorted(pass_.ensures, key=str):
        if (failure := fact.check(model)) is not None:
            raise PipelineError(
                f"pass developer: `{pass_}` ensures {fact}, but {failure}", hint=f"leave `{pass_.name}` out, and report it"
            )
    lost = sorted(map(str, before - after - pass_.invalidates))
    if lost:
        raise PipelineError(
            f"pass developer: `{pass_}` broke {', '.join(lost)} without saying so",
            hint=f"leave `{pass_.name}` out, and report it",
        )
    if not outcome and not outcome.summary:
        raise PipelineError(f"pass developer: `{pass_}` did nothing and does not say why", hint="return Change(says=...)")


def _count_nodes(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())
