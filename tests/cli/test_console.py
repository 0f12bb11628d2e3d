"""Tests of progress on the console: lines without a terminal, and nothing with -q."""

from __future__ import annotations

import threading
import time

import pytest

from ryzen_compile.cli import console


def test_a_long_stage_prints_lines_with_the_elapsed_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.05)
    progress = console.ConsoleProgress(0)
    with progress.stage("outer"), progress.stage("inner"):
        time.sleep(0.4)
    with progress.stage("short"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 8
    assert set(lines) == {"inner"}


def test_a_quiet_command_shows_no_stages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.01)
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
    monkeypatch.setattr(console, "LINE_SECONDS", 0.01)
    display, ended = console._StageDisplay(is_terminal=False), threading.Event()
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
