"""Fixture of the command tests: runs a command that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ryzen_compile.cli.main import run

RunRefused = Callable[[Path, list[str]], tuple[int, str]]


@pytest.fixture
def run_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunRefused:
    """Run a command in a folder and return its exit code and message; it must print one message and change no file."""

    def run_in(folder: Path, arguments: list[str]) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        exit_code = run(arguments)
        stderr = capsys.readouterr().err
        assert stderr.count("error: ") == 1
        assert stderr.startswith("error: ") or "\nerror: " in stderr
        assert "Traceback" not in stderr
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        return exit_code, stderr

    return run_in
