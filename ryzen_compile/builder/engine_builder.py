"""Engine builder: compile variants to engines in worker processes, and record why a target could not be built."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import EngineRecord, Provenance, RefusedTarget
from ryzen_compile.backends.api import BuildRequest, BuiltEngine
from ryzen_compile.backends.process.worker import start_worker
from ryzen_compile.errors import BackendError
from ryzen_compile.utils.record import utc_now

if TYPE_CHECKING:
    from types import TracebackType

    from ryzen_compile.artifacts.cache.key import CacheKey
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.artifacts.package.manifest import VariantRecord
    from ryzen_compile.artifacts.package.write import Staging
    from ryzen_compile.builder.config import ResourceLimits
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.builder.target_assignment import TargetGroup
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.profile import Profile


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """One engine to build."""

    source: SourceGraph
    variant: VariantRecord
    target_group: TargetGroup
    profiles: tuple[Profile, ...]
    options: Mapping[str, str | int | float | bool | list[str]]
    limits: ResourceLimits
    cache_key: Callable[[TargetGroup], CacheKey]
    """Return the cache key of the engine for a group of targets."""

    @property
    def path(self) -> str:
        """The path of the engine in the package."""
        group = self.target_group
        return layout.engine_path(
            self.source.name, self.variant.name, group.backend, tuple(target.name for target in group.targets)
        )

    def request(self, staging: Staging, *, seconds: float | None) -> BuildRequest:
        """Return the build request for the backend, which may take `seconds`; None: no limit."""
        return BuildRequest(
            onnx_path=str(staging.folder / self.variant.path),
            output=str(staging.path(self.path)),
            targets=self.target_group.targets,
            profiles=self.profiles,
            options=dict(self.options),
            memory_bytes=self.limits.memory_bytes,
            seconds=seconds,
        )

    def split(self) -> tuple[EngineJob, EngineJob]:
        """Return two jobs, each for one half of the targets."""
        middle = len(self.target_group.targets) // 2
        first, second = self.target_group.targets[:middle], self.target_group.targets[middle:]
        return replace(self, target_group=replace(self.target_group, targets=first)), replace(
            self, target_group=replace(self.target_group, targets=second)
        )


@dataclass(frozen=True, kw_only=True)
class BuildOutcome:
    """The engines and the refused targets of a job."""

    engines: tuple[EngineRecord, ...] = ()
    refused: tuple[RefusedTarget, ...] = ()


class EngineBuilder:
    """Builds engines in the background, one job at a time, with one worker process per backend.

    The workers start with this object, so that they load their libraries while the graphs are rewritten.
    """

    def __init__(self, staging: Staging, backends: Sequence[str], progress: Progress, store: Store | None) -> None:
        self._staging = staging
        self._progress = progress
        self._store = store
        self._workers = {backend: start_worker(backend) for backend in dict.fromkeys(backends)}
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._aborted = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None:
                self._aborted.set()
                self._pool.shutdown(wait=False, cancel_futures=True)
                for worker in self._workers.values():
                    worker.kill()
            self._pool.shutdown(cancel_futures=True)
        finally:
            for worker in self._workers.values():
                worker.close()

    def submit(self, job: EngineJob) -> Future[BuildOutcome]:
        """Queue a job; it runs in the background, after the jobs submitted before it."""
        return self._pool.submit(self._run_job, job)

    def shutdown(self) -> None:
        """Let the workers exit while the caller continues; no job may be submitted afterwards."""
        for worker in self._workers.values():
            worker.shutdown()

    def _run_job(self, job: EngineJob) -> BuildOutcome:
        seconds = job.limits.seconds
        return self._build(job, deadline=None if seconds is None else time.monotonic() + seconds)

    def _build(self, job: EngineJob, *, deadline: float | None) -> BuildOutcome:
        """Build an engine for the targets of `job`, or for those of them that can be built, until `deadline`."""
        if self._aborted.is_set():
            raise BackendError("the build was aborted")
        built, is_new = self._fetch_cached(job), False
        if built is None:
            seconds = None if deadline is None else deadline - time.monotonic()
            if seconds is not None and seconds <= 0:
                return self._refuse(job, _time_limit_error(job))
            try:
                request = job.request(self._staging, seconds=seconds)
                built, is_new = self._workers[job.target_group.backend].build(request, self._progress), True
            except BackendError as error:
                if len(job.target_group.targets) > 1 and error.may_be_one_target:
                    return self._build_halves(job, deadline)
                return self._refuse(job, error)
        if Path(built.path) != self._staging.path(job.path):
            return BuildOutcome()  # the backend runs the graph itself: there is no engine file
        self._staging.add(job.path, sha256=built.sha256)
        if is_new:
            self._cache_engine(job, built)
        return BuildOutcome(engines=(_engine_record(job, built),))

    def _build_halves(self, job: EngineJob, deadline: float | None) -> BuildOutcome:
        """Build each half of the targets of a refused job separately: the refusal may concern only one target."""
        outcomes = [self._build(half, deadline=deadline) for half in job.split()]
        return BuildOutcome(
            engines=tuple(engine for outcome in outcomes for engine in outcome.engines),
            refused=tuple(target for outcome in outcomes for target in outcome.refused),
        )

    def _refuse(self, job: EngineJob, error: BackendError) -> BuildOutcome:
        reason = self._staging.strip_staging_prefix(error.message)
        return BuildOutcome(
            refused=tuple(
                RefusedTarget(
                    target=target,
                    graph=job.source.name,
                    variant=job.variant.name,
                    backend=job.target_group.backend,
                    reason=reason,
                    hint=error.hint,
                )
                for target in job.target_group.targets
            )
        )

    def _fetch_cached(self, job: EngineJob) -> BuiltEngine | None:
        """Fetch the engine from the cache if one was built for the same graph, pipeline, targets and options."""
        if self._store is None:
            return None
        hit = self._store.get(job.cache_key(job.target_group))
        if hit is None:
            return None
        try:
            cached = msgspec.json.decode(hit.payload, type=BuiltEngine)
        except msgspec.ValidationError:
            return None
        with self._staging.scratch_dir() as folder:
            if not self._store.restore(hit, folder, self._staging.fsync_async):
                return None
            (file,) = hit.files
            (folder / file.path).rename(self._staging.path(job.path))
        self._progress.message(f"{job.path}: taken from the cache")
        return msgspec.structs.replace(cached, path=str(self._staging.path(job.path)))

    def _cache_engine(self, job: EngineJob, built: BuiltEngine) -> None:
        if self._store is not None:
            file = Path(built.path)
            self._store.put(job.cache_key(job.target_group), file.parent, {file.name: built.sha256}, msgspec.json.encode(built))


def _time_limit_error(job: EngineJob) -> BackendError:
    return BackendError(
        f"the time limit of {job.limits.seconds:g} s ended after a build with other targets was refused, "
        "before an engine without them could be built",
        hint="give the build more time, or build for fewer targets",
    )


def _engine_record(job: EngineJob, built: BuiltEngine) -> EngineRecord:
    return EngineRecord(
        path=job.path,
        backend=built.backend,
        backend_version=built.backend_version,
        targets=job.target_group.targets,
        graph=job.source.name,
        variant=job.variant.name,
        profiles=job.profiles,
        options=dict(job.options),
        seconds=built.seconds,
        layers=built.layers,
        warnings=built.warnings,
        provenance=(
            Provenance(level="built", machine="this machine", message="built, not executed here", timestamp=utc_now()),
        ),
    )
