"""Runs of the source: derived profiles within the sizes with which it runs, and whether it runs at the shapes of a profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ryzen_compile import registry
from ryzen_compile.backends.traits import portable_backend
from ryzen_compile.builder.cache_keys import CodeKey, code_key
from ryzen_compile.builder.graph_samples import graph_samples, kept_samples
from ryzen_compile.data.reshaping import reshape_samples
from ryzen_compile.data.size_search import SizeLimit, TrialFunction, search_ranges, with_limits
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.jobs.executor import LocalExecutor
from ryzen_compile.jobs.job import Job, JobKey, JobOutput, Resources, runs
from ryzen_compile.numerics import COMPARISON_MODULES
from ryzen_compile.progress import StageItems, counted
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.profile import (
    InputShapes,
    Profile,
    default_sizes,
    derive_profile,
    format_profile,
    format_shape,
    input_shapes,
)
from ryzen_compile.utils.machine import physical_memory_bytes
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.builder.config import BuildConfig
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.progress import Progress

_MAX_NODE_BYTES = 1e9
"""The most bytes that the tensors of one node take at the largest derived sizes; half of the memory, if that is less."""
_LENGTHS = (64, 256, 32, 512, 16, 1024, 8, 4096, 4, 2, 1, 16384)
"""The lengths that are tried, in this order, if the source does not run with the typical sizes."""


class TrialKey(JobKey, frozen=True):
    """The key of the trials of one source."""

    kind: ClassVar[str] = "trial"

    code: CodeKey
    source: str
    """The fingerprint of the source."""
    interface: Interface
    samples: str
    runtime: str
    memory_bytes: int


class TrialResult(Record, frozen=True):
    """The sizes with which a source runs."""

    known: dict[str, int] | None
    """Sizes with which it runs; None: it ran with none that was tried."""
    limits: tuple[SizeLimit, ...] = ()
    failure: str | None = None
    """Why it does not run with the typical sizes; None: it does, or it could not be loaded."""


class TrialJob(Job[TrialResult], frozen=True, kw_only=True):
    """Find the sizes with which a source runs."""

    result_type: ClassVar[Any] = TrialResult
    isolated: ClassVar[bool] = True
    preload: ClassVar[tuple[str, ...]] = COMPARISON_MODULES

    key: TrialKey
    source: str
    """The absolute path of the source."""
    data: str | None
    seed: int

    @property
    def label(self) -> str:
        """The source."""
        return f"trial of {Path(self.source).name}"

    def reuse_message(self, result: TrialResult) -> None:
        """Return None: the user did not ask for a trial."""


def tried_profile(
    source: SourceGraph, config: BuildConfig, samples: str, runtime: str, store: Store | None, progress: Progress
) -> Profile:
    """Return the derived profile of a source, shrunk to the sizes with which the source runs, and report it.

    `samples` and `runtime` identify what the source is run with and by. Sizes that the interface records are not tried: the
    export ran the module with them. A source that does not run at all keeps its profile, and its comparison fails.
    """
    interface = source.summary.interface
    result = None if _is_recorded(interface) else _run_trial(source, config, samples, runtime, store, progress)
    limits = result.limits if result is not None else ()
    limited = with_limits(interface, limits)
    if result is not None and result.failure is not None and result.known is not None:
        limited = msgspec.structs.replace(limited, typical_sizes=result.known)
    profile = derive_profile(limited)
    for message in (f"no shapes given; derived shapes: {format_profile(profile, limited)}", *map(str, limits)):
        progress.report(Diagnostic(code="shapes-derived", severity="info", message=message, location=source.name))
    return profile


def _is_recorded(interface: Interface) -> bool:
    """Return whether the interface records a size of every dim, as `export` does."""
    return all(dim in interface.typical_sizes for dim in default_sizes(interface)[0])


def _run_trial(
    source: SourceGraph, config: BuildConfig, samples: str, runtime: str, store: Store | None, progress: Progress
) -> TrialResult | None:
    """Return the result of the trial; None if the source cannot be tried on this machine."""
    job = TrialJob(
        key=TrialKey(
            code=code_key(),
            source=source.summary.fingerprint,
            interface=source.summary.interface,
            samples=samples,
            runtime=runtime,
            memory_bytes=physical_memory_bytes(),
        ),
        inputs={source.absolute_path: source.summary.fingerprint},
        resources=Resources.within(config.limits),
        source=source.absolute_path,
        data=config.data,
        seed=config.seed,
    )
    try:
        return LocalExecutor(store, progress).run(job, Path()).result
    except BackendError:
        return None  # the comparison, which runs the same, reports why


@runs(TrialJob)
def run_trial_job(job: TrialJob, folder: Path, progress: Progress) -> JobOutput[TrialResult]:
    """Run the source with several sizes. Raises BackendError if it cannot be loaded."""
    interface = job.key.interface
    title = f"try the derived shapes of {Path(job.source).name}"
    with (
        progress.stage(title, StageItems("runs")) as stage,
        _open_source(job, interface, derive_profile(interface)) as failure_at,
    ):
        is_too_large = _memory_check(job)

        def trial(sizes: Mapping[str, int]) -> str | None:
            failure = failure_at(input_shapes(interface, sizes))
            stage.advance()
            return failure

        typical = default_sizes(interface)[1]
        failure = trial(typical)
        known = typical if failure is None else _find_known(typical, trial, is_too_large)
        if known is None:
            return JobOutput(result=TrialResult(known=None, failure=failure))
        limits = search_ranges(interface, known, trial, is_too_large=is_too_large)
    return JobOutput(result=TrialResult(known=known, limits=limits, failure=failure))


@contextmanager
def _open_source(
    job: TrialJob | SourceRunJob, interface: Interface, profile: Profile
) -> Iterator[Callable[[InputShapes], str | None]]:
    """Load the source of a job, and yield a function that returns why it does not run with shapes; None if it runs.

    Raises BackendError if the source cannot be loaded.
    """
    samples = []
    if job.data is not None:
        samples = kept_samples(graph_samples(job.data, interface, profile, Path(job.source), seed=job.seed))
    with registry.find_backend(portable_backend()).open(job.source) as session:
        names = {spec.name for spec in session.inputs}

        def failure_at(shapes: InputShapes) -> str | None:
            try:
                inputs = reshape_samples(samples, interface, shapes, seed=job.seed, rows="mixed")
                session.run({name: array for name, array in inputs.items() if name in names})
            except RyzenError as error:  # its message without the path of the source, which the context names
                return error.message.partition(f"`{job.source}`: ")[2] or error.message
            return None

        yield failure_at


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


def _find_known(typical: Mapping[str, int], trial: TrialFunction, is_too_large: TrialFunction) -> dict[str, int] | None:
    """Return sizes with which the source runs: other lengths for all dims but those of size 1; None if none runs."""
    for length in _LENGTHS:
        sizes = {dim: size if size == 1 else length for dim, size in typical.items()}
        if is_too_large(sizes) is None and trial(sizes) is None:
            return sizes
    return None


class SourceRunKey(JobKey, frozen=True):
    """The key of a run of one source."""

    kind: ClassVar[str] = "source-run"

    source: str
    """The fingerprint of the source."""


class SourceRunResult(Record, frozen=True):
    """Whether a source runs at all shapes of its profiles."""

    failure: str | None
    """The first shapes at which it does not run, with the reason; None: it runs at all of them, or cannot be run here."""


class SourceRunJob(Job[SourceRunResult], frozen=True, kw_only=True):
    """Run a source at the shapes of its profiles, until it fails."""

    result_type: ClassVar[Any] = SourceRunResult
    isolated: ClassVar[bool] = True
    preload: ClassVar[tuple[str, ...]] = COMPARISON_MODULES
    cacheable: ClassVar[bool] = False

    key: SourceRunKey
    source: str
    """The absolute path of the source."""
    interface: Interface
    profiles: tuple[Profile, ...]
    data: str | None
    seed: int

    @property
    def label(self) -> str:
        """The source."""
        return f"run of {Path(self.source).name}"


def source_failure(source: SourceGraph, profiles: tuple[Profile, ...], config: BuildConfig, progress: Progress) -> str | None:
    """Return why the source itself does not run at a shape of `profiles`; None if it runs, or cannot be run on this machine."""
    job = SourceRunJob(
        key=SourceRunKey(source=source.summary.fingerprint),
        resources=Resources.within(config.limits),
        source=source.absolute_path,
        interface=source.summary.interface,
        profiles=profiles,
        data=config.data,
        seed=config.seed,
    )
    try:
        return LocalExecutor(None, progress).run(job, Path()).result.failure
    except RyzenError:
        return None


@runs(SourceRunJob)
def run_source_run_job(job: SourceRunJob, folder: Path, progress: Progress) -> JobOutput[SourceRunResult]:
    """Run the source at each corner of each profile. Raises BackendError if it cannot be loaded."""
    corners = [corner for profile in job.profiles for corner in profile.corners()]
    title = f"run {Path(job.source).name} at the shapes of its profiles"
    with (
        progress.stage(title, StageItems("shapes", len(corners))) as stage,
        _open_source(job, job.interface, job.profiles[0]) as failure_at,
    ):
        for corner, shapes in counted(corners, stage):
            if (failure := failure_at(shapes)) is not None:
                at = ",".join(f"{name}:{format_shape(shape)}" for name, shape in shapes.items() if shape)
                return JobOutput(result=SourceRunResult(failure=f"at the {corner} shapes {at}: {failure}"))
    return JobOutput(result=SourceRunResult(failure=None))
