"""Tests of progress on the console: lines without a terminal, and nothing with -q."""

from __future__ import annotations

import threading
import time

import pytest

from ryzen_compile.cli import console, stage_text
from ryzen_compile.progress import StageItems


def test_a_long_stage_prints_lines_with_the_elapsed_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage_text, "LINE_SECONDS", 0.05)
    progress = console.ConsoleProgress(0)
    with progress.stage("outer"), progress.stage("inner"):
        time.sleep(0.4)
    with progress.stage("short"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 8
    assert lines[0] == "inner"
    assert set(lines) <= {"inner", "short"}


def test_a_long_comparison_without_a_terminal_prints_a_line_every_10_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = console.ConsoleProgress(1, clock=lambda: now[0])
    display = progress._display
    assert display is not None
    stage = stage_text.RunningStage("compare", StageItems("cases", 4000), lambda: now[0])

    class ComparisonEnd(threading.Event):
        """Ends with the comparison, which finishes a case every 0.25 s while the display waits."""

        def wait(self, timeout: float | None = None) -> bool:
            for _ in range(int((timeout or 0) / 0.25)):
                now[0] += 0.25
                stage.advance()
            return now[0] >= 1000

    display._stages.begin(stage)
    display._run(ComparisonEnd())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 99
    assert lines[:2] == [
        "compare: 40 of 4,000 cases, 10 s, about 16 min left",
        "compare: 80 of 4,000 cases, 20 s, about 16 min left",
    ]
    assert lines[-1] == "compare: 3,960 of 4,000 cases, 16 min 30 s, about 10 s left"


def test_a_finished_stage_prints_its_count_and_duration_when_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with console.ConsoleProgress(1, clock=lambda: now[0]).stage("compare", StageItems("cases", 3)) as stage:
        stage.advance(3)
        now[0] = 27.04
    assert capsys.readouterr().err == "compare: 3 cases, 27.0 s\n"


def test_a_quiet_command_shows_no_stages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(stage_text, "LINE_SECONDS", 0.01)
    with console.ConsoleProgress(-1).stage("title"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_stage_of_one_thread_does_not_wait_for_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = console.ConsoleProgress(0)
    joining, next_stage_began, first_returned = (threading.Event() for _ in range(3))
    join = threading.Thread.join

    def join_late(thread: threading.Thread, timeout: float | None = None) -> None:
        if threading.current_thread() is first:
            joining.set()
            next_stage_began.wait(10)
        join(thread, timeout)

    def run_first_stage() -> None:
        with progress.stage("first"):
            pass
        first_returned.set()

    first = threading.Thread(target=run_first_stage)
    monkeypatch.setattr(threading.Thread, "join", join_late)
    first.start()
    assert joining.wait(10)
    with progress.stage("second"):
        next_stage_began.set()
        assert first_returned.wait(5), "the first stage ends although the second runs"
    first.join()


def test_a_display_whose_stages_have_ended_prints_no_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage_text, "LINE_SECONDS", 0.01)
    display, ended = console._StageDisplay(is_terminal=False, clock=time.perf_counter), threading.Event()
    thread = threading.Thread(target=display._run, args=(ended,))
    thread.start()
    time.sleep(0.1)
    ended.set()
    thread.join()
    assert capsys.readouterr().err == ""


def test_the_thread_of_the_display_ends_with_the_last_stage() -> None:
    before = threading.active_count()
    progress = console.ConsoleProgress(0)
    with progress.stage("one"):
        with progress.stage("two"):
            assert threading.active_count() == before + 1
    assert threading.active_count() == before
