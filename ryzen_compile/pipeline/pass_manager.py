"""The runner: runs a plan on a model, and holds each pass to its word."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ryzen_compile.errors import PlanError, RyzenError
from ryzen_compile.spec.pass_record import Step
from ryzen_compile.spec.passes import Change, Context, Pass, Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.spec.properties import Fact

Witness = Callable[[Step, "ir.Model"], None]
"""Called after every step with the model as it is then; must not modify it."""


def holding(model: ir.Model, facts: Iterable[Fact]) -> frozenset[Fact]:
    """Return those of `facts` that hold of `model`."""
    return frozenset(fact for fact in facts if fact.check(model) is None)


def run(
    model: ir.Model, plan: Sequence[Pass], context: Context, facts: Iterable[Fact], *, witness: Witness | None = None
) -> tuple[Step, ...]:
    """Run `plan` on `model` in place and return its journal.

    Before each pass its `requires` are checked on the model, after it its `ensures`, and that no other fact was lost than
    those it `breaks`. Raises PlanError when a pass refuses or did not keep its word; `model` is then of no more use.
    """
    universe = frozenset(facts)
    journal: list[Step] = []
    before = holding(model, universe)
    for pass_ in plan:
        for fact in sorted(pass_.requires, key=str):
            if (failure := fact.check(model)) is not None:
                raise PlanError(
                    f"`{pass_.name}` needs {fact} ({fact.says}): {failure}",
                    hint=f"leave `{pass_.name}` out, or give it a model of which that holds",
                )
        nodes, start = _count(model), time.perf_counter()
        with context.progress.stage(str(pass_)):
            outcome = _rewrite(pass_, model, context, journal)
        seconds = time.perf_counter() - start
        after = holding(model, universe) if outcome else before
        _hold_to_word(pass_, model, outcome, before, after)
        journal.append(
            Step(
                spelling=str(pass_),
                version=pass_.version,
                decision="changed" if outcome else "nothing-to-do",
                because=outcome.says,
                nodes_before=nodes,
                nodes_after=_count(model),
                facts_before=tuple(sorted(map(str, before))),
                facts_after=tuple(sorted(map(str, after))),
                inserted=outcome.inserted,
                removed=outcome.removed,
                changed=outcome.changed,
                notes=outcome.notes,
                seconds=round(seconds, 4),
            )
        )
        if witness:
            witness(journal[-1], model)
        before = after
    return tuple(journal)


def _rewrite(pass_: Pass, model: ir.Model, context: Context, journal: Sequence[Step]) -> Change:
    ran = f" (already run: {', '.join(f'`{step.spelling}`' for step in journal)})" if journal else ""
    try:
        outcome = pass_.rewrite(model, context)
    except RyzenError:
        raise
    except Exception as error:
        raise PlanError(
            f"`{pass_}` failed with {type(error).__name__}: {error}{ran}",
            hint=f"leave `{pass_.name}` out, and report the model that it fails on",
        ) from error
    if isinstance(outcome, Refusal):
        raise PlanError(
            f"`{pass_}` cannot apply: {outcome.where}: {outcome.says}{ran}", hint=outcome.hint or f"leave `{pass_.name}` out"
        )
    return outcome


def _hold_to_word(pass_: Pass, model: ir.Model, outcome: Change, before: frozenset[Fact], after: frozenset[Fact]) -> None:
    for fact in sorted(pass_.ensures, key=str):
        if (failure := fact.check(model)) is not None:
            raise PlanError(
                f"pass developer: `{pass_}` ensures {fact}, but {failure}", hint=f"leave `{pass_.name}` out, and report it"
            )
    lost = sorted(map(str, before - after - pass_.breaks))
    if lost:
        raise PlanError(
            f"pass developer: `{pass_}` broke {', '.join(lost)} without saying so",
            hint=f"leave `{pass_.name}` out, and report it",
        )
    if not outcome and not outcome.says:
        raise PlanError(f"pass developer: `{pass_}` did nothing and does not say why", hint="return Change(says=...)")


def _count(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())
