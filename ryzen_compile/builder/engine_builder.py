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
from ryzen_compile.artifacts.package.manifest import Engine, Evidence, Refused
from ryzen_compile.backends.api import Built, Request
from ryzen_compile.backends.process.worker import start
from ryzen_compile.errors import BackendError
from ryzen_compile.utils.record import utc_now

if TYPE_CHECKING:
    from types import TracebackType

    from ryzen_compile.artifacts.cache.key import Key
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.artifacts.package.manifest import Variant
    from ryzen_compile.artifacts.package.write import Staging
    from ryzen_compile.builder.config import Limits
    from ryzen_compile.builder.sources import Source
    from ryzen_compile.builder.target_assignment import Lot
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Job:
    """One engine to build."""

    source: Source
    variant: Variant
    lot: Lot
    profiles: tuple[Profile, ...]
    options: Mapping[str, str | int | float | bool | list[str]]
    limits: Limits
    key: Callable[[Lot], Key]
    """What decides the engine for a lot of these targets."""

    @property
    def path(self) -> str:
        """Where the engine lies in the package."""
        return layout.engine_path(self.source.name, self.lot.backend, tuple(target.name for target in self.lot.targets))

    def request(self, staging: Staging) -> Request:
        """Return the order for the backend."""
        return Request(
            graph=str(staging.folder / self.variant.path),
            output=str(staging.path(self.path)),
            targets=self.lot.targets,
            profiles=self.profiles,
            options=dict(self.options),
            memory_bytes=self.limits.memory_bytes,
            seconds=self.limits.seconds,
        )

    def halves(self) -> tuple[Job, Job]:
        """Return the job as two, each for a part of the targets."""
        middle = len(self.lot.targets) // 2
        first, second = self.lot.targets[:middle], self.lot.targets[middle:]
        return replace(self, lot=replace(self.lot, targets=first)), replace(self, lot=replace(self.lot, targets=second))


@dataclass(frozen=True, kw_only=True)
class Made:
    """What became of a job."""

    engines: tuple[Engine, ...] = ()
    refused: tuple[Refused, ...] = ()


class Yard:
    """Where engines are built: one worker a backend, started before there is anything to build, one job at a time."""

    def __init__(self, staging: Staging, backends: Sequence[str], progress: Progress, store: Store | None) -> None:
        self._staging = staging
        self._progress = progress
        self._store = store
        self._workers = {backend: start(backend) for backend in dict.fromkeys(backends)}
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._abandoned = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None:
                self._abandoned.set()
                self._pool.shutdown(wait=False, cancel_futures=True)
                for worker in self._workers.values():
                    worker.abandon()
            self._pool.shutdown(cancel_futures=True)
        finally:
            for worker in self._workers.values():
                worker.close()

    def order(self, job: Job) -> Future[Made]:
        """Take a job; it is done in the background, after those ordered before it."""
        return self._pool.submit(self._make, job)

    def dismiss(self) -> None:
        """Let the workers end while the caller does the rest: nothing more is ordered."""
        for worker in self._workers.values():
            worker.dismiss()

    def _make(self, job: Job) -> Made:
        if self._abandoned.is_set():
            raise BackendError("the build was given up")
        built, is_new = self._recall(job), False
        if built is None:
            try:
                built, is_new = self._workers[job.lot.backend].build(job.request(self._staging), self._progress), True
            except BackendError as error:
                return self._without_the_guilty(job, error)
        if Path(built.path) != self._staging.path(job.path):
            return Made()  # the graph itself is what runs: there is no engine to ship
        self._staging.add(job.path, sha256=built.sha256)
        if is_new:
            self._remember(job, built)
        return Made(engines=(_engine(job, built),))

    def _recall(self, job: Job) -> Built | None:
        """Fetch an engine that was built before for the same graph, plan, targets and options."""
        if self._store is None:
            return None
        hit = self._store.get(job.key(job.lot))
        if hit is None:
            return None
        try:
            kept = msgspec.json.decode(hit.payload, type=Built)
        except msgspec.ValidationError:
            return None
        with self._staging.aside() as folder:
            if not self._store.restore(hit, folder, self._staging.finished):
                return None
            (file,) = hit.files
            (folder / file.path).rename(self._staging.path(job.path))
        self._progress.say(f"{job.path}: taken from the cache")
        return msgspec.structs.replace(kept, path=str(self._staging.path(job.path)))

    def _remember(self, job: Job, built: Built) -> None:
        if self._store is not None:
            place = Path(built.path)
            self._store.put(job.key(job.lot), place.parent, {place.name: built.sha256}, msgspec.json.encode(built))

    def _without_the_guilty(self, job: Job, error: BackendError) -> Made:
        """Build what can be built: a refusal may be one target's alone."""
        if len(job.lot.targets) > 1:
            parts = [self._make(half) for half in job.halves()]
            return Made(
                engines=tuple(engine for part in parts for engine in part.engines),
                refused=tuple(refused for part in parts for refused in part.refused),
            )
        (target,) = job.lot.targets
        reason = self._staging.relative(error.says)
        refused = Refused(target=target, graph=job.source.name, backend=job.lot.backend, reason=reason, hint=error.hint)
        return Made(refused=(refused,))


def _engine(job: Job, built: Built) -> Engine:
    return Engine(
        path=job.path,
        backend=built.backend,
        backend_version=built.backend_version,
        targets=job.lot.targets,
        graph=job.source.name,
        variant=job.variant.name,
        profiles=job.profiles,
        options=dict(job.options),
        seconds=built.seconds,
        layers=built.layers,
        warnings=built.warnings,
        evidence=(Evidence(level="built", on="this machine", says="built, not executed here", when=utc_now()),),
    )
