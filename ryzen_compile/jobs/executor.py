"""`Executor`: runs jobs, or reuses their stored results; `LocalExecutor` does so in this process and its child processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import msgspec

from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.jobs.isolated import run_isolated
from ryzen_compile.jobs.job import Job, JobFunction, JobOutput, run_function
from ryzen_compile.spec.target import detect_gpus

if TYPE_CHECKING:
    from types import TracebackType

    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.progress import Progress

ResultT = TypeVar("ResultT")
_T = TypeVar("_T")


class Executor(Protocol):
    """Runs jobs. Its methods may be called from several threads."""

    def run(self, job: Job[ResultT], folder: Path) -> JobOutput[ResultT]:
        """Return the output of `job`, whose files are then in `folder`: from the cache if it has them, otherwise by running it.

        Raises RyzenError if the executor was aborted, BackendError if the job cannot be run or exceeds its limits, and any
        other error of the job.
        """
        ...

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Call `work`, which runs jobs, in the background, after the calls that were submitted before."""
        ...


class LocalExecutor:
    """Runs each job in the thread that asks for it; isolated jobs, and jobs that compile, run in child processes.

    Complete results of cacheable jobs are stored as soon as they exist. An interrupted sequence of jobs therefore resumes when
    it is run again: finished jobs are found in the store, and the others run. As a context manager, the executor waits for
    submitted work; after an error it aborts that work: no further job starts.
    """

    def __init__(
        self,
        store: Store | None,
        progress: Progress,
        *,
        functions: Mapping[type[Job[Any]], JobFunction] | None = None,
        on_restored: Callable[[Path], object] | None = None,
        on_abort: Callable[[], None] | None = None,
    ) -> None:
        """Create an executor without running anything.

        `functions` replaces the registered functions of some types of jobs, by functions that use what this process has
        already loaded. `on_restored` is called with each file that is copied from `store`, from several threads. `on_abort`
        must stop the running jobs.
        """
        self._store = store
        self._progress = progress
        self._functions = functions or {}
        self._on_restored = on_restored
        self._on_abort = on_abort
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._aborted = threading.Event()
        self._run_lock = _SharedLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._aborted.set()
            self._pool.shutdown(wait=False, cancel_futures=True)
            if self._on_abort is not None:
                self._on_abort()
        self._pool.shutdown(cancel_futures=True)

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Call `work` in a background thread, after the calls that were submitted before."""
        return self._pool.submit(work)

    def run(self, job: Job[ResultT], folder: Path) -> JobOutput[ResultT]:
        """Return the output of `job`; see `Executor.run`. An exclusive job must not be run by another job."""
        if self._aborted.is_set():
            raise RyzenError(f"{job.label} was not started: the jobs were stopped after an error")
        found = self._fetch(job, folder)
        if found is not None:
            return found
        _check_gpu(job)
        function = self._functions.get(type(job)) or (run_isolated if job.isolated else run_function(type(job)))
        with self._run_lock.hold(exclusive=job.resources.exclusive):
            output: JobOutput[ResultT] = function(job, folder, self._progress)
        if self._store is not None and job.cacheable and output.complete:
            payload = msgspec.json.encode(output.result)
            self._store.put(job.key.cache_key, folder, output.files, payload, path_of=job.path_of)
        return output

    def _fetch(self, job: Job[ResultT], folder: Path) -> JobOutput[ResultT] | None:
        """Return the stored output of `job` and copy its files to `folder`, or None if there is none or it is damaged."""
        hit = self._store.get(job.key.cache_key) if self._store is not None and job.cacheable else None
        if self._store is None or hit is None:
            return None
        try:
            result: ResultT = msgspec.json.decode(hit.payload, type=job.result_type)
        except msgspec.ValidationError:
            return None  # stored by a version with another format
        # A file that is named by its digest may be there already: outputs of several jobs share weights.
        paths = {file.name: folder / job.path_of(file.name) for file in hit.files}
        missing = [file for file in hit.files if paths[file.name].name != file.sha256 or not paths[file.name].exists()]
        if missing:
            with self._progress.stage("fetch from the cache"):
                if not self._store.restore(replace(hit, files=tuple(missing)), folder, self._on_restored, path_of=job.path_of):
                    return None
        if (message := job.reuse_message(result)) is not None:
            self._progress.report(Diagnostic(code="cache-hit", severity="info", message=message))
        return JobOutput(result=result, files={file.name: file.sha256 for file in hit.files})


class _SharedLock:
    """A shared or exclusive lock: any number of jobs hold it at the same time, or one exclusive job."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running = 0
        self._exclusive = False

    @contextmanager
    def hold(self, *, exclusive: bool) -> Iterator[None]:
        """Hold the lock in a `with` block; waits until that is possible."""
        with self._condition:
            self._condition.wait_for(lambda: not self._exclusive and not (exclusive and self._running))
            self._running += 1
            self._exclusive = exclusive
        try:
            yield
        finally:
            with self._condition:
                self._running -= 1
                self._exclusive = False
                self._condition.notify_all()


def _check_gpu(job: Job[Any]) -> None:
    """Raise BackendError if this machine lacks the GPU that `job` needs."""
    if job.resources.gpu is None:
        return
    found = [gpu.sm for gpu in detect_gpus()]
    if job.resources.gpu not in found:
        names = ", ".join(f"sm{sm}" for sm in found) or "no GPU"
        raise BackendError(
            f"{job.label} needs a GPU of type sm{job.resources.gpu}, and this machine has {names}",
            hint="run it on a machine with such a GPU",
            may_be_one_target=False,
        )
