"""Pass manager: run a pipeline on a model and verify the declared properties of each pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import InvalidGraphError, PipelineError, RyzenError
from ryzen_compile.pipeline.model_snapshot import ModelSnapshot
from ryzen_compile.spec.pass_record import PassRecord
from ryzen_compile.spec.passes import Change, Pass, PassContext, Refusal, recorded_spec

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.spec.properties import Property

PassEndCallback = Callable[[PassRecord, "ir.Model"], None]
"""Called after each pass with its record and the model; must not modify the model."""


def satisfied_properties(model: ir.Model, properties: Iterable[Property]) -> frozenset[Property]:
    """Return those of `properties` that hold for `model`."""
    return frozenset(property_ for property_ in properties if property_.check(model) is None)


def run_passes(
    model: ir.Model,
    passes: Sequence[Pass],
    context: PassContext,
    properties: Iterable[Property],
    *,
    on_pass_end: PassEndCallback | None = None,
) -> tuple[PassRecord, ...]:
    """Run `passes` on `model` in place and return the pass log.

    Before each pass, the properties in its `requires` are checked on the model. After it, those in its `ensures` are checked,
    and that it lost no other property than those in its `invalidates`. A pass that changes nothing, or refuses, must leave the
    model unchanged; this is checked on its structure. Raises PipelineError if a pass refuses or does not meet its declaration;
    `model` must not be used afterwards.
    """
    checked = frozenset(properties)
    pass_log: list[PassRecord] = []
    before = satisfied_properties(model, checked)
    for pass_ in passes:
        for property_ in sorted(pass_.requires, key=str):
            if (failure := property_.check(model)) is not None:
                raise PipelineError(
                    f"`{pass_.name}` requires {property_} ({property_.description}): {failure}",
                    hint=f"leave `{pass_.name}` out, or use a model for which {property_} holds",
                    code="property-missing",
                )
        snapshot = ModelSnapshot(model)
        nodes_before, started = _count_nodes(model), time.perf_counter()
        with context.progress.stage(str(pass_)):
            outcome = _apply(pass_, model, context, pass_log, snapshot)
        seconds = time.perf_counter() - started
        if not outcome and (difference := snapshot.difference(model)) is not None:
            raise _defect(pass_, f"it reports no change ({outcome.summary}), but it changed the model: {difference}")
        after = satisfied_properties(model, checked) if outcome else before
        _check_postconditions(pass_, model, outcome, before, after)
        pass_log.append(
            PassRecord(
                pass_spec=recorded_spec(pass_),
                outcome="changed" if outcome else "nothing-to-do",
                reason=outcome.summary,
                fidelity=str(pass_.fidelity),
                nodes_before=nodes_before,
                nodes_after=_count_nodes(model),
                properties_before=tuple(sorted(map(str, before))),
                properties_after=tuple(sorted(map(str, after))),
                inserted=outcome.inserted,
                removed=outcome.removed,
                changed=outcome.changed,
                notes=outcome.notes,
                warnings=outcome.warnings,
                unmet_hint=outcome.unmet_hint,
                seconds=round(seconds, 4),
            )
        )
        if on_pass_end:
            on_pass_end(pass_log[-1], model)
        before = after
    return tuple(pass_log)


def find_invalid_pass(
    error: InvalidGraphError,
    source: ir.Model,
    passes: Sequence[Pass],
    context: PassContext,
    properties: Iterable[Property],
) -> RyzenError:
    """Return the error for passes whose result `error` found to be invalid: it names the first pass that made it so.

    Runs `passes` on `source`, a new copy of the model, again, and returns `error` if every result is valid this time.
    """
    from ryzen_compile.ir.save import check_graph

    def check_result(record: PassRecord, model: ir.Model) -> None:
        try:
            check_graph(model)
        except InvalidGraphError as invalid:
            if invalid.is_contradiction:
                raise PipelineError(
                    f"the shapes or types of the graph contradict each other after `{record.pass_spec}`: {invalid.message}",
                    hint="run the model in ONNX Runtime: if it fails, export it again; if it runs, report the pass",
                    code="contradictory-graph",
                ) from None
            raise _defect(record.pass_spec, f"its result is not valid: {invalid.message}") from None

    try:
        run_passes(source, passes, context, properties, on_pass_end=check_result)
    except PipelineError as defect:
        return defect
    return error


def _apply(
    pass_: Pass, model: ir.Model, context: PassContext, pass_log: Sequence[PassRecord], snapshot: ModelSnapshot
) -> Change:
    already_run = f" (already run: {', '.join(f'`{record.pass_spec}`' for record in pass_log)})" if pass_log else ""
    try:
        outcome = pass_.rewrite(model, context)
    except RyzenError:
        raise
    except Exception as error:
        raise PipelineError(
            f"`{pass_}` failed with {type(error).__name__}: {error}{already_run}",
            hint=f"leave `{pass_.name}` out, and report the model on which it fails",
            code="pass-failed",
        ) from error
    if isinstance(outcome, Refusal) and (difference := snapshot.difference(model)) is not None:
        raise _defect(
            pass_,
            f"it refused the model after changing it ({difference}): {outcome.location}: {outcome.reason}{already_run}",
        )
    if isinstance(outcome, Refusal):
        raise PipelineError.of([refusal_diagnostic(pass_, outcome, suffix=already_run)])
    return outcome


def refusal_diagnostic(pass_: Pass, refusal: Refusal, *, suffix: str = "") -> Diagnostic:
    """Return the refusal of `pass_` as an error at the node or tensor that prevents the rewrite."""
    return Diagnostic(
        code="pass-refused",
        severity="error",
        message=f"`{pass_}` cannot be applied: {refusal.reason}{suffix}",
        location=refusal.location or None,
        hint=refusal.hint or f"leave `{pass_.name}` out",
    )


def _check_postconditions(
    pass_: Pass, model: ir.Model, outcome: Change, before: frozenset[Property], after: frozenset[Property]
) -> None:
    for property_ in sorted(pass_.ensures, key=str):
        if (failure := property_.check(model)) is not None:
            raise _defect(pass_, f"it ensures {property_}, but {failure}")
    lost = sorted(map(str, before - after - pass_.invalidates))
    if lost:
        raise _defect(pass_, f"it invalidated {', '.join(lost)}, which its `invalidates` does not declare")
    if not outcome and not outcome.summary:
        raise _defect(pass_, "it changed nothing and gives no reason", hint="return Change(summary=...)")


def _defect(pass_: Pass | str, message: str, *, hint: str | None = None) -> PipelineError:
    return PipelineError(
        f"defect in pass `{pass_}`: {message}",
        hint=hint or "leave the pass out, and report the defect to its developer",
        code="pass-defect",
    )


def _count_nodes(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())
