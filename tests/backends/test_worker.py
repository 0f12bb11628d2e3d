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
def children_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert not list(tmp_path.glob("*.part"))
    assert not psutil.Process().children(recursive=True)
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def build(builder: str, folder: Path, **bounds: float) -> BuiltEngine:
    with Worker(FaultyBackend(builder)) as working:
        return working.build(ask(folder, **bounds))


def ask(folder: Path, **bounds: float) -> BuildRequest:
    return BuildRequest(
        onnx_path="model.onnx", output=str(folder / "out.plan"), targets=parse_targets("sm89"), profiles=(), **bounds
    )  # type: ignore[arg-type]


def test_a_caller_with_more_than_1024_open_files_may_build(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"this process may open {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert build("Well", tmp_path).backend == "faulty"
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_hang_is_stopped_at_its_bound_and_names_the_node(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(BackendError, match=r"took longer than its 3 s while parsing node `culprit` \[Op\], and was stopped"):
        build("Hangs", tmp_path, seconds=3)
    assert time.monotonic() - began < 20


def test_a_child_that_takes_too_much_memory_is_stopped_near_its_bound(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="took 0.[3-6]. GB of memory, more than its 0.30 GB while parsing node `culprit`"):
        build("Hungry", tmp_path, memory_bytes=300_000_000)


def test_an_abort_is_an_error_with_the_node_and_the_last_words(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"died of SIGABRT while parsing node `culprit` \[Op\]: terminate called after"):
        build("Aborts", tmp_path)


def test_a_killed_child_is_taken_for_out_of_memory(tmp_path: Path) -> None:
    with Worker(FaultyBackend("Hangs")) as working:
        child = psutil.Process().children()[0]
        threading.Timer(1.0, child.send_signal, [signal.SIGKILL]).start()
        with pytest.raises(BackendError, match="was killed while parsing node `culprit`") as caught:
            working.build(ask(tmp_path))
    assert caught.value.hint is not None
    assert "memory" in caught.value.hint


def test_what_the_child_started_is_stopped_with_it(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="took longer"):
        build("ForksAndHangs", tmp_path, seconds=3)
    deadline = time.monotonic() + 5
    while any(
        "support.faulty_builder:ForksAndHangs" in (process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline"])
    ):
        assert time.monotonic() < deadline, "the child's own child outlived it"
        time.sleep(0.05)


def test_a_library_that_is_not_there_is_a_refusal_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="its library is not there") as caught:
        build("IsNotThere", tmp_path)
    assert caught.value.hint == "install it"


def test_a_library_that_prints_without_end_neither_blocks_nor_fills_the_disk(tmp_path: Path) -> None:
    assert build("Chatters", tmp_path, seconds=60).backend_version == "1"


def test_a_worker_serves_one_request_after_the_other_with_one_child(tmp_path: Path) -> None:
    with Worker(FaultyBackend("Well")) as working:
        first = psutil.Process().children()
        for _ in range(3):
            assert working.build(ask(tmp_path)).path == str(tmp_path / "out.plan")
        assert psutil.Process().children() == first


def test_after_a_crash_the_next_request_has_a_fresh_child(tmp_path: Path) -> None:
    with Worker(FaultyBackend("Aborts")) as working:
        for _ in range(2):
            with pytest.raises(BackendError, match="SIGABRT"):
                working.build(ask(tmp_path))


def test_a_child_that_was_killed_while_idle_is_replaced(tmp_path: Path) -> None:
    with Worker(FaultyBackend("Well")) as working:
        working.build(ask(tmp_path))
        (idle,) = psutil.Process().children()
        idle.kill()
        os.waitid(os.P_PID, idle.pid, os.WEXITED | os.WNOWAIT)
        assert working.build(ask(tmp_path)).backend_version == "1"


def test_an_abandoned_build_fails_where_it_runs(tmp_path: Path) -> None:
    with Worker(FaultyBackend("Hangs")) as working:
        threading.Timer(1.0, working.kill).start()
        with pytest.raises(BackendError):
            working.build(ask(tmp_path))


def test_an_engine_that_cannot_be_written_is_an_error_and_not_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match=r"`.*missing/out.plan.part`: No such file or directory") as caught:
        build("Well", tmp_path / "missing")
    assert not isinstance(caught.value, BackendError), "a folder that is gone says nothing about the graph or the target"


def test_start_takes_a_backend_by_its_name() -> None:
    with worker.start_worker("tensorrt-rtx"):
        (child,) = psutil.Process().children()
        assert "ryzen_compile.backends.tensorrt_rtx.backend:TensorRTRTXBuilder" in child.cmdline()
    assert psutil.Process().children() == []


@pytest.mark.parametrize("builder", ["Hangs", "Well"])
def test_a_child_is_gone_when_its_parent_is_killed(builder: str, tmp_path: Path) -> None:
    code = """
import sys, threading
from pathlib import Path
from support.faulty_builder import Faulty
from backends.test_worker import ask
from ryzen_compile.backends.process.worker import Worker
working = Worker(Faulty(sys.argv[1]))
print("started", flush=True)
if sys.argv[1] == "Well": working.build(ask(Path(sys.argv[2]))); threading.Event().wait()
working.build(ask(Path(sys.argv[2])))
"""
    with child_processes.start(code, builder, tmp_path) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        (child,) = psutil.Process(parent.pid).children()
        time.sleep(1.0)
        parent.kill()
        child.wait(timeout=5)
    (tmp_path / "out.plan.part").unlink(missing_ok=True)


def test_a_child_is_gone_when_its_parent_is_killed_while_a_fork_of_the_parent_lives_on(tmp_path: Path) -> None:
    code = """
import os, sys, time
from support.faulty_builder import Faulty
from ryzen_compile.backends.process.worker import Worker
working = Worker(Faulty("Well"))
if os.fork() == 0: time.sleep(20); os._exit(0)
print("started", flush=True)
time.sleep(20)
"""
    with child_processes.start(code) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        family = psutil.Process(parent.pid).children()
        (child,) = [one for one in family if "support.faulty_builder:Well" in one.cmdline()]
        parent.kill()
        child.wait(timeout=5)
        for one in family:
            if one.is_running():
                one.kill()
