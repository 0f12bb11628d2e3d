"""Engines: jobs that compile variants in child processes, and the reasons why a target could not be built for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import msgspec

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import EngineRecord, Provenance, RefusedTarget
from ryzen_compile.backends.api import BuildRequest, BuiltEngine
from ryzen_compile.backends.process.worker import start_worker
from ryzen_compile.backends.traits import find_traits
from ryzen_compile.builder.cache_keys import EngineKey
from ryzen_compile.errors import BackendError
from ryzen_compile.jobs.job import Job, JobOutput, Resources, runs
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import Target
from ryzen_compile.utils.record import utc_now

if TYPE_CHECKING:
    from types import TracebackType

    from ryzen_compile.artifacts.package.manifest import VariantRecord
    from ryzen_compile.artifacts.package.write import Staging
    from ryzen_compile.backends.process.in_process import InProcessWorker
    from ryzen_compile.backends.process.worker import Worker
    from ryzen_compile.jobs.executor import Executor
    from ryzen_compile.processes.limits import ResourceLimits
    from ryzen_compile.progress import Progress

_ENGINE = "engine"
"""The name of the output file."""


class EngineJob(Job[BuiltEngine], frozen=True, kw_only=True):
    """Compile one graph to one engine. There is no output file if the backend runs the graph itself."""

    result_type: ClassVar[Any] = BuiltEngine

    key: EngineKey
    graph: str
    """The path of the graph, in the folder of the job."""
    output: str
    """The path of the engine, in the folder of the job."""
    targets: tuple[Target, ...]
    profiles: tuple[Profile, ...]

    @property
    def label(self) -> str:
        """The path of the engine."""
        return self.output

    def path_of(self, name: str) -> str:
        """Return the path of the engine."""
        return self.output


@runs(EngineJob)
def run_engine_job(job: EngineJob, folder: Path, progress: Progress) -> JobOutput[BuiltEngine]:
    """Compile the engine in a new child process, or in this one if the backend has no worker."""
    with EngineWorkers([job.key.backend]) as workers:
        return workers.run(job, folder, progress)


def _compile(worker: Worker | InProcessWorker, job: EngineJob, folder: Path, progress: Progress) -> JobOutput[BuiltEngine]:
    output = folder / job.output
    output.parent.mkdir(parents=True, exist_ok=True)
    request = BuildRequest(
        onnx_path=str(folder / job.graph),
        output=str(output),
        targets=job.targets,
        profiles=job.profiles,
        options=job.key.builder.options,
        memory_bytes=job.resources.memory_bytes,
        seconds=job.resources.seconds,
    )
    built = worker.build(request, progress)
    if Path(built.path) != output:  # the backend runs the graph itself
        return JobOutput(result=built, complete=False)
    return JobOutput(result=msgspec.structs.replace(built, path=_ENGINE), files={_ENGINE: built.sha256})


class EngineWorkers:
    """One child process per backend. They start with this object and load their libraries while graphs are rewritten."""

    def __init__(self, backends: Sequence[str]) -> None:
        self._workers = {backend: start_worker(backend) for backend in dict.fromkeys(backends)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers.values():
            worker.close()

    def run(self, job: EngineJob, folder: Path, progress: Progress) -> JobOutput[BuiltEngine]:
        """Run an engine job in the worker of its backend."""
        return _compile(self._workers[job.key.backend], job, folder, progress)

    def kill(self) -> None:
        """Abort the build that runs in another thread; it raises BackendError there."""
        for worker in self._workers.values():
            worker.kill()

    def shutdown(self) -> None:
        """Let the workers exit while the caller continues; no job may be run afterwards."""
        for worker in self._workers.values():
            worker.shutdown()


@dataclass(frozen=True, kw_only=True)
class PlannedEngine:
    """An engine to build from a variant of a graph."""

    graph: str
    variant: VariantRecord
    key: EngineKey
    targets: tuple[Target, ...]
    profiles: tuple[Profile, ...]
    limits: ResourceLimits

    def job(self, seconds: float | None) -> EngineJob:
        """Return the job, which may take `seconds`; None: no limit."""
        needs_gpu = find_traits(self.key.backend).needs_gpu_to_build
        return EngineJob(
            key=self.key,
            inputs={self.variant.path: self.key.graph, **{path: Path(path).name for path in self.variant.weights}},
            resources=Resources(
                memory_bytes=self.limits.memory_bytes, seconds=seconds, gpu=self.targets[0].sm if needs_gpu else None
            ),
            graph=self.variant.path,
            output=layout.engine_path(self.graph, self.variant.name, self.key.backend, self.key.builder.targets),
            targets=self.targets,
            profiles=self.profiles,
        )

    def split(self) -> tuple[PlannedEngine, PlannedEngine]:
        """Return two engines, each for one half of the targets."""
        middle = len(self.targets) // 2
        return self._with_targets(self.targets[:middle]), self._with_targets(self.targets[middle:])

    def _with_targets(self, targets: tuple[Target, ...]) -> PlannedEngine:
        builder = msgspec.structs.replace(self.key.builder, targets=tuple(target.name for target in targets))
        return replace(self, targets=targets, key=msgspec.structs.replace(self.key, builder=builder))


@dataclass(frozen=True, kw_only=True)
class BuildOutcome:
    """The engines that were built for a target group, and the refused targets."""

    engines: tuple[EngineRecord, ...] = ()
    refused: tuple[RefusedTarget, ...] = ()


def build_engine(planned: PlannedEngine, executor: Executor, staging: Staging) -> BuildOutcome:
    """Build an engine for all targets of `planned`, or engines for those of them that can be built, within its time limit."""
    seconds = planned.limits.seconds
    return _build(planned, executor, staging, deadline=None if seconds is None else time.monotonic() + seconds)


def _build(planned: PlannedEngine, executor: Executor, staging: Staging, *, deadline: float | None) -> BuildOutcome:
    seconds = None if deadline is None else deadline - time.monotonic()
    if seconds is not None and seconds <= 0:
        return _refuse(planned, _time_limit_error(planned), staging)
    job = planned.job(seconds)
    try:
        output = executor.run(job, staging.folder)
    except BackendError as error:
        if len(planned.targets) > 1 and error.may_be_one_target:
            # The refusal may concern only one target: build each half separately.
            outcomes = [_build(half, executor, staging, deadline=deadline) for half in planned.split()]
            return BuildOutcome(
                engines=tuple(engine for outcome in outcomes for engine in outcome.engines),
                refused=tuple(target for outcome in outcomes for target in outcome.refused),
            )
        return _refuse(planned, error, staging)
    if not output.files:
        return BuildOutcome()
    staging.add(job.output, sha256=output.files[_ENGINE])
    return BuildOutcome(engines=(_engine_record(planned, job, output.result),))


def _refuse(planned: PlannedEngine, error: BackendError, staging: Staging) -> BuildOutcome:
    reason = staging.strip_staging_prefix(error.message)
    return BuildOutcome(
        refused=tuple(
            RefusedTarget(
                target=target,
                graph=planned.graph,
                variant=planned.variant.name,
                backend=planned.key.backend,
                reason=reason,
                hint=error.hint,
            )
            for target in planned.targets
        )
    )


def _time_limit_error(planned: PlannedEngine) -> BackendError:
    return BackendError(
        f"the time limit of {planned.limits.seconds:g} s ended after a build with other targets was refused, "
        "before an engine without them could be built",
        hint="give the build more time, or build for fewer targets",
    )


def _engine_record(planned: PlannedEngine, job: EngineJob, built: BuiltEngine) -> EngineRecord:
    return EngineRecord(
        path=job.output,
        backend=built.backend,
        backend_version=built.backend_version,
        targets=job.targets,
        graph=planned.graph,
        variant=planned.variant.name,
        profiles=job.profiles,
        options=job.key.builder.options,
        seconds=built.seconds,
        layers=built.layers,
        warnings=built.warnings,
        provenance=(
            Provenance(level="built", machine="this machine", message="built, not executed here", timestamp=utc_now()),
        ),
    )
