"""Child processes that are raced, starved and killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def start(code: str, *arguments: str | os.PathLike[str]) -> Iterator[subprocess.Popen[str]]:
    """Run Python on `code` during the block, able to import what the tests can; what it prints is read as text.

    A child that still lives when the block ends is killed.
    """
    command = [sys.executable, "-c", code, *map(os.fspath, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            yield child
        finally:
            child.kill()


def run(code: str, *arguments: str | os.PathLike[str]) -> str:
    """Run Python on `code` and return what it printed; it must end well."""
    with start(code, *arguments) as child:
        printed, _ = child.communicate(timeout=60)
        assert child.returncode == 0, printed
    return printed


def expect_lines(child: subprocess.Popen[str], line: str, times: int) -> None:
    """Wait until a child has printed `line` so many times, and nothing else."""
    assert child.stdout is not None
    for _ in range(times):
        found = child.stdout.readline()
        assert found == f"{line}\n", found + child.stdout.read()


@contextmanager
def unprivileged_folder() -> Iterator[Path]:
    """Offer a folder to a user whom permissions bind, which root is not."""
    with tempfile.TemporaryDirectory() as folder:
        root = os.geteuid() == 0
        if root:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)
