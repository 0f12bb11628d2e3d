"""Runs of a source in a child process: whether it runs with certain shapes and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile import registry
from ryzen_compile.backends.traits import portable_backend
from ryzen_compile.builder.graph_samples import graph_samples, kept_samples
from ryzen_compile.data.fixed_values import with_values
from ryzen_compile.data.reshaping import reshape_samples
from ryzen_compile.errors import RyzenError
from ryzen_compile.jobs.executor import LocalExecutor
from ryzen_compile.jobs.job import Job, JobKey, JobOutput, Resources, runs
from ryzen_compile.numerics import COMPARISON_MODULES
from ryzen_compile.progress import StageItems, counted
from ryzen_compile.spec.interface import Inputs, Interface
from ryzen_compile.spec.profile import InputShapes, Profile, format_shape
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.builder.config import BuildConfig
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.progress import Progress

SourceRunFunction = Callable[[InputShapes, Mapping[str, int]], str | None]
"""Runs a source once with shapes, and with values for all elements of some inputs; returns None, or why it does not run."""


@contextmanager
def open_source(source: str, interface: Interface, samples: Sequence[Inputs], *, seed: int) -> Iterator[SourceRunFunction]:
    """Load the source at a path, and yield a function that runs it with the values of `samples`, or with random ones.

    Raises BackendError if the source cannot be loaded.
    """
    with registry.find_backend(portable_backend()).open(source) as session:
        names = {spec.name for spec in session.inputs}

        def failure_at(shapes: InputShapes, values: Mapping[str, int]) -> str | None:
            try:
                inputs = with_values(reshape_samples(samples, interface, shapes, seed=seed, rows="mixed"), values)
                session.run({name: array for name, array in inputs.items() if name in names})
            except RyzenError as error:  # its message without the path of the source, which the context names
                return error.message.partition(f"`{source}`: ")[2] or error.message
            return None

        yield failure_at


def samples_of(data: str | None, interface: Interface, profile: Profile, source: str, *, seed: int) -> list[Inputs]:
    """Return the samples that `data` names for a source, which are kept in memory; empty if it is None."""
    if data is None:
        return []
    return kept_samples(graph_samples(data, interface, profile, Path(source), seed=seed))


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
    samples = samples_of(job.data, job.interface, job.profiles[0], job.source, seed=job.seed)
    corners = [corner for profile in job.profiles for corner in profile.corners()]
    title = f"run {Path(job.source).name} at the shapes of its profiles"
    with (
        progress.stage(title, StageItems("shapes", len(corners))) as stage,
        open_source(job.source, job.interface, samples, seed=job.seed) as failure_at,
    ):
        for corner, shapes in counted(corners, stage):
            if (failure := failure_at(shapes, {})) is not None:
                at = ",".join(f"{name}:{format_shape(shape)}" for name, shape in shapes.items() if shape)
                return JobOutput(result=SourceRunResult(failure=f"at the {corner} shapes {at}: {failure}"))
    return JobOutput(result=SourceRunResult(failure=None))
