"""Engines: one variant built for the targets of a lot; what a target does not get, it gets a reason for."""

from __future__ import annotations

import threading
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
    """What decides the engine for a lot of these targets."""

    @property
    def path(self) -> str:
        """Where the engine lies in the package."""
        return layout.engine_path(
            self.source.name, self.target_group.backend, tuple(target.name for target in self.target_group.targets)
        )

    def request(self, staging: Staging) -> BuildRequest:
        """Return the order for the backend."""
        return BuildRequest(
            onnx_path=str(staging.folder / self.variant.path),
            output=str(staging.path(self.path)),
            targets=self.target_group.targets,
            profiles=self.profiles,
            options=dict(self.options),
            memory_bytes=self.limits.memory_bytes,
            seconds=self.limits.seconds,
        )

    def split(self) -> tuple[EngineJob, EngineJob]:
        """Return the job as two, each for a part of the targets."""
        middle = len(self.target_group.targets) // 2
        first, second = self.target_group.targets[:middle], self.target_group.targets[middle:]
        return replace(self, target_group=replace(self.target_group, targets=first)), replace(
            self, target_group=replace(self.target_group, targets=second)
        )


@dataclass(frozen=True, kw_only=True)
class BuildOutcome:
    """What became of a job."""

    engines: tuple[EngineRecord, ...] = ()
    refused: tuple[RefusedTarget, ...] = ()


class EngineBuilder:
    """Where engines are built: one worker a backend, started before there is anything to build, one job at a time."""

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
        """Take a job; it is done in the background, after those ordered before it."""
        return self._pool.submit(self._run_job, job)

    def shutdown(self) -> None:
        """Let the workers end while the caller does the rest: nothing more is ordered."""
        for worker in self._workers.values():
            worker.shutdown()

    def _run_job(self, job: EngineJob) -> BuildOutcome:
        if self._aborted.is_set():
            raise BackendError("the build was given up")
        built, is_new = self._fetch_cached(job), False
        if built is None:
            try:
                built, is_new = self._workers[job.target_group.backend].build(job.request(self._staging), self._progress), True
            except BackendError as error:
                return self._retry_per_target(job, error)
        if Path(built.path) != self._staging.path(job.path):
            return BuildOutcome()  # the graph itself is what runs: there is no engine to ship
        self._staging.add(job.path, sha256=built.sha256)
        if is_new:
            self._cache_engine(job, built)
        return BuildOutcome(engines=(_engine_record(job, built),))

    def _fetch_cached(self, job: EngineJob) -> BuiltEngine | None:
        """Fetch an engine that was built before for the same graph, plan, targets and options."""
        if self._store is None:
            return None
        hit = self._store.get(job.cache_key(job.target_group))
        if hit is None:
            return None
        try:
            kept = msgspec.json.decode(hit.payload, type=BuiltEngine)
        except msgspec.ValidationError:
            return None
        with self._staging.scratch_dir() as folder:
            if not self._store.restore(hit, folder, self._staging.fsync_async):
                return None
            (file,) = hit.files
            (folder / file.path).rename(self._staging.path(job.path))
        self._progress.message(f"{job.path}: taken from the cache")
        return msgspec.structs.replace(kept, path=str(self._staging.path(job.path)))

    def _cache_engine(self, job: EngineJob, built: BuiltEngine) -> None:
        if self._store is not None:
            place = Path(built.path)
            self._store.put(
                job.cache_key(job.target_group), place.parent, {place.name: built.sha256}, msgspec.json.encode(built)
            )

    def _retry_per_target(self, job: EngineJob, error: BackendError) -> BuildOutcome:
        """Build what can be built: a refusal may be one target's alone."""
        if len(job.target_group.targets) > 1:
            parts = [self._run_job(half) for half in job.split()]
            return BuildOutcome(
                engines=tuple(engine for part in parts for engine in part.engines),
                refused=tuple(refused for part in parts for refused in part.refused),
            )
        (target,) = job.target_group.targets
        reason = self._staging.strip_staging_prefix(error.message)
        refused = RefusedTarget(
            target=target, graph=job.source.name, backend=job.target_group.backend, reason=reason, hint=error.hint
        )
        return BuildOutcome(refused=(refused,))


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
