"""Trials of a source: derived profiles within the sizes with which it runs, and values that its branches depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ryzen_compile.builder.code_key import CodeKey, code_key
from ryzen_compile.builder.source_runs import SourceRunFunction, open_source, samples_of
from ryzen_compile.data.fixed_values import restrict_values
from ryzen_compile.data.size_search import SizeLimit, TrialFunction, find_running_sizes, search_ranges, with_limits
from ryzen_compile.data.validation import check_shapes
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import BackendError
from ryzen_compile.jobs.executor import LocalExecutor
from ryzen_compile.jobs.job import Job, JobKey, JobOutput, Resources, runs
from ryzen_compile.numerics import COMPARISON_MODULES
from ryzen_compile.progress import StageItems
from ryzen_compile.spec.interface import Inputs, Interface
from ryzen_compile.spec.profile import (
    InputShapes,
    Profile,
    default_sizes,
    derive_profile,
    format_profile,
    input_shapes,
)
from ryzen_compile.spec.profile_request import ProfileRequest
from ryzen_compile.utils.machine import physical_memory_bytes
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.builder.config import BuildConfig
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.progress import Progress

_MAX_NODE_BYTES = 1e9
"""The most bytes that the tensors of one node take at the largest derived sizes; half of the memory, if that is less."""


class TrialKey(JobKey, frozen=True):
    """The key of the trials of one source."""

    kind: ClassVar[str] = "trial"

    code: CodeKey
    source: str
    """The fingerprint of the source."""
    interface: Interface
    profiles: tuple[Profile, ...]
    """The shapes to run; empty: those to run are searched for."""
    samples: str
    runtime: str
    memory_bytes: int


class TrialResult(Record, frozen=True):
    """The sizes and values with which a source runs."""

    known: dict[str, int] | None = None
    """Sizes with which it runs; None: it ran with none that was tried, or the shapes are given."""
    limits: tuple[SizeLimit, ...] = ()
    values: dict[str, int] = {}
    """Values of inputs with which it runs; empty: it runs with random ones, or with none that was tried."""
    failure: str = ""
    """Why it does not run with random ones, if there are values."""


class TrialJob(Job[TrialResult], frozen=True, kw_only=True):
    """Find the sizes with which a source runs, and the values of the inputs that determine which of its branches run."""

    result_type: ClassVar[Any] = TrialResult
    isolated: ClassVar[bool] = True
    preload: ClassVar[tuple[str, ...]] = COMPARISON_MODULES

    key: TrialKey
    source: str
    """The absolute path of the source."""
    data: str | None
    seed: int
    branch_values: tuple[dict[str, int], ...]
    """Combinations of values to try besides random ones; empty with samples, which hold valid ones."""

    @property
    def label(self) -> str:
        """The source."""
        return f"trial of {Path(self.source).name}"

    def reuse_message(self, result: TrialResult) -> None:
        """Return None: the user did not ask for a trial."""


def tried_shapes(
    source: SourceGraph,
    config: BuildConfig,
    request: ProfileRequest,
    *,
    samples: str,
    runtime: str,
    store: Store | None,
    progress: Progress,
) -> tuple[Interface, Profile]:
    """Return the interface and the profile with which a source runs, and report what is derived.

    What `request` does not give is derived, within the sizes with which the source runs with every value that its branches
    compare an input with, as far as it takes that value. Sizes that the interface records are not tried: the export ran the
    module with them. If the source runs with some of these values and not with random ones, the interface that is returned
    has them as the range of the input. A source that does not run at all keeps its shapes, and its comparison fails.
    `samples` and `runtime` identify what the source is run with and by.
    """
    interface = request.bound(source.summary.interface)
    is_derived = not request.is_complete and any(spec.is_dynamic for spec in interface.inputs)
    is_searched = is_derived and not _is_recorded(source.summary.interface)
    profile = request.profile(interface)
    branch_values = source.summary.branch_values if config.data is None else ()
    result = TrialResult()
    if branch_values or is_searched:
        profiles = () if is_searched else (profile,)
        result = _run_trial(source, config, interface, profiles, branch_values, samples, runtime, store, progress)
    if is_derived:
        limited = with_limits(interface, result.limits)
        if result.known is not None and result.known != default_sizes(interface)[1] and not request.opt:
            limited = msgspec.structs.replace(limited, typical_sizes=result.known)
        profile = request.profile(limited)
        given = "" if request.min or request.max else "no shapes given; "
        for message in (f"{given}derived shapes: {format_profile(profile, limited)}", *map(str, result.limits)):
            progress.report(Diagnostic(code="shapes-derived", severity="info", message=message, location=source.name))
    for name, value in result.values.items():
        message = f"random values of `{name}` are all {value}: with others, {result.failure}"
        progress.report(Diagnostic(code="values-derived", severity="info", message=message, location=source.name))
    return restrict_values(source.summary.interface, result.values), profile


def _is_recorded(interface: Interface) -> bool:
    """Return whether the interface records a size of every dim, as `export` does."""
    return all(dim in interface.typical_sizes for dim in default_sizes(interface)[0])


def _run_trial(
    source: SourceGraph,
    config: BuildConfig,
    interface: Interface,
    profiles: tuple[Profile, ...],
    branch_values: tuple[dict[str, int], ...],
    samples: str,
    runtime: str,
    store: Store | None,
    progress: Progress,
) -> TrialResult:
    """Return the result of the trial; an empty one if the source cannot be tried on this machine."""
    job = TrialJob(
        key=TrialKey(
            code=code_key(),
            source=source.summary.fingerprint,
            interface=interface,
            profiles=profiles,
            samples=samples,
            runtime=runtime,
            memory_bytes=physical_memory_bytes(),
        ),
        inputs={source.absolute_path: source.summary.fingerprint},
        resources=Resources.within(config.limits),
        source=source.absolute_path,
        data=config.data,
        seed=config.seed,
        branch_values=branch_values,
    )
    try:
        return LocalExecutor(store, progress).run(job, Path()).result
    except BackendError:
        return TrialResult()  # the comparison, which runs the same, reports why


@runs(TrialJob)
def run_trial_job(job: TrialJob, folder: Path, progress: Progress) -> JobOutput[TrialResult]:
    """Run the source with several sizes and values. Raises BackendError if it cannot be loaded."""
    interface, profiles = job.key.interface, job.key.profiles
    profile = profiles[0] if profiles else derive_profile(interface)
    samples = samples_of(job.data, interface, profile, job.source, seed=job.seed)
    title = f"try the {'given' if profiles else 'derived'} shapes of {Path(job.source).name}"
    with (
        progress.stage(title, StageItems("runs")) as stage,
        open_source(job.source, interface, samples, seed=job.seed) as run,
    ):

        def failure_at(shapes: InputShapes, values: Mapping[str, int]) -> str | None:
            failure = run(shapes, values)
            stage.advance()
            return failure

        result = _find_values(job, failure_at) if profiles else _search(job, samples, failure_at)
    return JobOutput(result=result)


def _find_values(job: TrialJob, run: SourceRunFunction) -> TrialResult:
    """Return the first values with which the source runs at all shapes of the profiles, if it does not with random ones."""
    corners = [shapes for profile in job.key.profiles for _, shapes in profile.corners()]

    def failure_with(values: Mapping[str, int]) -> str | None:
        return next((failure for shapes in corners if (failure := run(shapes, values)) is not None), None)

    if (failure := failure_with({})) is None:
        return TrialResult()
    values = next((values for values in job.branch_values if failure_with(values) is None), {})
    return TrialResult(values=values, failure=failure)


def _search(job: TrialJob, samples: Sequence[Inputs], run: SourceRunFunction) -> TrialResult:
    """Return the sizes with which the source runs with random values and all branch values that it takes with some size."""
    interface, cases = job.key.interface, ({}, *job.branch_values)
    is_too_large = _memory_check(job)

    def failure_of(sizes: Mapping[str, int], case: int) -> str | None:
        return run(input_shapes(interface, sizes), cases[case])

    found = find_running_sizes(interface, _largest_sizes(samples, interface), len(cases), failure_of, is_too_large=is_too_large)
    if found is None:
        return TrialResult()

    def trial(sizes: Mapping[str, int]) -> str | None:
        return next((failure for case in found.cases if (failure := failure_of(sizes, case)) is not None), None)

    limits = search_ranges(interface, found.sizes, trial, is_too_large=is_too_large)
    if 0 in found.cases:
        return TrialResult(known=found.sizes, limits=limits)
    failure = failure_of(found.sizes, 0) or ""
    return TrialResult(known=found.sizes, limits=limits, values=cases[found.cases[0]], failure=failure)


def _largest_sizes(samples: Sequence[Inputs], interface: Interface) -> list[dict[str, int]]:
    """Return the sizes of the largest sample; empty without samples."""
    if not samples:
        return []
    largest = max(samples, key=lambda sample: sum(array.size for array in sample.values()))
    return [check_shapes(interface, {name: array.shape for name, array in largest.items()})]


def _memory_check(job: TrialJob) -> TrialFunction:
    """Return a function that returns why sizes need too much memory; None if they do not."""
    from ryzen_compile.ir.analysis.working_set import WorkingSet
    from ryzen_compile.ir.load import load

    working_set = WorkingSet(load(job.source))
    limit = min(_MAX_NODE_BYTES, job.key.memory_bytes / 2)

    def too_large(sizes: Mapping[str, int]) -> str | None:
        size = working_set.nbytes(sizes)
        if size <= limit:
            return None
        return f"the tensors of one node take {size / 1e9:.1f} GB, more than {limit / 1e9:.1f} GB"

    return too_large
