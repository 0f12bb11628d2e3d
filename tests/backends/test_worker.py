"""Workers: limits, crashes and the lifetime of child processes, with builders that fail like native libraries."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import child_processes
from support.faulty_builder import FaultyBackend

from ryzen_compile.backends.api import BuildRequest, BuiltEngine
from ryzen_compile.backends.process import worker
from ryzen_compile.backends.process.worker import Worker
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.spec.target import parse_targets


@pytest.fixture(autouse=True)
def python_path_of_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


EARLIER_CHILDREN: set[psutil.Process] = set()
"""Child processes that libraries started in earlier tests of this process, as the resource tracker of multiprocessing."""


def children() -> list[psutil.Process]:
    """Return the child processes that the current test started."""
    return [process for process in psutil.Process().children(recursive=True) if process not in EARLIER_CHILDREN]


@pytest.fixture(autouse=True)
def no_leaked_resources(tmp_path: Path) -> Iterator[None]:
    EARLIER_CHILDREN.update(psutil.Process().children(recursive=True))
    open_before = set(os.listdir("/proc/self/fd"))
    yield
    assert not list(tmp_path.glob("*.part"))
    assert not children()
    assert len(os.listdir("/proc/self/fd")) <= len(open_before)


def build(builder: str, folder: Path, **limits: float) -> BuiltEngine:
    with Worker(FaultyBackend(builder)) as worker_of_builder:
        return worker_of_builder.build(build_request(folder, **limits))


def build_request(folder: Path, **limits: float) -> BuildRequest:
    return BuildRequest(
        onnx_path="model.onnx", output=str(folder / "out.plan"), targets=parse_targets("sm89"), profiles=(), **limits
    )  # type: ignore[arg-type]


def test_a_caller_with_more_than_1024_open_files_may_build(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"this process may open {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert build("WorkingBuilder", tmp_path).backend == "faulty"
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_hanging_build_is_stopped_at_its_time_limit_and_names_the_node(tmp_path: Path) -> None:
    start_time = time.monotonic()
    with pytest.raises(
        BackendError, match=r"exceeded its time limit of 3 s while parsing node `culprit` \[Op\], and was stopped"
    ):
        build("HangingBuilder", tmp_path, seconds=3)
    assert time.monotonic() - start_time < 20


def test_a_child_process_that_exceeds_its_memory_limit_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match="used 0.[3-6]. GB of memory and exceeded its limit of 0.30 GB while parsing node `culprit`"
    ):
        build("MemoryHogBuilder", tmp_path, memory_bytes=300_000_000)


def test_an_abort_is_an_error_with_the_node_and_the_last_output(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"crashed with SIGABRT while parsing node `culprit` \[Op\]: terminate called after"):
        build("AbortingBuilder", tmp_path)


def test_a_killed_child_process_is_reported_as_out_of_memory(tmp_path: Path) -> None:
    with Worker(FaultyBackend("HangingBuilder")) as worker_of_builder:
        child = children()[0]
        threading.Timer(1.0, child.send_signal, [signal.SIGKILL]).start()
        with pytest.raises(BackendError, match="was killed while parsing node `culprit`") as caught:
            worker_of_builder.build(build_request(tmp_path))
    assert caught.value.hint is not None
    assert "memory" in caught.value.hint


def test_processes_started_by_the_child_process_are_stopped_with_it(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="exceeded its time limit"):
        build("ForkingBuilder", tmp_path, seconds=3)
    deadline = time.monotonic() + 5
    while any(
        "support.faulty_builder:ForkingBuilder" in (process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline"])
    ):
        assert time.monotonic() < deadline, "the process started by the child process outlived it"
        time.sleep(0.05)


def test_a_missing_library_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="the library is missing") as caught:
        build("MissingLibraryBuilder", tmp_path)
    assert caught.value.hint == "install it"


def test_unlimited_output_of_a_library_neither_blocks_nor_fills_the_disk(tmp_path: Path) -> None:
    assert build("VerboseBuilder", tmp_path, seconds=60).backend_version == "1"


def test_a_worker_executes_several_requests_in_one_child_process(tmp_path: Path) -> None:
    with Worker(FaultyBackend("WorkingBuilder")) as worker_of_builder:
        first = children()
        for _ in range(3):
            assert worker_of_builder.build(build_request(tmp_path)).path == str(tmp_path / "out.plan")
        assert children() == first


def test_after_a_crash_the_next_request_starts_a_new_child_process(tmp_path: Path) -> None:
    with Worker(FaultyBackend("AbortingBuilder")) as worker_of_builder:
        for _ in range(2):
            with pytest.raises(BackendError, match="SIGABRT"):
                worker_of_builder.build(build_request(tmp_path))


def test_a_child_process_that_was_killed_while_idle_is_replaced(tmp_path: Path) -> None:
    with Worker(FaultyBackend("WorkingBuilder")) as worker_of_builder:
        worker_of_builder.build(build_request(tmp_path))
        (idle,) = children()
        idle.kill()
        os.waitid(os.P_PID, idle.pid, os.WEXITED | os.WNOWAIT)
        assert worker_of_builder.build(build_request(tmp_path)).backend_version == "1"


def test_a_killed_build_raises_in_its_thread(tmp_path: Path) -> None:
    with Worker(FaultyBackend("HangingBuilder")) as worker_of_builder:
        threading.Timer(1.0, worker_of_builder.kill).start()
        with pytest.raises(BackendError):
            worker_of_builder.build(build_request(tmp_path))


def test_an_engine_that_cannot_be_written_is_not_a_backend_error(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match=r"`.*missing/out.plan.part`: No such file or directory") as caught:
        build("WorkingBuilder", tmp_path / "missing")
    assert not isinstance(caught.value, BackendError), "a missing folder is independent of the graph and the target"


def test_start_worker_takes_the_name_of_a_backend() -> None:
    with worker.start_worker("tensorrt-rtx"):
        (child,) = children()
        assert "ryzen_compile.backends.tensorrt_rtx.builder:TensorRTRTXBuilder" in child.cmdline()
    assert children() == []


@pytest.mark.parametrize("builder", ["HangingBuilder", "WorkingBuilder"])
def test_a_child_process_ends_when_its_parent_is_killed(builder: str, tmp_path: Path) -> None:
    code = """
import sys, threading
from pathlib import Path
from support.faulty_builder import FaultyBackend
from backends.test_worker import build_request
from ryzen_compile.backends.process.worker import Worker
worker = Worker(FaultyBackend(sys.argv[1]))
print("started", flush=True)
if sys.argv[1] == "WorkingBuilder": worker.build(build_request(Path(sys.argv[2]))); threading.Event().wait()
worker.build(build_request(Path(sys.argv[2])))
"""
    with child_processes.start(code, builder, tmp_path) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        (child,) = psutil.Process(parent.pid).children()
        time.sleep(1.0)
        parent.kill()
        child.wait(timeout=5)
    (tmp_path / "out.plan.part").unlink(missing_ok=True)


def test_a_child_process_ends_when_its_parent_is_killed_while_a_fork_of_the_parent_continues(tmp_path: Path) -> None:
    code = """
import os, sys, time
from support.faulty_builder import FaultyBackend
from ryzen_compile.backends.process.worker import Worker
worker = Worker(FaultyBackend("WorkingBuilder"))
if os.fork() == 0: time.sleep(20); os._exit(0)
print("started", flush=True)
time.sleep(20)
"""
    with child_processes.start(code) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        family = psutil.Process(parent.pid).children()
        (child,) = [process for process in family if "support.faulty_builder:WorkingBuilder" in process.cmdline()]
        parent.kill()
        child.wait(timeout=5)
        for process in family:
            if process.is_running():
                process.kill()
