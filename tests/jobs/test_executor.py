"""Tests of the local executor: reuse of stored results, abort, exclusive jobs and missing resources."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from support.cache_entries import RecordingProgress
from support.text_jobs import TextLength, UpperCaseJob, run_upper_case_job, upper_case_job

from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.jobs.executor import LocalExecutor
from ryzen_compile.jobs.job import JobOutput, Resources, decode_job, encode_job
from ryzen_compile.progress import Progress, SilentProgress


class CountingFunction:
    """Runs upper-case jobs and counts them."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, job: UpperCaseJob, folder: Path, progress: Progress) -> JobOutput[TextLength]:
        self.runs += 1
        return run_upper_case_job(job, folder, progress)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def function() -> CountingFunction:
    return CountingFunction()


@pytest.fixture
def progress() -> RecordingProgress:
    return RecordingProgress()


@pytest.fixture
def executor(store: Store, function: CountingFunction, progress: RecordingProgress) -> LocalExecutor:
    return LocalExecutor(store, progress, functions={UpperCaseJob: function})


def test_a_stored_result_takes_the_place_of_a_run(
    executor: LocalExecutor, function: CountingFunction, progress: RecordingProgress, tmp_path: Path
) -> None:
    first = executor.run(upper_case_job(tmp_path / "one", "text"), tmp_path / "one")
    assert progress.lines == []
    second = executor.run(upper_case_job(tmp_path / "two", "text", output="other.txt"), tmp_path / "two")
    assert function.runs == 1
    assert second == first
    assert first.result == TextLength(characters=4)
    assert (tmp_path / "two" / "other.txt").read_text() == "TEXT"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["in.txt", "other.txt", "shared"]
    assert progress.lines == ["upper-case: taken from the cache"]


def test_another_key_is_another_run(executor: LocalExecutor, function: CountingFunction, tmp_path: Path) -> None:
    for text in ("a", "b"):
        executor.run(upper_case_job(tmp_path / text, text), tmp_path / text)
    assert function.runs == 2


def test_without_a_store_every_job_runs(function: CountingFunction, tmp_path: Path) -> None:
    executor = LocalExecutor(None, SilentProgress(), functions={UpperCaseJob: function})
    for _ in range(2):
        executor.run(upper_case_job(tmp_path / "one", "text"), tmp_path / "one")
    assert function.runs == 2


def test_a_file_that_is_named_by_its_digest_is_shared(executor: LocalExecutor, tmp_path: Path) -> None:
    executor.run(upper_case_job(tmp_path / "one", "text"), tmp_path / "one")
    executor.run(upper_case_job(tmp_path / "one", "twice", output="twice.txt"), tmp_path / "one")
    (shared,) = (tmp_path / "one" / "shared").iterdir()
    (tmp_path / "two" / "shared").mkdir(parents=True)
    (tmp_path / "two" / "shared" / shared.name).write_text("t")
    executor.run(upper_case_job(tmp_path / "two", "text"), tmp_path / "two")
    assert (tmp_path / "two" / "out.txt").read_text() == "TEXT"


def test_a_damaged_file_is_made_again(
    executor: LocalExecutor, function: CountingFunction, store: Store, tmp_path: Path
) -> None:
    executor.run(upper_case_job(tmp_path / "one", "text"), tmp_path / "one")
    for blob, _ in store.blobs():
        blob.chmod(0o600)
        blob.write_bytes(b"x" * blob.stat().st_size)
    executor.run(upper_case_job(tmp_path / "two", "text"), tmp_path / "two")
    assert function.runs == 2
    assert (tmp_path / "two" / "out.txt").read_text() == "TEXT"


def test_a_result_of_another_format_is_made_again(
    executor: LocalExecutor, function: CountingFunction, store: Store, tmp_path: Path
) -> None:
    job = upper_case_job(tmp_path / "one", "text")
    store.put(job.key.cache_key, tmp_path, {}, b'{"length": 4}')
    assert executor.run(job, tmp_path / "one").result == TextLength(characters=4)
    assert function.runs == 1


def test_an_incomplete_result_is_not_stored(store: Store, tmp_path: Path) -> None:
    runs = []

    def run(job: UpperCaseJob, folder: Path, progress: Progress) -> JobOutput[TextLength]:
        runs.append(job)
        return JobOutput(result=TextLength(characters=0), complete=False)

    executor = LocalExecutor(store, SilentProgress(), functions={UpperCaseJob: run})
    for _ in range(2):
        executor.run(upper_case_job(tmp_path / "one", "text"), tmp_path / "one")
    assert len(runs) == 2


def test_a_job_that_is_not_cacheable_always_runs(store: Store, function: CountingFunction, tmp_path: Path) -> None:
    class MeasurementLikeJob(UpperCaseJob, frozen=True):
        cacheable: ClassVar[bool] = False

    executor = LocalExecutor(store, SilentProgress(), functions={MeasurementLikeJob: function})
    job = upper_case_job(tmp_path / "one", "text")
    measurement = MeasurementLikeJob(key=job.key, source=job.source, output=job.output)
    for _ in range(2):
        executor.run(measurement, tmp_path / "one")
    assert function.runs == 2
    assert list(store.blobs()) == []


def test_a_failed_job_is_not_stored(store: Store, executor: LocalExecutor, function: CountingFunction, tmp_path: Path) -> None:
    def fail(*_: Any) -> JobOutput[TextLength]:
        raise BackendError("no runtime")

    job = upper_case_job(tmp_path / "one", "text")
    with pytest.raises(BackendError, match="no runtime"):
        LocalExecutor(store, SilentProgress(), functions={UpperCaseJob: fail}).run(job, tmp_path / "one")
    executor.run(job, tmp_path / "one")
    assert function.runs == 1


def test_a_job_runs_in_another_folder_from_its_json_form_and_its_input_files(tmp_path: Path) -> None:
    sent = encode_job(upper_case_job(tmp_path / "here", "text"))
    received = decode_job(sent)
    (tmp_path / "there").mkdir()
    for path in received.inputs:
        (tmp_path / "there" / path).write_bytes((tmp_path / "here" / path).read_bytes())
    output = LocalExecutor(None, SilentProgress()).run(received, tmp_path / "there")
    assert output.result == TextLength(characters=4)
    assert (tmp_path / "there" / "out.txt").read_text() == "TEXT"


def test_after_an_error_running_jobs_are_stopped_and_no_further_job_starts(tmp_path: Path) -> None:
    started, stopped = threading.Event(), threading.Event()

    def wait(job: UpperCaseJob, folder: Path, progress: Progress) -> JobOutput[TextLength]:
        started.set()
        assert stopped.wait(10), "the running job was not stopped"
        raise BackendError("killed")

    job = upper_case_job(tmp_path / "one", "text")
    executor = LocalExecutor(None, SilentProgress(), functions={UpperCaseJob: wait}, on_abort=stopped.set)
    with suppress(ZeroDivisionError), executor:
        futures = [executor.submit(lambda: executor.run(job, tmp_path / "one")) for _ in range(3)]
        assert started.wait(10)
        raise ZeroDivisionError
    assert str(futures[0].exception()) == "killed"
    assert all(future.cancelled() for future in futures[1:])
    with pytest.raises(RyzenError, match="was not started: the jobs were stopped after an error"):
        executor.run(job, tmp_path / "one")


def test_an_exclusive_job_runs_alone(tmp_path: Path) -> None:
    running: list[str] = []
    together: list[tuple[str, ...]] = []

    def run(job: UpperCaseJob, folder: Path, progress: Progress) -> JobOutput[TextLength]:
        running.append("exclusive" if job.resources.exclusive else "shared")
        together.append(tuple(running))
        time.sleep(0.05)
        together.append(tuple(running))
        running.pop()
        return JobOutput(result=TextLength(characters=0))

    executor = LocalExecutor(None, SilentProgress(), functions={UpperCaseJob: run})
    shared = upper_case_job(tmp_path / "one", "text")
    exclusive = msgspec.structs.replace(shared, resources=Resources(exclusive=True))
    threads = [threading.Thread(target=executor.run, args=(job, tmp_path)) for job in [shared, shared, exclusive] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(names == ("exclusive",) for names in together if "exclusive" in names), together
    assert ("shared", "shared") in together


def test_a_job_that_needs_a_missing_gpu_is_refused(executor: LocalExecutor, tmp_path: Path) -> None:
    job = msgspec.structs.replace(upper_case_job(tmp_path / "one", "text"), resources=Resources(gpu=75))
    with pytest.raises(BackendError, match=r"upper-case needs a GPU of type sm75, and this machine has"):
        executor.run(job, tmp_path / "one")
