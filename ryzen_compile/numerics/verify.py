"""Verify: the accuracy check again, on the machine that the package is on, recorded in its manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile.artifacts.package.manifest import EngineRecord, GraphRecord, Manifest, Provenance
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.artifacts.package.write import replace_manifest
from ryzen_compile.data.loading import load_samples
from ryzen_compile.errors import AccuracyError, UsageError, did_you_mean
from ryzen_compile.numerics.candidate_lookup import find_candidate, find_candidates
from ryzen_compile.numerics.comparison import Comparison, compare
from ryzen_compile.numerics.criteria import default_criteria, load_criteria

if TYPE_CHECKING:
    from ryzen_compile.numerics.candidate import Candidate
    from ryzen_compile.progress import Progress


def verify(
    path: str | os.PathLike[str],
    *,
    baseline: str | Mapping[str, str] | None,
    data: str | None,
    criteria: str | os.PathLike[str] | None,
    seed: int,
    progress: Progress,
) -> tuple[Package, tuple[Comparison, ...]]:
    """Check all digests, compare what of the package runs here with `baseline`, and record the results in the manifest.

    `baseline` is that of the one graph, or one by the name of each graph; a graph without one is compared with its portable
    variant. Returns the package as it is now and the comparisons. Raises PackageError for damage, UsageError for a baseline
    of no graph or of any of several, and AccuracyError where nothing could be compared.
    """
    package = read_package(path)
    baselines = {graph: find_candidate(text) for graph, text in _baselines_by_graph(package.manifest, baseline).items()}
    with progress.stage("check digests"):
        package.check()
    limits = load_criteria(Path(criteria)) if criteria is not None else default_criteria()
    limits.check_outputs(spec.name for graph in package.manifest.graphs for spec in graph.interface.outputs)
    results: list[tuple[Candidate, Comparison]] = []
    for subject in find_candidates(str(path)):
        against = baselines.get(subject.graph or "") or _portable_candidate(path, subject)
        if against is None or against.name == subject.name:
            continue
        samples = list(load_samples(data, subject.interface, seed=seed)) if data and subject.interface else None
        result = compare(subject, against, criteria=limits, samples=samples, seed=seed, progress=progress)
        results.append((subject, result))
    if not results:
        raise AccuracyError(
            f"nothing of {path} was compared: it holds the portable graph alone",
            hint="give --baseline MODEL.onnx or recipe:NAME",
        )
    manifest = _with_results(package.manifest, results)
    return replace_manifest(package, manifest), tuple(result for _, result in results)


def parse_baselines(texts: Sequence[str]) -> str | dict[str, str] | None:
    """Read `BASELINE`, or `GRAPH=BASELINE` once for each graph; raises UsageError where they are mixed or a graph is twice.

    One word without `=`, or that is a file, is a baseline as it is.
    """
    if not texts:
        return None
    if len(texts) == 1 and ("=" not in texts[0] or Path(texts[0]).exists()):
        return texts[0]
    found: dict[str, str] = {}
    for word in texts:
        graph, equals, text = word.partition("=")
        if not (graph and equals and text):
            raise UsageError(f"the baseline `{word}` names no graph", hint="several are given as GRAPH=BASELINE, one a graph")
        if graph in found:
            raise UsageError(f"the graph `{graph}` is given two baselines", hint="give it one")
        found[graph] = text
    return found


def _baselines_by_graph(manifest: Manifest, baseline: str | Mapping[str, str] | None) -> Mapping[str, str]:
    names = [graph.name for graph in manifest.graphs]
    if not baseline:
        return {}
    if isinstance(baseline, str):
        if len(names) > 1:
            raise UsageError(
                f"`{baseline}` cannot be the baseline of {len(names)} graphs",
                hint=f"say of which: {' or '.join(f'{name}={baseline}' for name in names)}",
            )
        return dict.fromkeys(names, baseline)
    for name in baseline:
        if name not in names:
            raise UsageError(f"the package holds no graph `{name}` to give a baseline", hint=did_you_mean(name, names))
    return baseline


def _portable_candidate(path: str | os.PathLike[str], candidate: Candidate) -> Candidate | None:
    """Return the portable variant of the subject's graph, or None where the package holds none."""
    found = [one for one in find_candidates(f"{path}#{candidate.graph}") if one.portable]
    return found[0] if found else None


def _with_results(manifest: Manifest, results: Sequence[tuple[Candidate, Comparison]]) -> Manifest:
    by_part: dict[str, list[Comparison]] = {}
    for subject, result in results:
        by_part.setdefault(subject.package_file or "", []).append(result)
    return msgspec.structs.replace(
        manifest,
        graphs=tuple(_with_accuracy(graph, by_part) for graph in manifest.graphs),
        engines=tuple(_with_provenance(engine, by_part.get(engine.path, [])) for engine in manifest.engines),
    )


def _with_accuracy(graph: GraphRecord, by_package_file: dict[str, list[Comparison]]) -> GraphRecord:
    variants = [
        msgspec.structs.replace(
            variant,
            accuracy=(*variant.accuracy, *(result.accuracy for result in by_package_file[variant.path])),
            not_compared_reason=None,
        )
        if variant.path in by_package_file
        else variant
        for variant in graph.variants
    ]
    return msgspec.structs.replace(graph, variants=tuple(variants))


def _with_provenance(engine: EngineRecord, results: Sequence[Comparison]) -> EngineRecord:
    evidence = [
        Provenance(
            level="compared",
            machine=result.accuracy.machine,
            message=f"{'meets' if result.met else 'MISSES'} {result.accuracy.criteria} against {result.accuracy.baseline}",
            timestamp=result.accuracy.timestamp,
        )
        for result in results
    ]
    return msgspec.structs.replace(engine, provenance=(*engine.provenance, *evidence))
