"""Comparison of models by reference: packages, ONNX files and PyTorch modules, with a search for the first difference."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile import registry
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.artifacts.package.reference import parse_package_reference
from ryzen_compile.data.loading import load_samples
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import RyzenError, UsageError, default_hint
from ryzen_compile.numerics import COMPARISON_MODULES
from ryzen_compile.numerics import bisect as bisection
from ryzen_compile.numerics.candidate import Candidate
from ryzen_compile.numerics.candidate_lookup import ModelReference, find_candidate, find_candidates
from ryzen_compile.numerics.comparison import Comparison, compare, comparison_diagnostics, describe, summarize
from ryzen_compile.numerics.criteria import Criteria, criteria_between, default_criteria, load_criteria
from ryzen_compile.numerics.grid import CaseSource
from ryzen_compile.numerics.package_candidates import find_variant
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.pipeline.range_measurement import measure_ranges
from ryzen_compile.processes.child_call import call_in_child
from ryzen_compile.processes.limits import ResourceLimits
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.spec.passes import PassContext
from ryzen_compile.spec.profile_request import resolve_profiles
from ryzen_compile.utils.files import is_onnx_file
from ryzen_compile.utils.record import Record
from ryzen_compile.utils.summarized import Summarized

if TYPE_CHECKING:
    from ryzen_compile.spec.profile import Profile


class ComparisonReport(Summarized, Record, frozen=True):
    """The comparisons of all candidates that a reference names with one baseline."""

    comparisons: tuple[Comparison, ...]
    """One for each candidate: for a package, every graph, variant and engine that can run here."""
    divergence: bisection.Divergence | None = None
    """The first pass and node that differ, for the first candidate that does not meet the criteria; None if it was not
    searched for or not found."""

    @property
    def met(self) -> bool:
        """Whether something was compared and every criterion is met."""
        return bool(self.comparisons) and all(comparison.met for comparison in self.comparisons)

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


_SHAPES_HINT = (
    "give --min-shapes, --opt-shapes and --max-shapes at which both run, or valid inputs with --data, with --as-given to run "
    "them unchanged"
)


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """How two models are compared."""

    min_shapes: Sequence[str] = ()
    """Profiles in trtexec's syntax, as in a build; without any, those of the candidate apply."""
    opt_shapes: Sequence[str] = ()
    max_shapes: Sequence[str] = ()
    data: str | None = None
    """Samples; None: those of the baseline or the candidate, else random values drawn from `seed`."""
    as_given: bool = False
    """Whether the samples of `data` are run unchanged instead of reshaped to the grid of profiles."""
    criteria: str | None = None
    """The path of a success_criteria.toml. Without it and without limits: the floor of a variant with lossy passes, else the
    defaults."""
    max_abs: float | None = None
    """The largest allowed absolute difference of an element, at least 0; replaces that of the criteria."""
    relative_l2: float | None = None
    """The largest allowed relative L2 difference of an output, at least 0."""
    cosine: float | None = None
    """The smallest allowed cosine similarity of a vector with the baseline's, in [-1, 1]."""
    top1: float | None = None
    """The smallest allowed share of rows with the same argmax as the baseline, in [0, 1]."""
    seed: int = 0

    def load_criteria(self) -> Criteria | None:
        """Return the given criteria with the given limits; None if neither is given."""
        limits = {"max_abs": self.max_abs, "relative_l2": self.relative_l2, "cosine": self.cosine, "top1": self.top1}
        if self.criteria is None and not any(limit is not None for limit in limits.values()):
            return None
        criteria = load_criteria(Path(self.criteria)) if self.criteria is not None else default_criteria()
        return criteria.override(**limits)


def compare_models(
    candidate: ModelReference,
    baseline: ModelReference,
    *,
    config: ComparisonConfig,
    bisect: bool = False,
    source: str | os.PathLike[str] | None = None,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> ComparisonReport:
    """Compare every candidate that `candidate` names with `baseline`, in a child process within `limits`.

    A model or recipe that is an object of this process is compared in this process, without limits.

    With `bisect`, the first pass and node that differ are searched for if a criterion is not met: for a package by running its
    pipeline again on `source`, the ONNX file that it was built from (default: the baseline), for two ONNX files by comparing
    their tensors. A search that fails is reported to `progress`; the comparisons stand.

    Raises UsageError for an invalid reference or configuration, ShapeError if the inputs of the two differ, and the errors of
    reading and running the models.
    """
    progress = progress or SilentProgress()
    references = [os.fspath(reference) for reference in (candidate, baseline) if isinstance(reference, (str, os.PathLike))]
    if len(references) < 2:
        return _compare_models(candidate, baseline, config=config, bisect=bisect, source=source, progress=progress)
    call = _CompareCall(
        candidate=references[0],
        baseline=references[1],
        config=config,
        bisect=bisect,
        source=None if source is None else os.fspath(source),
    )
    encoded = call_in_child(
        f"{__name__}:{_compare_encoded.__name__}",
        msgspec.json.encode(call),
        label=f"comparison of {call.candidate} with {call.baseline}",
        preload=COMPARISON_MODULES,
        limits=limits,
        progress=progress,
    )
    return msgspec.json.decode(encoded, type=ComparisonReport)


class _CompareCall(Record, frozen=True):
    """The arguments of `compare_models` for a child process."""

    candidate: str
    baseline: str
    config: ComparisonConfig
    bisect: bool
    source: str | None


def _compare_encoded(argument: bytes, progress: Progress) -> bytes:
    """Perform an encoded `_CompareCall`; the function that the child process calls."""
    call = msgspec.json.decode(argument, type=_CompareCall)
    report = _compare_models(
        call.candidate, call.baseline, config=call.config, bisect=call.bisect, source=call.source, progress=progress
    )
    return msgspec.json.encode(report)


def _compare_models(
    candidate: ModelReference,
    baseline: ModelReference,
    *,
    config: ComparisonConfig,
    bisect: bool,
    source: str | os.PathLike[str] | None,
    progress: Progress,
) -> ComparisonReport:
    given = config.load_criteria()
    baseline_candidate, candidates = find_candidate(baseline), find_candidates(candidate)
    if given is not None:
        _check_outputs(given, candidate, candidates, baseline_candidate)
    if bisect:
        _check_bisect(candidate, baseline, source)
        if baseline_candidate.accuracy_floor is not None:
            raise UsageError(
                f"--bisect requires a baseline without lossy passes, and `{baseline_candidate.name}` has some",
                hint="give the model that the package was built from as --baseline",
            )
    if config.as_given and not config.data:
        raise UsageError("--as-given requires the samples of --data, and none are given", hint="add --data SAMPLES")
    results: list[Comparison] = []
    first_unmet: tuple[Candidate, CaseSource, Criteria] | None = None
    for compared in candidates:
        case_source = _case_source(compared, baseline_candidate, config)
        criteria = criteria_between(compared, baseline_candidate, given)
        with default_hint(_SHAPES_HINT) if case_source.inputs is None else nullcontext():
            result = compare(compared, baseline_candidate, criteria=criteria, case_source=case_source, progress=progress)
        results.append(result)
        if first_unmet is None and not result.met:
            first_unmet = compared, case_source, criteria
    divergence = None
    if bisect and first_unmet is not None:
        try:
            divergence = _run_bisect(*first_unmet, candidate, baseline, source, baseline_candidate, progress)
        except RyzenError as error:
            message = f"--bisect found nothing: {error.message}"
            progress.report(Diagnostic(code="bisect-failed", severity="error", message=message, hint=error.hint))
    return ComparisonReport(comparisons=tuple(results), divergence=divergence)


def _case_source(candidate: Candidate, baseline: Candidate, config: ComparisonConfig) -> CaseSource:
    """Return the profiles and samples that were asked for."""
    interface = candidate.interface or baseline.interface
    if interface is None:
        return CaseSource(seed=config.seed)
    profiles: Sequence[Profile] = ()
    if config.min_shapes or config.opt_shapes or config.max_shapes:
        profiles = resolve_profiles(
            interface, min_shapes=config.min_shapes, opt_shapes=config.opt_shapes, max_shapes=config.max_shapes
        )
    samples = list(load_samples(config.data, interface, seed=config.seed)) if config.data else None
    if config.as_given:
        return CaseSource(profiles=profiles, inputs=samples, seed=config.seed)
    return CaseSource(profiles=profiles, samples=samples, seed=config.seed)


def _check_outputs(criteria: Criteria, candidate: ModelReference, candidates: Sequence[Candidate], baseline: Candidate) -> None:
    """Raise UsageError for criteria of an output that neither model has; for a package, the outputs of all its graphs count."""
    interfaces = [compared.interface for compared in (*candidates, baseline)]
    if isinstance(candidate, (str, os.PathLike)) and any(compared.graph is not None for compared in candidates):
        package = read_package(parse_package_reference(os.fspath(candidate)).path)
        interfaces += [graph.interface for graph in package.manifest.graphs]
    outputs = {spec.name for interface in interfaces if interface is not None for spec in interface.outputs}
    if outputs:
        criteria.check_outputs(outputs)


def _onnx_file(reference: ModelReference | None) -> Path | None:
    if not isinstance(reference, (str, os.PathLike)):
        return None
    return Path(reference) if is_onnx_file(reference) else None


def _check_bisect(candidate: ModelReference, baseline: ModelReference, source: str | os.PathLike[str] | None) -> None:
    """Raise UsageError if the two cannot be bisected; called before anything is compared."""
    if _onnx_file(candidate):
        if not _onnx_file(baseline):
            raise UsageError("--bisect compares an ONNX file only with another ONNX file", hint="give --baseline MODEL.onnx")
        return
    if not isinstance(candidate, (str, os.PathLike)):
        raise UsageError("--bisect requires a package or an ONNX file as the candidate", hint="give the path of one")
    reference = parse_package_reference(os.fspath(candidate))
    if not reference.path.is_dir() and reference.path.suffix != ".ryzen":
        raise UsageError(f"--bisect requires a package or an ONNX file, and `{candidate}` is neither")
    if source is None and not _onnx_file(baseline):
        raise UsageError(
            "--bisect runs the pipeline again on the model that the package was built from", hint="add --source MODEL.onnx"
        )
    if source is not None and not Path(source).is_file():
        raise UsageError(f"there is no file `{source}`", hint="give --source MODEL.onnx")
    find_variant(reference)


def _run_bisect(
    candidate: Candidate,
    case_source: CaseSource,
    criteria: Criteria,
    candidate_reference: ModelReference,
    baseline: ModelReference,
    source: str | os.PathLike[str] | None,
    baseline_candidate: Candidate,
    progress: Progress,
) -> bisection.Divergence:
    """Run the pipeline of a variant again on its source graph, or compare the tensors of two ONNX files."""
    file, other = _onnx_file(candidate_reference), _onnx_file(baseline)
    if file and other:
        return bisection.find_divergence(file, other, criteria=criteria, case_source=case_source, progress=progress)
    assert isinstance(candidate_reference, (str, os.PathLike))
    package = read_package(parse_package_reference(os.fspath(candidate_reference)).path)
    assert candidate.package_file is not None, "the candidate is of a package"
    graph, variant = package.manifest.variant_at(candidate.package_file)
    source_file = Path(source) if source is not None else other
    assert source_file is not None  # `_check_bisect` guarantees it
    return bisection.bisect(
        source_file,
        parse(",".join(record.pass_spec for record in variant.passes)),
        baseline=baseline_candidate,
        context=PassContext(
            backend=variant.backend,
            interface=graph.interface,
            measure_ranges=functools.partial(measure_ranges, progress=progress),
            seed=case_source.seed,
            progress=progress,
        ),
        properties=registry.properties(),
        criteria=criteria,
        case_source=replace(case_source, profiles=case_source.profiles or graph.profiles),
        baseline_file=other,
        packaged_graph=package.path / variant.path,
        progress=progress,
    )
