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


def test_the_thread_of_the_display_ends_with_the_last_stage() -> None:
    before = threading.active_count()
    progress = console.ConsoleProgress(0)
    with progress.stage("one"):
        with progress.stage("two"):
            assert threading.active_count() == before + 1
    assert threading.active_count() == before
