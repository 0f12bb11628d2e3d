"""What a package holds and what it is worth, and how a comparison ended, as people read it; `--json` prints the records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_compile.cli.console import size, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ryzen_compile.artifacts.package.manifest import Accuracy, Engine, Evaluated, Figure, Graph, Manifest, Metric, Variant
    from ryzen_compile.artifacts.package.read import Package
    from ryzen_compile.backends.api import Layers
    from ryzen_compile.numerics.comparison import Comparison
    from ryzen_compile.spec.kv_cache import CachedTensor, CacheMap


MEASURES = 30
"""How many measures that are met are listed; those that are not met are all listed, and the record holds every one."""


def of_package(package: Package) -> str:
    """Return the report of a package: its graphs with their accuracy, its engines with their evidence, its refusals."""
    manifest = package.manifest
    total = sum(file.size_bytes for file in manifest.files)
    lines = [f"{package.path}  {size(total)}, {len(manifest.files)} files, made {manifest.made_at} by {manifest.made_by}"]
    for graph in manifest.graphs:
        lines += ["", *_graph(graph, manifest)]
    if manifest.refused:
        lines += ["", "refused"]
        for one in manifest.refused:
            lines.append(f"  {one.target} ({one.graph}, {one.backend}): {one.reason}")
            if one.hint:
                lines.append(f"      hint: {one.hint}")
    return "\n".join(lines)


def of_caches(name: str, told: CacheMap) -> str:
    """Return what a decoder keeps: a line for each layer."""
    rows: list[list[str]] = []
    for at, layer in enumerate(told.layers):
        keeps = "all, and grows" if layer.slots is None else f"{layer.slots} tokens"
        keeps += f", chosen by {layer.method}" if layer.method != "all" else ""
        rows.append(
            [
                str(at),
                f"{layer.heads} over {layer.kv_heads}" if layer.heads != layer.kv_heads else str(layer.heads),
                _kept(layer.key),
                _kept(layer.value),
                "all before" if layer.window is None else f"{layer.window} tokens",
                keeps,
                layer.key.state or "none: it has no cache",
            ]
        )
    header = ("layer", "heads", "keys", "values", "sees", "keeps", "state")
    how = {"rope": "rotary", "learned": "a table", "alibi": "a slope of the scores (ALiBi)"}.get(told.positions, told.positions)
    longest = f" of {told.longest}" if told.longest is not None else ""
    padding = "a mask hides padding" if told.padding else "no mask"
    return "\n".join(
        [f"{name}: {len(told.layers)} layers, positions: {how}{longest}, {padding}", table(rows, header=header, indent="  ")]
    )


def _kept(side: CachedTensor) -> str:
    codes = {None: "", "fp8": " as fp8"}.get(side.bits, f" as codes of {side.bits} bits")
    return f"{side.size} {side.dtype}{codes}"


def of_comparison(result: Comparison) -> str:
    """Return what was compared, a table of every measure at its worst, and the verdict."""
    accuracy = result.accuracy
    lines = [
        f"{accuracy.subject}",
        f"  against {accuracy.baseline}",
        f"  on {accuracy.where}, {_cases(accuracy)}, {result.seconds:.1f} s",
        f"  held to {accuracy.criteria}, {result.precision}: {result.limits}",
        "",
        *_measures(accuracy.metrics, header=("output", "measure", "worst", "required", "", "where")),
    ]
    lines += [f"FAULT: {fault}" for fault in accuracy.faults]
    lines += [f"note: {note}" for note in accuracy.notes]
    lines += [f"not executed: {one}" for one in result.not_executed]
    lines.append(f"{'MET' if result.met else 'NOT MET'}: {result.subject} against {result.baseline}")
    return "\n".join(lines)


def of_evaluation(result: Evaluated) -> str:
    """Return what was evaluated, a table of every measure by column, and the verdict."""
    columns = ("baseline", "method", "subject") if any(one.method for one in result.findings) else ("baseline", "subject")
    words = {"baseline": "torch", "method": "torch, same method", "subject": "subject"}
    header = ("measure", "of", *(words[column] for column in columns), "required", "")
    rows = [
        (
            f"  {one.part}" if one.part else one.name,
            str(one.of),
            *(_figure(getattr(one, column)) for column in columns),
            one.required or "",
            "" if one.required is None else "met" if one.met else "NOT MET",
        )
        for one in result.findings
    ]
    lines = [
        f"{result.subject}",
        f"  against {result.baseline}",
        f"  same method: {result.method}",
        f"  on {result.where}, {result.seconds:.1f} s",
        f"  {result.data}; {result.steps}",
        "",
        table(rows, header=header),
        "",
        *(f"note: {note}" for note in result.notes),
    ]
    missed = [f"{one.name} {one.required}" for one in result.findings if not one.met]
    return "\n".join([*lines, f"NOT MET: {'; '.join(missed)}" if missed else "MET" if _is_held(result) else "told only"])


def _is_held(result: Evaluated) -> bool:
    return any(one.required for one in result.findings)


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return ""
    within = "" if figure.low is None or figure.high is None else f" ({figure.low:.4g} .. {figure.high:.4g})"
    return f"{figure.value:.4g}{within}"


def missed(manifest: Manifest, path: str) -> str | None:
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
        evidence.says.removeprefix("MISSES ")
        for engine in manifest.engines
        if engine.path == path
        for evidence in engine.evidence
        if evidence.says.startswith("MISSES ")
    ]
    if not held_to:
        return None
    return f"warning: {path} DOES NOT MEET {', '.join(dict.fromkeys(held_to))}: `ryzen-compile inspect` shows the measures"


def _graph(graph: Graph, manifest: Manifest) -> list[str]:
    lines = [f"graph {graph.name}, from {graph.source}"]
    lines += [f"  takes {spec}" for spec in graph.interface.inputs]
    lines += [f"  gives {spec}" for spec in graph.interface.outputs]
    lines += [f"  shapes {profile}" for profile in graph.profiles]
    for variant in graph.variants:
        lines += ["", *_variant(variant)]
    for engine in manifest.engines:
        if engine.graph == graph.name:
            lines += ["", *_engine(engine, manifest)]
    return lines


def _variant(variant: Variant) -> list[str]:
    serves = "serves the CPU" if variant.portable else "for engines only"
    lines = [f"  {variant.path}  {variant.precision}, {serves}"]
    lines += [f"      {step.spelling}: {step.because}" for step in variant.steps]
    lines += [f"          {note}" for step in variant.steps for note in step.notes[:5]]
    for dtype in sorted({*variant.states.values()}):
        lines.append(f"      {list(variant.states.values()).count(dtype)} of its states are {dtype}")
    if variant.not_compared:
        lines.append(f"      not compared: {variant.not_compared}")
    for accuracy in variant.accuracy:
        lines += [f"      {line}" for line in _accuracy(accuracy)]
    for one in variant.evaluations:
        lines += [f"      {line}".rstrip() for line in of_evaluation(one).splitlines()]
    return lines


def _accuracy(accuracy: Accuracy) -> Iterator[str]:
    yield f"{'meets' if accuracy.met else 'DOES NOT MEET'} {accuracy.criteria} in {_cases(accuracy)}"
    yield f"    {accuracy.subject}"
    yield f"    against {accuracy.baseline}, on {accuracy.where}"
    yield from (f"    {line}" for line in _measures(accuracy.metrics))
    yield from (f"    FAULT: {fault}" for fault in accuracy.faults)
    yield from (f"    note: {note}" for note in accuracy.notes)


def _cases(accuracy: Accuracy) -> str:
    return f"{accuracy.cases} case{'' if accuracy.cases == 1 else 's'}"


def _measures(metrics: Sequence[Metric], *, header: Sequence[str] | None = None) -> list[str]:
    """Return a line a measure: those that are not met, and the first of those that are."""
    met = [metric for metric in metrics if metric.met]
    listed = met[:MEASURES]
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
    lines = table(rows, header=header).splitlines() if rows else []
    more = len(met) - len(listed)
    return lines + ([f"and {more} further measures, all met: --json lists them"] if more else [])


def _engine(engine: Engine, manifest: Manifest) -> list[str]:
    bytes_ = next(file.size_bytes for file in manifest.files if file.path == engine.path)
    targets = ", ".join(map(str, engine.targets))
    lines = [f"  {engine.path}  {size(bytes_)}, {engine.backend} {engine.backend_version}, {engine.seconds:.1f} s"]
    lines.append(f"      for {targets}; " + "; ".join(f"{one.level} on {one.on}: {one.says}" for one in engine.evidence))
    if engine.layers is not None:
        lines += [f"      {line}" for line in layer_lines(engine.layers, engine)]
    return lines + [f"      warning: {warning}" for warning in engine.warnings[:5]]


def layer_lines(layers: Layers, engine: Engine) -> list[str]:
    """Return the share of layers by type and the attentions that fused, and who says so."""
    share = ", ".join(
        f"{kind} {layers.share(kind):.0%}" for kind in sorted(layers.by_type, key=lambda kind: -layers.by_type[kind])
    )
    fused = sum(attention.fused for attention in layers.attentions)
    lines = [f"{layers.total} layers by the {layers.source}: {share or 'types unknown'}"]
    if layers.attentions:
        lines.append(f"{fused} of {len(layers.attentions)} attentions fused, for {', '.join(map(str, engine.targets))}")
    return lines + ([layers.says] if layers.says else [])
