"""Text reports of packages, KV caches, comparisons, evaluations and build previews."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_compile.artifacts.package.diagnostics import refused_targets
from ryzen_compile.artifacts.package.metric_text import format_value, format_worst
from ryzen_compile.report.diagnostics import format_diagnostics
from ryzen_compile.report.formatting import format_size, format_table
from ryzen_compile.spec.profile import format_profile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ryzen_compile.artifacts.package.manifest import (
        AccuracyRecord,
        EngineRecord,
        Estimate,
        EvaluationRecord,
        GraphRecord,
        LossShare,
        Manifest,
        MetricRecord,
        VariantRecord,
    )
    from ryzen_compile.artifacts.package.read import Package
    from ryzen_compile.backends.api import EngineLayers
    from ryzen_compile.builder.explain import BuildPreview, GraphPreview, PassPreview, PipelinePreview
    from ryzen_compile.numerics.comparison import Comparison
    from ryzen_compile.spec.interface import InputSpec
    from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec
    from ryzen_compile.spec.passes import PassEstimate


MAX_LISTED_METRICS = 30
"""How many metrics that are met are listed. All metrics that are not met are listed, and the record holds every metric."""

_NO_REQUIREMENTS = "informational: nothing was required; --require 'perplexity<=1.02x' makes it a verdict"
_MAX_LISTED_TENSORS, _MAX_LISTED_BRANCHES = 4, 3
"""How many inputs, and outputs, and how many branches that no case ran, the short report of a package lists."""


def format_package(package: Package) -> str:
    """Return the report of a package: graphs with their accuracy, engines with their provenance, and refused targets."""
    manifest = package.manifest
    total_bytes = sum(file.size_bytes for file in manifest.files)
    lines = [
        f"{package.path}  {format_size(total_bytes)}, {len(manifest.files)} files, "
        f"built {manifest.created_at} by {manifest.created_by}"
    ]
    for graph in manifest.graphs:
        lines += ["", *_graph_lines(graph, manifest)]
    if refused := refused_targets(manifest, severity="warning"):
        lines += ["", format_diagnostics(refused)]
    return "\n".join(lines)


def format_package_brief(package: Package, shown: Manifest | None = None, *, with_refusals: bool = True) -> str:
    """Return the short report of a package: the verdict, its graphs, variants and engines on a line each, and what is next.

    Variants and engines that do not meet their criteria or were not compared, and engines with warnings, are reported in full.
    `shown` is the part of the manifest to report; None: all. `with_refusals` adds the targets that were refused.
    """
    manifest = shown or package.manifest
    total_bytes = sum(file.size_bytes for file in manifest.files)
    lines = [f"{_verdict(manifest)}: {package.path}, {format_size(total_bytes)}, built in {manifest.seconds:.1f} s"]
    for graph in manifest.graphs:
        shapes = "; ".join(format_profile(profile, graph.interface) for profile in graph.profiles)
        lines.append(f"graph {graph.name}, from {graph.source_file}: {_format_signature(graph)}")
        lines += [f"  shapes {shapes}"] if shapes else []
        for path in dict.fromkeys(variant.path for variant in graph.variants):
            same_file = [variant for variant in graph.variants if variant.path == path]
            lines += _brief_variant_lines(same_file, [_usage(variant, graph) for variant in same_file])
        for engine in manifest.engines:
            if engine.graph == graph.name:
                lines += _brief_engine_lines(engine, manifest)
    if with_refusals and (refused := refused_targets(manifest, severity="warning")):
        lines += [format_diagnostics(refused)]
    lines.append(f"next: {_next_command(package, manifest.graphs[0])}; bench measures its speed, inspect -v shows all measures")
    return "\n".join(lines)


def _next_command(package: Package, graph: GraphRecord) -> str:
    """Return the command that runs `graph`, or the step graphs that it belongs to: on a prompt if it is a language model."""
    from ryzen_compile.runtime.generation.step_graphs import is_decoder, share_states
    from ryzen_compile.text.tokenizer import ENCODED_INPUTS

    graphs = package.manifest.graphs
    reference = str(package.path) if len(graphs) == 1 or share_states(graphs) else f"{package.path}#{graph.name}"
    if not package.manifest.text_files:
        return f"ryzen-compile run {reference}"
    if is_decoder(graph):
        return f'ryzen-compile generate {reference} "PROMPT"'
    takes_text = {spec.name for spec in graph.interface.inputs} <= ENCODED_INPUTS
    return f"ryzen-compile run {reference}" + (' "TEXT"' if takes_text else "")


def _format_signature(graph: GraphRecord) -> str:
    """Return the inputs and outputs of a graph on one line; of more than `_MAX_LISTED_TENSORS`, their number."""
    sides = [
        ", ".join(map(str, specs)) if len(specs) <= _MAX_LISTED_TENSORS else f"{len(specs)} {name}s"
        for name, specs in (("input", graph.interface.inputs), ("output", graph.interface.outputs))
    ]
    return " -> ".join(sides)


def has_met_variant(manifest: Manifest) -> bool:
    """Return whether a variant was compared and meets its criteria."""
    variants = [variant for graph in manifest.graphs for variant in graph.variants]
    return any(variant.accuracy and all(accuracy.met for accuracy in variant.accuracy) for variant in variants)


def _verdict(manifest: Manifest) -> str:
    variants = [variant for graph in manifest.graphs for variant in graph.variants]
    is_met = [accuracy.met for variant in variants for accuracy in variant.accuracy]
    is_met += [evaluation.met for variant in variants for evaluation in variant.evaluations]
    is_met += [not _is_unmet(engine) for engine in manifest.engines]
    if not all(is_met):
        return "NOT MET"
    if any(variant.not_compared_reason for variant in variants) or not any(variant.accuracy for variant in variants):
        return "NOT COMPARED"
    return "MET, INCOMPLETE" if manifest.refused_targets else "MET"


def _brief_variant_lines(same_file: Sequence[VariantRecord], usages: Sequence[str]) -> list[str]:
    variant = same_file[0]
    is_met = bool(variant.accuracy) and all(accuracy.met for accuracy in variant.accuracy)
    is_remarkable = variant.evaluations or any(accuracy.loss_share is not None for accuracy in variant.accuracy)
    warnings = [f"      warning: {warning}" for record in variant.passes for warning in record.warnings]
    if not is_met or is_remarkable:
        return _variant_lines(same_file, usages)
    names_baselines = len(variant.accuracy) > 1
    comparisons = "; ".join(_brief_accuracy(accuracy, names_baseline=names_baselines) for accuracy in variant.accuracy)
    notes = dict.fromkeys(f"note: {note}" for accuracy in variant.accuracy for note in accuracy.notes)
    not_run = list(dict.fromkeys(line for accuracy in variant.accuracy for line in _not_run_lines(accuracy)))
    lines = [f"      {line}" for line in (*notes, *_shortened(not_run))]
    return [f"  {variant.name}  {variant.path}, {variant.precision}, {', '.join(usages)}: {comparisons}", *lines, *warnings]


def _brief_accuracy(accuracy: AccuracyRecord, *, names_baseline: bool) -> str:
    """Return a comparison that is met on one line: the criteria, the cases and the worst value of each metric."""
    baseline = f" against {accuracy.baseline}" if names_baseline else ""
    text = f"meets {accuracy.criteria} in {_format_case_count(accuracy)}{baseline}"
    return ", ".join(filter(None, (text, format_worst(accuracy.metrics))))


def _is_unmet(engine: EngineRecord) -> bool:
    return any(entry.met is False for entry in engine.provenance)


def _brief_engine_lines(engine: EngineRecord, manifest: Manifest) -> list[str]:
    size_bytes = next(file.size_bytes for file in manifest.files if file.path == engine.path)
    levels = ", ".join(dict.fromkeys(entry.level for entry in engine.provenance))
    targets = ", ".join(map(str, engine.targets))
    line = f"  {engine.path}  {format_size(size_bytes)}, {engine.backend} {engine.backend_version}, for {targets}, {levels}"
    if _is_unmet(engine) or engine.warnings:
        return _engine_lines(engine, manifest)
    return [line]


def format_comparisons(results: Sequence[Comparison], *, brief: bool) -> str:
    """Return the reports of comparisons, with a blank line around those in full.

    With `brief`, a comparison that is met has a short report: the verdict with the worst of each metric.
    """
    text, previous_in_full = "", False
    for result in results:
        in_full = not brief or not result.met
        separator = "\n\n" if in_full or previous_in_full else "\n"
        text += (separator if text else "") + (format_comparison(result) if in_full else _brief_comparison(result))
        previous_in_full = in_full
    return text


def _brief_comparison(result: Comparison) -> str:
    accuracy = result.accuracy
    cases = f"{_format_case_count(accuracy)} in {result.seconds:.1f} s"
    lines = [
        f"MET: {result.candidate} against {result.baseline}",
        f"  {', '.join(filter(None, (cases, format_worst(accuracy.metrics))))}",
    ]
    lines += [f"  note: {note}" for note in accuracy.notes]
    lines += [f"  {line}" for line in _shortened(_not_run_lines(accuracy))]
    lines += [f"  not executed: {skipped}" for skipped in result.not_executed]
    return "\n".join(lines)


def _shortened(not_run: Sequence[str]) -> list[str]:
    """Return the lines of branches that no case ran, at most `_MAX_LISTED_BRANCHES`, and the number of the others."""
    others = len(not_run) - _MAX_LISTED_BRANCHES
    more = [f"and {others} further branches: -v lists them"] if others > 0 else []
    return [*not_run[:_MAX_LISTED_BRANCHES], *more]


def _not_run_lines(accuracy: AccuracyRecord) -> list[str]:
    return [f"not compared: {branch}: no case ran it" for branch in accuracy.not_run]


def format_kv_caches(name: str, spec: KVCacheSpec) -> str:
    """Return a table of the KV caches of a decoder, one row per layer."""
    rows: list[list[str]] = []
    for index, layer in enumerate(spec.layers):
        policy = layer.policy
        retention = "all, and grows" if policy.slots is None else f"{policy.slots} tokens"
        retention += f", chosen by {layer.method}" if layer.method is not None else ""
        rows.append(
            [
                str(index),
                f"{layer.heads} over {layer.kv_heads}" if layer.heads != layer.kv_heads else str(layer.heads),
                _format_cache_tensor(layer.key),
                _format_cache_tensor(layer.value),
                "all before" if layer.window is None else f"{layer.window} tokens",
                retention,
                layer.key.state or "none: the layer has no cache",
            ]
        )
    header = ("layer", "heads", "keys", "values", "attends to", "keeps", "state")
    encoding = {"rope": "rotary", "learned": "learned table", "alibi": "linear biases of the scores (ALiBi)"}.get(
        spec.position_encoding, spec.position_encoding
    )
    limit = f" of {spec.max_positions}" if spec.max_positions is not None else ""
    padding = "padding mask" if spec.padding else "no padding mask"
    return "\n".join(
        [
            f"{name}: {len(spec.layers)} layers, positions: {encoding}{limit}, {padding}",
            format_table(rows, header=header, indent="  "),
        ]
    )


def _format_cache_tensor(tensor: CacheTensorSpec) -> str:
    quantization, storage = tensor.quantization, ""
    if quantization is not None:
        storage = " as fp8" if quantization.storage_type == "fp8" else f" as {quantization.storage_type}-bit codes"
    return f"{tensor.head_size} {tensor.dtype}{storage}"


def format_comparison(result: Comparison) -> str:
    """Return the report of a comparison: what was compared, a table of each metric's worst value, and the verdict."""
    accuracy = result.accuracy
    lines = [
        f"{accuracy.candidate}",
        f"  against {accuracy.baseline}",
        f"  on {accuracy.machine}, {_format_case_count(accuracy)}, {result.seconds:.1f} s",
        f"  criteria {accuracy.criteria}, {result.precision}: {result.tolerances}",
        "",
        *_metric_lines(accuracy.metrics, header=("output", "metric", "worst", "required", "", "case")),
    ]
    lines += [f"FAULT: {fault}" for fault in accuracy.faults]
    lines += [f"note: {note}" for note in accuracy.notes]
    lines += _not_run_lines(accuracy)
    lines += [f"not executed: {skipped}" for skipped in result.not_executed]
    lines.append(f"{'MET' if result.met else 'NOT MET'}: {result.candidate} against {result.baseline}")
    return "\n".join(lines)


def format_evaluation(result: EvaluationRecord) -> str:
    """Return the report of an evaluation: what was evaluated, a table of metrics by system, and the verdict."""
    has_method = any(metric.method for metric in result.results)
    columns = ("baseline", "method", "candidate") if has_method else ("baseline", "candidate")
    titles = {"baseline": "torch", "method": "torch, same method", "candidate": "candidate"}
    header = ("metric", "count", *(titles[column] for column in columns), "required", "")
    rows = [
        (
            f"  {metric.group}" if metric.group else metric.name,
            str(metric.count),
            *(_format_estimate(getattr(metric, column)) for column in columns),
            metric.required or "",
            "" if metric.required is None else "met" if metric.met else "NOT MET",
        )
        for metric in result.results
    ]
    lines = [
        f"{result.candidate}",
        f"  against {result.baseline}",
        f"  same method: {result.method}",
        f"  on {result.machine}, {result.seconds:.1f} s",
        f"  {result.data}; {result.step_mode}",
        "",
        format_table(rows, header=header),
        "",
        *(f"note: {note}" for note in result.notes),
    ]
    unmet = [f"{metric.name} {metric.required}" for metric in result.results if not metric.met]
    verdict = f"NOT MET: {'; '.join(unmet)}" if unmet else "MET" if _has_requirements(result) else _NO_REQUIREMENTS
    return "\n".join([*lines, verdict])


def _has_requirements(result: EvaluationRecord) -> bool:
    return any(metric.required for metric in result.results)


def _format_estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    interval = "" if estimate.low is None or estimate.high is None else f" ({estimate.low:.4g} .. {estimate.high:.4g})"
    return f"{estimate.value:.4g}{interval}"


def _graph_lines(graph: GraphRecord, manifest: Manifest) -> list[str]:
    lines = [f"graph {graph.name}, from {graph.source_file}"]
    lines += [f"  input {spec}, {format_role(spec)}" for spec in graph.interface.inputs]
    lines += [f"  output {spec}" for spec in graph.interface.outputs]
    lines += [f"  shapes {profile}" for profile in graph.profiles]
    for path in dict.fromkeys(variant.path for variant in graph.variants):
        same_file = [variant for variant in graph.variants if variant.path == path]
        lines += ["", *_variant_lines(same_file, [_usage(variant, graph) for variant in same_file])]
    for engine in manifest.engines:
        if engine.graph == graph.name:
            lines += ["", *_engine_lines(engine, manifest)]
    return lines


def format_role(spec: InputSpec) -> str:
    """Return what an input contains, with its range if it is known: `ids 0..30521`, `mask: 0 marks padding`."""
    if spec.padding_value is not None:
        return f"{spec.role}: {spec.padding_value} marks padding"
    if spec.length_dim is not None:
        return f"{spec.role} along `{spec.length_dim}`"
    if spec.role not in ("ids", "values") or spec.low is None or spec.high is None:
        return spec.role
    return f"{spec.role} {spec.low:.6g}..{spec.high:.6g}"


def _usage(variant: VariantRecord, graph: GraphRecord) -> str:
    """Return what a variant is for, and whether it is loaded unless another one is named."""
    usage = "runs on the CPU" if variant.portable else f"for {variant.backend}"
    first, *others = [item for item in graph.variants if item.backend == variant.backend]
    return f"{usage} (default)" if others and variant is first else usage


def _variant_lines(same_file: Sequence[VariantRecord], usages: Sequence[str]) -> list[str]:
    """Return the lines of the variants of one graph file, which have the same passes."""
    variant = same_file[0]
    lines = [f"  {variant.name}  {variant.path}, {variant.precision}, {', '.join(usages)}"]
    lines += [f"      {record.pass_spec}: {record.reason}" for record in variant.passes]
    lines += [f"          {note}" for record in variant.passes for note in record.notes[:5]]
    lines += [f"      warning: {warning}" for record in variant.passes for warning in record.warnings]
    for dtype in sorted({*variant.state_dtypes.values()}):
        lines.append(f"      {list(variant.state_dtypes.values()).count(dtype)} of its states are {dtype}")
    if variant.not_compared_reason:
        lines.append(f"      not compared: {variant.not_compared_reason}")
    for accuracy in variant.accuracy:
        lines += [f"      {line}" for line in _accuracy_lines(accuracy)]
    for evaluation in variant.evaluations:
        lines += [f"      {line}".rstrip() for line in format_evaluation(evaluation).splitlines()]
    return lines


def _accuracy_lines(accuracy: AccuracyRecord) -> Iterator[str]:
    yield f"{'meets' if accuracy.met else 'DOES NOT MEET'} {accuracy.criteria} in {_format_case_count(accuracy)}"
    yield f"    {accuracy.candidate}"
    yield f"    against {accuracy.baseline}, on {accuracy.machine}"
    if accuracy.loss_share is not None:
        yield f"    {_format_loss_share(accuracy.loss_share)}"
    yield from (f"    {line}" for line in _metric_lines(accuracy.metrics))
    yield from (f"    FAULT: {fault}" for fault in accuracy.faults)
    yield from (f"    note: {note}" for note in accuracy.notes)
    yield from (f"    {line}" for line in _not_run_lines(accuracy))


def _format_loss_share(share: LossShare) -> str:
    """Return what a lossy pass costs: `loss by cosine: 0.0012, 0.0031 in total, 31 % of the budget of 0.01`."""
    text = f"loss by {share.metric}: {share.loss:.2g}, {share.total:.2g} in total"
    return f"{text}, {share.total / share.budget:.0%} of the budget of {share.budget:.2g}" if share.budget else text


def _format_case_count(accuracy: AccuracyRecord) -> str:
    return f"{accuracy.cases} case{'' if accuracy.cases == 1 else 's'}"


def _metric_lines(metrics: Sequence[MetricRecord], *, header: Sequence[str] | None = None) -> list[str]:
    """Return one line per metric: all that are not met, and the first MAX_LISTED_METRICS that are."""
    met = [metric for metric in metrics if metric.met]
    listed = met[:MAX_LISTED_METRICS]
    rows = [
        (
            metric.output,
            metric.name,
            format_value(metric),
            metric.required or "informational",
            "" if metric.required is None else "met" if metric.met else "NOT MET",
            metric.case,
        )
        for metric in metrics
        if not metric.met or metric in listed
    ]
    lines = format_table(rows, header=header).splitlines() if rows else []
    unlisted = len(met) - len(listed)
    return lines + ([f"and {unlisted} further metrics, all met: --json lists them"] if unlisted else [])


def _engine_lines(engine: EngineRecord, manifest: Manifest) -> list[str]:
    size_bytes = next(file.size_bytes for file in manifest.files if file.path == engine.path)
    targets = ", ".join(map(str, engine.targets))
    lines = [f"  {engine.path}  {format_size(size_bytes)}, {engine.backend} {engine.backend_version}, {engine.seconds:.1f} s"]
    status = {True: "meets ", False: "DOES NOT MEET ", None: ""}
    provenance = "; ".join(
        f"{entry.level} on {entry.machine}: {status[entry.met]}{entry.message}" for entry in engine.provenance
    )
    lines.append(f"      for {targets}; {provenance}")
    if engine.layers is not None:
        lines += [f"      {line}" for line in layer_lines(engine.layers, engine)]
    return lines + [f"      warning: {warning}" for warning in engine.warnings[:5]]


def layer_lines(layers: EngineLayers, engine: EngineRecord) -> list[str]:
    """Return the fraction of layers by element type and the number of fused attentions, with the source of both."""
    fractions = ", ".join(
        f"{dtype} {layers.dtype_fraction(dtype):.0%}"
        for dtype in sorted(layers.by_type, key=lambda dtype: -layers.by_type[dtype])
    )
    fused = sum(attention.fused for attention in layers.attentions)
    lines = [f"{layers.total} layers according to the {layers.source}: {fractions or 'types unknown'}"]
    if layers.attentions:
        lines.append(f"{fused} of {len(layers.attentions)} attentions fused, for {', '.join(map(str, engine.targets))}")
    return lines + ([layers.limitation] if layers.limitation else [])


def format_build_preview(preview: BuildPreview) -> str:
    """Return the report of a build preview: properties and pipelines of each graph, and unsupported targets."""
    lines: list[str] = []
    for graph in preview.graphs:
        lines += _graph_preview_lines(graph)
    if preview.refused_targets:
        lines += ["", format_diagnostics(preview.refused_targets)]
    return "\n".join(lines)


def _graph_preview_lines(graph: GraphPreview) -> Iterator[str]:
    yield f"graph {graph.name}, {graph.nodes} nodes, from {graph.source}"
    yield from (f"  shapes {profile}" for profile in graph.profiles)
    rows = [("holds" if property_.holds else "fails", property_.name, property_.message) for property_ in graph.properties]
    yield from format_table(rows, indent="  ").splitlines()
    for pipeline in graph.pipelines:
        yield ""
        yield from _pipeline_preview_lines(pipeline)


def _pipeline_preview_lines(pipeline: PipelinePreview) -> Iterator[str]:
    yield f"  {pipeline.variant} for {', '.join(pipeline.targets) or 'the CPU, as the portable variant'}"
    for pass_ in pipeline.passes:
        yield f"    {pass_.pass_spec}: {_format_pass_effect(pass_)}"
    if pipeline.diagnostics:
        yield format_diagnostics(pipeline.diagnostics, indent="    ")


def _format_pass_effect(preview: PassPreview) -> str:
    if preview.estimate is not None:
        return format_pass_estimate(preview.estimate)
    return f"would be refused: {preview.refusal}" if preview.refusal is not None else ""


def format_pass_estimate(estimate: PassEstimate) -> str:
    """Return the expected effect of a pass on one line: nodes, bytes of weights and of states, and the reason."""
    effects = [f"{estimate.nodes:+d} nodes"] if estimate.nodes else []
    for size_bytes, content in ((estimate.weight_bytes, "weights"), (estimate.state_bytes, "states")):
        if size_bytes:
            effects.append(f"{'-' if size_bytes < 0 else '+'}{format_size(abs(size_bytes))} of {content}")
    if not effects:
        no_effect = "no change in nodes or bytes expected"
        return f"{no_effect} ({estimate.reason})" if estimate.reason else no_effect
    return ", ".join([*effects, estimate.reason] if estimate.reason else effects)
