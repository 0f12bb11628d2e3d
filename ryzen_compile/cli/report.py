"""What a package holds and what it is worth, and how a comparison ended, as people read it; `--json` prints the records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_compile.cli.console import format_size, format_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ryzen_compile.artifacts.package.manifest import (
        AccuracyRecord,
        EngineRecord,
        Estimate,
        EvaluationRecord,
        GraphRecord,
        Manifest,
        MetricRecord,
        VariantRecord,
    )
    from ryzen_compile.artifacts.package.read import Package
    from ryzen_compile.backends.api import EngineLayers
    from ryzen_compile.numerics.comparison import Comparison
    from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec


MAX_LISTED_METRICS = 30
"""How many measures that are met are listed; those that are not met are all listed, and the record holds every one."""


def format_package(package: Package) -> str:
    """Return the report of a package: its graphs with their accuracy, its engines with their evidence, its refusals."""
    manifest = package.manifest
    total = sum(file.size_bytes for file in manifest.files)
    lines = [
        f"{package.path}  {format_size(total)}, {len(manifest.files)} files, made {manifest.created_at} by {manifest.created_by}"
    ]
    for graph in manifest.graphs:
        lines += ["", *_graph_lines(graph, manifest)]
    if manifest.refused_targets:
        lines += ["", "refused"]
        for one in manifest.refused_targets:
            lines.append(f"  {one.target} ({one.graph}, {one.backend}): {one.reason}")
            if one.hint:
                lines.append(f"      hint: {one.hint}")
    return "\n".join(lines)


def format_kv_caches(name: str, spec: KVCacheSpec) -> str:
    """Return what a decoder keeps: a line for each layer."""
    rows: list[list[str]] = []
    for at, layer in enumerate(spec.layers):
        keeps = "all, and grows" if layer.slots is None else f"{layer.slots} tokens"
        keeps += f", chosen by {layer.method}" if layer.method != "all" else ""
        rows.append(
            [
                str(at),
                f"{layer.heads} over {layer.kv_heads}" if layer.heads != layer.kv_heads else str(layer.heads),
                _format_cache_tensor(layer.key),
                _format_cache_tensor(layer.value),
                "all before" if layer.window is None else f"{layer.window} tokens",
                keeps,
                layer.key.state or "none: it has no cache",
            ]
        )
    header = ("layer", "heads", "keys", "values", "sees", "keeps", "state")
    how = {"rope": "rotary", "learned": "a table", "alibi": "a slope of the scores (ALiBi)"}.get(
        spec.position_encoding, spec.position_encoding
    )
    longest = f" of {spec.max_positions}" if spec.max_positions is not None else ""
    padding = "a mask hides padding" if spec.padding else "no mask"
    return "\n".join(
        [
            f"{name}: {len(spec.layers)} layers, positions: {how}{longest}, {padding}",
            format_table(rows, header=header, indent="  "),
        ]
    )


def _format_cache_tensor(tensor: CacheTensorSpec) -> str:
    codes = {None: "", "fp8": " as fp8"}.get(tensor.storage_type, f" as codes of {tensor.storage_type} bits")
    return f"{tensor.head_size} {tensor.dtype}{codes}"


def format_comparison(result: Comparison) -> str:
    """Return what was compared, a table of every measure at its worst, and the verdict."""
    accuracy = result.accuracy
    lines = [
        f"{accuracy.candidate}",
        f"  against {accuracy.baseline}",
        f"  on {accuracy.machine}, {_format_case_count(accuracy)}, {result.seconds:.1f} s",
        f"  held to {accuracy.criteria}, {result.precision}: {result.tolerances}",
        "",
        *_metric_lines(accuracy.metrics, header=("output", "measure", "worst", "required", "", "where")),
    ]
    lines += [f"FAULT: {fault}" for fault in accuracy.faults]
    lines += [f"note: {note}" for note in accuracy.notes]
    lines += [f"not executed: {one}" for one in result.not_executed]
    lines.append(f"{'MET' if result.met else 'NOT MET'}: {result.candidate} against {result.baseline}")
    return "\n".join(lines)


def format_evaluation(result: EvaluationRecord) -> str:
    """Return what was evaluated, a table of every measure by column, and the verdict."""
    columns = ("baseline", "method", "candidate") if any(one.method for one in result.results) else ("baseline", "candidate")
    words = {"baseline": "torch", "method": "torch, same method", "candidate": "candidate"}
    header = ("measure", "of", *(words[column] for column in columns), "required", "")
    rows = [
        (
            f"  {one.group}" if one.group else one.name,
            str(one.count),
            *(_format_estimate(getattr(one, column)) for column in columns),
            one.required or "",
            "" if one.required is None else "met" if one.met else "NOT MET",
        )
        for one in result.results
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
    missed = [f"{one.name} {one.required}" for one in result.results if not one.met]
    return "\n".join(
        [*lines, f"NOT MET: {'; '.join(missed)}" if missed else "MET" if _has_requirements(result) else "told only"]
    )


def _has_requirements(result: EvaluationRecord) -> bool:
    return any(one.required for one in result.results)


def _format_estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    within = "" if estimate.low is None or estimate.high is None else f" ({estimate.low:.4g} .. {estimate.high:.4g})"
    return f"{estimate.value:.4g}{within}"


def accuracy_warning(manifest: Manifest, path: str) -> str | None:
    """Return one line where a comparison of the graph or engine at `path`, or of the graph it was built from, was not met."""
    of = {engine.path: (engine.graph, engine.variant) for engine in manifest.engines}.get(path)
    held_to = [
        accuracy.criteria
        for graph in manifest.graphs
        for variant in graph.variants
        if variant.path == path or (graph.name, variant.name) == of
        for accuracy in variant.accuracy
        if not accuracy.met
    ]
    held_to += [
        evidence.message.removeprefix("MISSES ")
        for engine in manifest.engines
        if engine.path == path
        for evidence in engine.provenance
        if evidence.message.startswith("MISSES ")
    ]
    if not held_to:
        return None
    return f"warning: {path} DOES NOT MEET {', '.join(dict.fromkeys(held_to))}: `ryzen-compile inspect` shows the measures"


def _graph_lines(graph: GraphRecord, manifest: Manifest) -> list[str]:
    lines = [f"graph {graph.name}, from {graph.source_file}"]
    lines += [f"  takes {spec}" for spec in graph.interface.inputs]
    lines += [f"  gives {spec}" for spec in graph.interface.outputs]
    lines += [f"  shapes {profile}" for profile in graph.profiles]
    for variant in graph.variants:
        lines += ["", *_variant_lines(variant)]
    for engine in manifest.engines:
        if engine.graph == graph.name:
            lines += ["", *_engine_lines(engine, manifest)]
    return lines


def _variant_lines(variant: VariantRecord) -> list[str]:
    serves = "serves the CPU" if variant.portable else "for engines only"
    lines = [f"  {variant.path}  {variant.precision}, {serves}"]
    lines += [f"      {step.pass_spec}: {step.reason}" for step in variant.passes]
    lines += [f"          {note}" for step in variant.passes for note in step.notes[:5]]
    for dtype in sorted({*variant.state_dtypes.values()}):
        lines.append(f"      {list(variant.state_dtypes.values()).count(dtype)} of its states are {dtype}")
    if variant.not_compared_reason:
        lines.append(f"      not compared: {variant.not_compared_reason}")
    for accuracy in variant.accuracy:
        lines += [f"      {line}" for line in _accuracy_lines(accuracy)]
    for one in variant.evaluations:
        lines += [f"      {line}".rstrip() for line in format_evaluation(one).splitlines()]
    return lines


def _accuracy_lines(accuracy: AccuracyRecord) -> Iterator[str]:
    yield f"{'meets' if accuracy.met else 'DOES NOT MEET'} {accuracy.criteria} in {_format_case_count(accuracy)}"
    yield f"    {accuracy.candidate}"
    yield f"    against {accuracy.baseline}, on {accuracy.machine}"
    yield from (f"    {line}" for line in _metric_lines(accuracy.metrics))
    yield from (f"    FAULT: {fault}" for fault in accuracy.faults)
    yield from (f"    note: {note}" for note in accuracy.notes)


def _format_case_count(accuracy: AccuracyRecord) -> str:
    return f"{accuracy.cases} case{'' if accuracy.cases == 1 else 's'}"


def _metric_lines(metrics: Sequence[MetricRecord], *, header: Sequence[str] | None = None) -> list[str]:
    """Return a line a measure: those that are not met, and the first of those that are."""
    met = [metric for metric in metrics if metric.met]
    listed = met[:MAX_LISTED_METRICS]
    rows = [
        (
            metric.output,
            metric.name,
            f"{metric.worst:.7g}" if "cosine" in metric.name else f"{metric.worst:.3g}",
            metric.required or "told only",
            "" if metric.required is None else "met" if metric.met else "NOT MET",
            metric.case,
        )
        for metric in metrics
        if not metric.met or metric in listed
    ]
    lines = format_table(rows, header=header).splitlines() if rows else []
    more = len(met) - len(listed)
    return lines + ([f"and {more} further measures, all met: --json lists them"] if more else [])


def _engine_lines(engine: EngineRecord, manifest: Manifest) -> list[str]:
    bytes_ = next(file.size_bytes for file in manifest.files if file.path == engine.path)
    targets = ", ".join(map(str, engine.targets))
    lines = [f"  {engine.path}  {format_size(bytes_)}, {engine.backend} {engine.backend_version}, {engine.seconds:.1f} s"]
    lines.append(
        f"      for {targets}; " + "; ".join(f"{one.level} on {one.machine}: {one.message}" for one in engine.provenance)
    )
    if engine.layers is not None:
        lines += [f"      {line}" for line in layer_lines(engine.layers, engine)]
    return lines + [f"      warning: {warning}" for warning in engine.warnings[:5]]


def layer_lines(layers: EngineLayers, engine: EngineRecord) -> list[str]:
    """Return the share of layers by type and the attentions that fused, and who says so."""
    share = ", ".join(
        f"{kind} {layers.dtype_fraction(kind):.0%}" for kind in sorted(layers.by_type, key=lambda kind: -layers.by_type[kind])
    )
    fused = sum(attention.fused for attention in layers.attentions)
    lines = [f"{layers.total} layers by the {layers.source}: {share or 'types unknown'}"]
    if layers.attentions:
        lines.append(f"{fused} of {len(layers.attentions)} attentions fused, for {', '.join(map(str, engine.targets))}")
    return lines + ([layers.limitation] if layers.limitation else [])
