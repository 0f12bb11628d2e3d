"""Verification of a package: check digests, repeat the accuracy check on this machine, and record the results."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from ryzen_compile.artifacts.package.manifest import EngineRecord, GraphRecord, Manifest, Provenance
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.artifacts.package.write import replace_manifest
from ryzen_compile.data.loading import load_samples
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import AccuracyError, UsageError, did_you_mean
from ryzen_compile.numerics import COMPARISON_MODULES
from ryzen_compile.numerics.candidate_lookup import find_candidate, find_candidates
from ryzen_compile.numerics.comparison import Comparison, compare, comparison_diagnostics, describe, summarize
from ryzen_compile.numerics.criteria import criteria_between, load_criteria
from ryzen_compile.numerics.grid import CaseSource
from ryzen_compile.processes.child_call import call_in_child
from ryzen_compile.processes.limits import ResourceLimits
from ryzen_compile.progress import Progress
from ryzen_compile.utils.record import Record
from ryzen_compile.utils.summarized import Summarized

if TYPE_CHECKING:
    from ryzen_compile.numerics.candidate import Candidate


_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, repr=False)
class Verification(Summarized):
    """A package with the recorded results of its verification."""

    package: Package
    comparisons: tuple[Comparison, ...]

    @property
    def met(self) -> bool:
        """Whether every criterion is met."""
        return all(comparison.met for comparison in self.comparisons)

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """The unmet criteria and the faults, as errors, and the branches that no case ran, as warnings."""
        return comparison_diagnostics(self.comparisons)

    @property
    def summary(self) -> str:
        """Whether the criteria are met, and what was compared with what."""
        return summarize(self.comparisons)

    def _details(self) -> list[str]:
        return [*map(describe, self.comparisons), *map(str, self.diagnostics)]


def verify(
    path: str | os.PathLike[str],
    *,
    baseline: str | Mapping[str, str] | None = None,
    data: str | None = None,
    criteria: str | os.PathLike[str] | None = None,
    seed: int = 0,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check all digests, compare every candidate of the package with its baseline, and record the results in the manifest.

    The models run in a child process within `limits`.

    A result replaces an older one of the same candidate, baseline, criteria and machine.

    `baseline` is the baseline of the only graph, or the baselines by graph name; without one, a variant is compared with its
    portable variant. `data` and `criteria` are as for `compare`. Raises PackageError if the package is damaged, UsageError if a
    baseline names no graph or does not say which of several it is for, and AccuracyError if nothing could be compared.
    """
    call = _VerifyCall(
        path=os.fspath(path),
        baseline=baseline if baseline is None or isinstance(baseline, str) else dict(baseline),
        data=data,
        criteria=None if criteria is None else os.fspath(criteria),
        seed=seed,
    )
    encoded = call_in_child(
        f"{__name__}:{_verify_encoded.__name__}",
        msgspec.json.encode(call),
        label=f"verification of {call.path}",
        preload=COMPARISON_MODULES,
        limits=limits,
        progress=progress,
    )
    comparisons = msgspec.json.decode(encoded, type=tuple[Comparison, ...])
    return Verification(package=read_package(path), comparisons=comparisons)


class _VerifyCall(Record, frozen=True):
    """The arguments of `verify` for a child process."""

    path: str
    baseline: str | dict[str, str] | None
    data: str | None
    criteria: str | None
    seed: int


def _verify_encoded(argument: bytes, progress: Progress) -> bytes:
    """Perform an encoded `_VerifyCall`, record the results and return them; the function that the child process calls."""
    call = msgspec.json.decode(argument, type=_VerifyCall)
    path, baseline, data, criteria, seed = call.path, call.baseline, call.data, call.criteria, call.seed
    package = read_package(path)
    baselines = {graph: find_candidate(text) for graph, text in _baselines_by_graph(package.manifest, baseline).items()}
    with progress.stage("check digests"):
        package.check()
    given = load_criteria(Path(criteria)) if criteria is not None else None
    if given is not None:
        given.check_outputs(spec.name for graph in package.manifest.graphs for spec in graph.interface.outputs)
    results: list[tuple[Candidate, Comparison]] = []
    candidates = find_candidates(str(path))
    for candidate in candidates:
        portable = _portable_form(package.manifest, candidate, candidates)
        baseline_candidate = baselines.get(candidate.graph or "")
        # A floor does not find errors of other passes within it, which a comparison with the portable variant finds.
        both = baseline_candidate is None or candidate.accuracy_floor is not None
        samples = list(load_samples(data, candidate.interface, seed=seed)) if data and candidate.interface else None
        for against in (baseline_candidate, portable if both else None):
            if against is None or against.name == candidate.name:
                continue
            result = compare(
                candidate,
                against,
                criteria=criteria_between(candidate, against, given),
                case_source=CaseSource(samples=samples, seed=seed),
                progress=progress,
            )
            results.append((candidate, result))
    if not results:
        raise AccuracyError(
            f"nothing in {path} was compared: it contains only portable variants",
            hint="give --baseline MODEL.onnx or recipe:NAME",
        )
    replace_manifest(package, _with_results(package.manifest, results))
    return msgspec.json.encode([result for _, result in results])


def parse_baselines(texts: Sequence[str]) -> str | dict[str, str] | None:
    """Parse one `BASELINE`, or `GRAPH=BASELINE` for each graph.

    A single text without `=`, or one that is an existing file, is a baseline without a graph. Raises UsageError if the two
    forms are mixed or a graph is given twice.
    """
    if not texts:
        return None
    if len(texts) == 1 and ("=" not in texts[0] or Path(texts[0]).exists()):
        return texts[0]
    baselines: dict[str, str] = {}
    for text in texts:
        graph, equals, baseline = text.partition("=")
        if not (graph and equals and baseline):
            raise UsageError(f"the baseline `{text}` names no graph", hint="write GRAPH=BASELINE for each graph")
        if graph in baselines:
            raise UsageError(f"the graph `{graph}` has two baselines", hint="give one baseline per graph")
        baselines[graph] = baseline
    return baselines


def _baselines_by_graph(manifest: Manifest, baseline: str | Mapping[str, str] | None) -> Mapping[str, str]:
    names = [graph.name for graph in manifest.graphs]
    if not baseline:
        return {}
    if isinstance(baseline, str):
        if len(names) > 1:
            raise UsageError(
                f"`{baseline}` cannot be the baseline of {len(names)} graphs",
                hint=f"name the graph: {' or '.join(f'{name}={baseline}' for name in names)}",
            )
        return dict.fromkeys(names, baseline)
    for name in baseline:
        if name not in names:
            raise UsageError(
                f"a baseline is given for `{name}`, which is not a graph of the package", hint=did_you_mean(name, names)
            )
    return baseline


def _portable_form(manifest: Manifest, candidate: Candidate, candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the portable variant of the same requested pipeline as `candidate`; None if it cannot be run."""
    assert candidate.package_file is not None, "the candidate is of a package"
    graph, variant = manifest.variant_at(candidate.package_file)
    name = variant.portable_form or variant.name
    paths = {record.path for record in graph.variants if record.name == name and record.portable}
    return next((item for item in candidates if item.package_file in paths), None)


def _with_results(manifest: Manifest, results: Sequence[tuple[Candidate, Comparison]]) -> Manifest:
    by_package_file: dict[str, list[Comparison]] = {}
    for candidate, result in results:
        by_package_file.setdefault(candidate.package_file or "", []).append(result)
    return msgspec.structs.replace(
        manifest,
        graphs=tuple(_with_accuracy(graph, by_package_file) for graph in manifest.graphs),
        engines=tuple(_with_provenance(engine, by_package_file.get(engine.path, [])) for engine in manifest.engines),
    )


def _with_accuracy(graph: GraphRecord, by_package_file: Mapping[str, list[Comparison]]) -> GraphRecord:
    """Return `graph` with the new results; each replaces an older one of the same variant, baseline, criteria and machine."""
    variants = [
        msgspec.structs.replace(
            variant,
            accuracy=_replace_older(
                variant.accuracy,
                [result.accuracy for result in by_package_file[variant.path]],
                lambda record: (record.passes, record.baseline, record.criteria, record.machine),
            ),
            not_compared_reason=None,
        )
        if variant.path in by_package_file
        else variant
        for variant in graph.variants
    ]
    return msgspec.structs.replace(graph, variants=tuple(variants))


def _with_provenance(engine: EngineRecord, results: Sequence[Comparison]) -> EngineRecord:
    """Return `engine` with the new results; each replaces an older one with the same baseline, criteria and machine."""
    provenance = [
        Provenance(
            level="compared",
            machine=result.accuracy.machine,
            message=f"{result.accuracy.criteria} against {result.accuracy.baseline}",
            timestamp=result.accuracy.timestamp,
            met=result.met,
        )
        for result in results
    ]
    records = _replace_older(engine.provenance, provenance, lambda record: (record.level, record.machine, record.message))
    return msgspec.structs.replace(engine, provenance=records)


def _replace_older(records: Sequence[_T], new: Sequence[_T], key: Callable[[_T], Hashable]) -> tuple[_T, ...]:
    """Return `records` without those that have the key of a new one, then the new ones."""
    replaced = {key(record) for record in new}
    return (*(record for record in records if key(record) not in replaced), *new)
