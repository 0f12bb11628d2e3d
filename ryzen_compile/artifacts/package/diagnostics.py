"""Diagnostics of packages: refused targets, missing comparisons and unmet criteria of a manifest as records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ryzen_compile.artifacts.package.manifest import LEFT_OUT
from ryzen_compile.diagnostic import Diagnostic, Severity

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import (
        AccuracyRecord,
        EvaluationRecord,
        Manifest,
        RefusedTarget,
        VariantRecord,
    )

_LEFT_OUT_HINT = "give samples with less padding with --data, or raise `max_left_out` in the file of --criteria"
_RANDOM_VALUES_HINT = (
    "the compared values come from a seed: give real samples with --data, or accept a lower floor: {}{{floor=...}}"
)
_CRITERION_HINT = (
    "find the first node that differs: ryzen-compile compare CANDIDATE --baseline MODEL.onnx --bisect; "
    "or set other limits: --criteria FILE"
)


def package_diagnostics(manifest: Manifest, *, severity: Severity) -> tuple[Diagnostic, ...]:
    """Return everything that the package lacks, with `severity`, then the warnings of its passes and engines.

    `severity` is `error` if the package was requested to be complete, and `warning` if it is merely shown or used.
    """
    return (
        *refused_targets(manifest, severity=severity),
        *missing_comparisons(manifest, severity=severity),
        *unmet_criteria(manifest, severity=severity),
        *branches_not_run(manifest),
        *pass_warnings(manifest),
        *(
            Diagnostic(code="engine-warning", severity="warning", message=message, location=engine.path)
            for engine in manifest.engines
            for message in engine.warnings
        ),
    )


def refused_targets(manifest: Manifest, *, severity: Severity) -> tuple[Diagnostic, ...]:
    """Return one diagnostic for each target and graph without an engine."""
    diagnostics = (
        target_refused(
            str(refused.target),
            refused.backend,
            refused.reason,
            refused.hint,
            severity=severity,
            graph=_refused_graph(refused, manifest),
        )
        for refused in manifest.refused_targets
    )
    return tuple(dict.fromkeys(diagnostics))


def _refused_graph(refused: RefusedTarget, manifest: Manifest) -> str:
    """Return the graph, with the variant if the graph has others for the backend."""
    variants = [variant for variant in manifest.graph(refused.graph).variants if variant.backend == refused.backend]
    return f"{refused.graph}@{refused.variant}" if refused.variant and len(variants) > 1 else refused.graph


def target_refused(
    target: str, backend: str, reason: str, hint: str | None, *, severity: Severity, graph: str | None = None
) -> Diagnostic:
    """Return the diagnostic of a target that `backend` refuses, for `graph` or `graph@variant`, or (None) for all graphs."""
    subject = f"refused by {backend}" if graph is None else f"refused by {backend} for `{graph}`"
    return Diagnostic(
        code="target-refused",
        severity=severity,
        message=f"{subject}: {reason}",
        location=target,
        hint=hint or "leave the target out, or use --allow-partial",
    )


def missing_comparisons(manifest: Manifest, *, severity: Severity) -> tuple[Diagnostic, ...]:
    """Return one diagnostic for each variant that was not compared, with the reason."""
    return tuple(
        Diagnostic(
            code="not-compared",
            severity=severity,
            message=f"the variant could not be compared: {variant.not_compared_reason}",
            location=variant.path,
            hint=variant.not_compared_hint or "use --allow-partial to accept the package without this comparison",
        )
        for graph in manifest.graphs
        for variant in graph.variants
        if variant.not_compared_reason
    )


def unmet_criteria(manifest: Manifest, *, severity: Severity, random_values: bool = False) -> tuple[Diagnostic, ...]:
    """Return one diagnostic for each metric of a variant that does not meet its criterion, and for each fault.

    `random_values`: whether the compared values were drawn from a seed.
    """
    return tuple(
        diagnostic
        for graph in manifest.graphs
        for variant in graph.variants
        for accuracy in variant.accuracy
        for diagnostic in accuracy_diagnostics(
            accuracy,
            variant.path,
            severity=severity,
            passes=accuracy.passes or changing_passes(variant),
            hint=_unmet_hint(variant, accuracy, random_values=random_values),
        )
    )


def _unmet_hint(variant: VariantRecord, accuracy: AccuracyRecord, *, random_values: bool) -> str | None:
    """Return what the compared passes advise if criteria are not met; None if they advise nothing."""
    passes = accuracy.passes or changing_passes(variant)
    hints = [record.unmet_hint for record in variant.passes if record.unmet_hint and record.pass_spec in passes]
    if random_values and accuracy.loss_share is not None and not hints:
        hints = [_RANDOM_VALUES_HINT.format(accuracy.passes[-1].partition("{")[0])]
    return "; ".join(hints) or None


def pass_warnings(manifest: Manifest) -> tuple[Diagnostic, ...]:
    """Return the warnings of the passes that made the variants."""
    return tuple(
        Diagnostic(code="pass-warning", severity="warning", message=f"`{record.pass_spec}`: {message}", location=variant.path)
        for graph in manifest.graphs
        for variant in graph.variants
        for record in variant.passes
        for message in record.warnings
    )


def branches_not_run(manifest: Manifest) -> tuple[Diagnostic, ...]:
    """Return one warning for each branch and loop body of a variant that no case of a comparison ran."""
    diagnostics = (
        branch_not_run(branch, variant.path)
        for graph in manifest.graphs
        for variant in graph.variants
        for accuracy in variant.accuracy
        for branch in accuracy.not_run
    )
    return tuple(dict.fromkeys(diagnostics))


def branch_not_run(branch: str, location: str) -> Diagnostic:
    """Return the warning that `branch` is not compared."""
    return Diagnostic(
        code="branch-not-run",
        severity="warning",
        message=f"the {branch} was not compared: no case ran it",
        location=location,
        hint="give samples or shapes that reach it: --data SAMPLES, --opt-shapes",
    )


def changing_passes(variant: VariantRecord) -> tuple[str, ...]:
    """Return the passes that changed the graph of a variant."""
    return tuple(record.pass_spec for record in variant.passes if record.outcome == "changed")


def accuracy_diagnostics(
    accuracy: AccuracyRecord, location: str, *, severity: Severity, passes: Sequence[str] = (), hint: str | None = None
) -> Iterator[Diagnostic]:
    """Yield the unmet criteria and the faults of one comparison.

    `location` names what was compared, and `passes` made it. `hint` is what they advise.
    """
    after_passes = f" after `{','.join(passes)}`" if passes else ""
    for metric in accuracy.metrics:
        if not metric.met:
            yield Diagnostic(
                code="criterion-not-met",
                severity=severity,
                message=f"does not meet {metric.output} {metric.name} {metric.required}{after_passes}: "
                f"worst value {metric.worst:g} ({metric.case})",
                location=location,
                hint=_LEFT_OUT_HINT if metric.name == LEFT_OUT else hint or _CRITERION_HINT,
            )
    for fault in accuracy.faults:
        yield Diagnostic(
            code="comparison-fault", severity=severity, message=fault, location=location, hint=hint or _CRITERION_HINT
        )


def evaluation_diagnostics(evaluation: EvaluationRecord, *, severity: Severity) -> tuple[Diagnostic, ...]:
    """Return one diagnostic for each metric of an evaluation that does not meet its criterion."""
    return tuple(
        Diagnostic(
            code="criterion-not-met",
            severity=severity,
            message=f"does not meet {metric.name}{f' ({metric.group})' if metric.group else ''} {metric.required}: "
            f"{metric.candidate.value:g}",
            location=evaluation.candidate,
        )
        for metric in evaluation.results
        if not metric.met
    )


def accuracy_warning(manifest: Manifest, path: str) -> Diagnostic | None:
    """Return a warning if the graph or engine at `path` does not meet its criteria; otherwise None.

    For an engine, the comparisons and evaluations of the variant that it was built from also count.
    """
    _, variant = manifest.variant_at(path)
    unmet = [accuracy.criteria for accuracy in variant.accuracy if not accuracy.met]
    unmet += [
        f"{metric.name} {metric.required} against {evaluation.baseline}"
        for evaluation in variant.evaluations
        for metric in evaluation.results
        if not metric.met
    ]
    unmet += [
        provenance.message
        for engine in manifest.engines
        if engine.path == path
        for provenance in engine.provenance
        if provenance.met is False
    ]
    if not unmet:
        return None
    return Diagnostic(
        code="criterion-not-met",
        severity="warning",
        message=f"DOES NOT MEET {', '.join(dict.fromkeys(unmet))}",
        location=path,
        hint="`ryzen-compile inspect` shows the measurements",
    )
