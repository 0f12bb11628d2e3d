"""What a package holds and what it is worth, as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ryzen_compile.cli.console import size, table

if TYPE_CHECKING:
    from ryzen_compile.backends import Layers
    from ryzen_compile.package.manifest import Accuracy, Engine, Graph, Manifest, Variant
    from ryzen_compile.package.read import Package


def report(package: Package) -> str:
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
    if variant.not_compared:
        lines.append(f"      not compared: {variant.not_compared}")
    for accuracy in variant.accuracy:
        lines += [f"      {line}" for line in accuracy_lines(accuracy)]
    return lines


def accuracy_lines(accuracy: Accuracy) -> list[str]:
    """Return a comparison's result: what was compared, then each measure at its worst."""
    lines = [
        f"{'meets' if accuracy.met else 'MISSES'} {accuracy.criteria} in {accuracy.cases} cases",
        f"    {accuracy.subject}",
        f"    against {accuracy.baseline}, on {accuracy.where}",
    ]
    rows = [
        (
            metric.output,
            metric.name,
            f"{metric.worst:.6g}",
            metric.required or "told",
            "" if metric.met else "MISSED",
            metric.case,
        )
        for metric in accuracy.metrics
    ]
    lines += table(rows, indent="    ").splitlines()
    lines += [f"    failed: {fault}" for fault in accuracy.faults]
    return lines + [f"    note: {note}" for note in accuracy.notes]


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
