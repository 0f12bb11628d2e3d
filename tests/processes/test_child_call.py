"""Calls in child processes: results, errors, limits, crashes, and nothing that remains afterwards."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.processes import child_call, limits
from ryzen_compile.processes.child_call import call_in_child
from ryzen_compile.processes.limits import ResourceLimits, available_memory_bytes
from ryzen_compile.processes.relayed_progress import ADVANCE_SECONDS, RelayedStage
from ryzen_compile.progress import StageItems

OPERATION = "while running model.onnx, on x 2x3"


def call(name: str, argument: object = None, **options: Any) -> Any:
    encoded = call_in_child(
        f"support.faulty_functions:{name}", msgspec.json.encode(argument), label="trial of model.onnx", **options
    )
    return msgspec.json.decode(encoded)


def server_children() -> list[psutil.Process]:
    """Return the processes that the fork server of this process started."""
    servers = [process for process in psutil.Process().children() if "ryzen_compile.processes.fork_server" in process.cmdline()]
    return [child for server in servers for child in server.children(recursive=True)]


@pytest.fixture(autouse=True)
def nothing_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    call("describe_process")  # starts the server
    open_before = set(os.listdir("/proc/self/fd"))
    yield
    assert not list(scratch.iterdir())
    assert not server_children()
    assert not [process for process in psutil.process_iter(["cmdline"]) if "child-of-hang" in (process.info["cmdline"] or ())]
    assert len(os.listdir("/proc/self/fd")) <= len(open_before)


class RecordedStage:
    def __init__(self) -> None:
        self.counts = list[int]()

    def advance(self, count: int = 1) -> None:
        self.counts.append(count)


class RecordedProgress:
    def __init__(self) -> None:
        self.events: list[str] = []
        self.stages: list[RecordedStage] = []

    @contextmanager
    def stage(self, title: str, items: StageItems | None = None) -> Iterator[RecordedStage]:
        self.events.append(f"begin {title}" + (f" of {items.count} {items.unit}" if items else ""))
        stage = RecordedStage()
        self.stages.append(stage)
        yield stage
        self.events.append(f"end {title}")

    def report(self, diagnostic: Diagnostic) -> None:
        self.events.append(diagnostic.message)


def test_a_call_has_the_environment_of_the_caller_and_reports_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RYZEN_COMPILE_TEST", "set after the server started")
    progress = RecordedProgress()
    result = call("describe_process", [1, "two"], progress=progress)
    assert result["argument"] == [1, "two"]
    assert result["folder"] == str(tmp_path)
    assert result["variable"] == "set after the server started"
    assert Path(result["temporary"]).is_relative_to(tmp_path / "scratch")
    assert result["pid"] != os.getpid()
    assert progress.events == ["begin describe", "described", "end describe"]


def test_counts_of_nested_stages_are_relayed_in_few_events() -> None:
    progress = RecordedProgress()
    call("count_items", 20_000, progress=progress)
    assert progress.events == [
        "begin outer of 20001 items",
        "begin inner of None parts",
        "end inner",
        "begin failing",
        "end failing",
        "end outer",
    ]
    outer, inner, failing = (stage.counts for stage in progress.stages)
    assert sum(outer) == 20_001
    assert outer[0] == 1, "the first item is sent at once"
    assert len(outer) < 1_000
    assert (inner, failing) == ([3], [])


def test_counts_are_sent_at_most_once_in_an_interval_and_none_is_lost() -> None:
    now, sent = [0.0], list[tuple[float, int]]()
    stage = RelayedStage(0, lambda event: sent.append((now[0], event.count)), lambda: now[0])
    for _ in range(100):
        stage.advance(2)
        now[0] += ADVANCE_SECONDS / 4
    assert sent[0] == (0.0, 2), "the first item is sent at once"
    assert 20 <= len(sent) <= 26
    assert all(after - before >= 0.99 * ADVANCE_SECONDS for (before, _), (after, _) in itertools.pairwise(sent))
    stage.flush()
    stage.flush()
    assert sum(count for _, count in sent) == 200
    assert all(count for _, count in sent)


def test_errors_keep_their_type_message_hint_and_location() -> None:
    with pytest.raises(ShapeError) as caught:
        call("refuse", "shape")
    assert (caught.value.message, caught.value.hint) == ("x: `x` has 3 rows", "give 2")
    assert caught.value.diagnostics[0].location == "x"
    with pytest.raises(BackendError, match="no engine") as backend_error:
        call("refuse", "backend")
    assert not backend_error.value.may_be_one_target


def test_other_exceptions_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="ValueError: wrong") as caught:
        call("fail", "value")
    assert "faulty_functions.py" in caught.value.__notes__[0]
    with pytest.raises(OSError, match="No space left") as os_error:
        call("fail", "os")
    assert (os_error.value.errno, os_error.value.filename) == (28, "/tmp/x")
    with pytest.raises(BackendError, match=r"the trial of model.onnx ran out of memory"):
        call("fail", "memory")


def test_a_hang_is_stopped_at_the_time_limit_with_every_process_that_it_started() -> None:
    started = time.monotonic()
    with pytest.raises(BackendError, match=f"exceeded its time limit of 1 s {OPERATION}, and was stopped"):
        call("hang", limits=ResourceLimits(seconds=1))
    assert time.monotonic() - started < 10


def test_a_limit_that_has_ended_already_stops_the_call() -> None:
    """The child may not have a process group yet."""
    started = time.monotonic()
    for _ in range(8):
        with pytest.raises(BackendError, match="exceeded its time limit of 0 s"):
            call("hang", limits=ResourceLimits(seconds=0))
    assert time.monotonic() - started < 10


def test_a_call_within_a_child_has_its_limits() -> None:
    started = time.monotonic()
    with pytest.raises(BackendError, match=r"exceeded its time limit of 2 s"):
        call("hang_in_child", limits=ResourceLimits(seconds=2))
    assert time.monotonic() - started < 15


def test_a_module_that_cannot_be_imported_is_reported_by_the_child() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the binary interface differs"):
            call_in_child("support.broken_import:function", b"null", label="trial of model.onnx")


def test_memory_is_limited() -> None:
    with pytest.raises(BackendError, match=rf"exceeded its limit of 0.40 GB {OPERATION}"):
        call("allocate", 2_000_000_000, limits=ResourceLimits(memory_bytes=400_000_000))


def test_an_abort_is_an_error_that_names_the_operation_and_the_last_output() -> None:
    with pytest.raises(BackendError, match=rf"trial of model.onnx crashed with SIGABRT {OPERATION}: terminate called after"):
        call("abort")


def test_a_process_that_ends_without_an_answer_is_an_error() -> None:
    with pytest.raises(BackendError, match="exited with code 7"):
        call("leave")


def test_a_killed_process_is_reported_as_out_of_memory() -> None:
    def kill() -> None:
        while not server_children():
            time.sleep(0.01)
        time.sleep(0.3)
        for child in server_children():
            child.send_signal(signal.SIGKILL)

    threading.Thread(target=kill).start()
    with pytest.raises(BackendError, match="was killed") as caught:
        call("hang")
    assert caught.value.hint is not None
    assert "memory" in caught.value.hint


def test_freed_memory_is_returned_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []

    def search() -> None:
        searches.append(1)
        time.sleep(1)

    monkeypatch.setattr(child_call, "return_freed_memory", search)
    monkeypatch.setattr(child_call, "_next_collection", 0.0)
    call("describe_process")
    call("describe_process")
    assert len(searches) == 1
    monkeypatch.setattr(child_call, "_next_collection", time.monotonic())
    call("describe_process")
    assert len(searches) == 2


def test_calls_from_several_threads_run_at_the_same_time() -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(call("describe_process")["pid"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 8


def test_memory_that_is_not_limited_ends_with_what_was_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory_bytes", lambda: 300_000_000)
    with pytest.raises(BackendError, match=rf"more than the 0.30 GB that were available {OPERATION}") as caught:
        call("allocate", 2_000_000_000)
    assert caught.value.hint == "free memory, or use smaller shapes"


@pytest.mark.parametrize(
    ("limit", "usage", "cache", "expected"),
    [("1000", "700", 400, 700), ("1000", "100", 400, 1000), ("1000", "1200", 100, 0), ("max", "700", 400, None)],
)
def test_cached_files_of_a_container_are_available(
    limit: str, usage: str, cache: int, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "limit").write_text(limit)
    (tmp_path / "usage").write_text(usage)
    (tmp_path / "memory.stat").write_text(f"anon 10\ninactive_file {cache}\n")
    monkeypatch.setattr(limits, "_CGROUP_FILES", ())
    of_machine = available_memory_bytes()
    monkeypatch.setattr(limits, "_CGROUP_FILES", ((str(tmp_path), "limit", "usage", "inactive_file"),))
    assert available_memory_bytes() == pytest.approx(of_machine if expected is None else expected, rel=0.2)


def test_the_available_memory_is_that_of_the_machine_or_less() -> None:
    available = available_memory_bytes()
    assert available is not None
    assert 0 < available <= psutil.virtual_memory().total


@pytest.mark.parametrize(("number", "last_line"), [(signal.SIGKILL, None), (signal.SIGINT, "KeyboardInterrupt")])
def test_nothing_survives_a_killed_or_interrupted_parent(number: signal.Signals, last_line: str | None, tmp_path: Path) -> None:
    """The server kills the children of a parent that was killed, and removes their folders."""
    scratch = tmp_path / "scratch-of-parent"
    scratch.mkdir()
    program = """
        import tempfile, sys
        tempfile.tempdir = sys.argv[1]
        from ryzen_compile.processes.child_call import call_in_child
        call_in_child("support.faulty_functions:hang", b"null", label="trial")
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(program), str(scratch)]
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while len(descendants := psutil.Process(parent.pid).children(recursive=True)) < 3:  # server, child, its child
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(number)
    _, errors = parent.communicate(timeout=10)
    assert parent.returncode == -number
    if last_line is not None:
        assert errors.splitlines()[-1] == last_line
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert not alive
    assert not list(scratch.iterdir())
