"""Child processes for tests of concurrency, resource limits and kills."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def start(code: str, *arguments: str | os.PathLike[str]) -> Iterator[subprocess.Popen[str]]:
    """Run `code` in a Python child process during the block, with the import path of the tests and stdout as a text pipe.

    A child that is still running at the end of the block is killed.
    """
    command = [sys.executable, "-c", code, *map(os.fspath, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            yield child
        finally:
            child.kill()


def run(code: str, *arguments: str | os.PathLike[str]) -> str:
    """Run `code` in a Python child process and return its output; the exit code must be 0."""
    with start(code, *arguments) as child:
        output, _ = child.communicate(timeout=60)
        assert child.returncode == 0, output
    return output


def expect_lines(child: subprocess.Popen[str], line: str, times: int) -> None:
    """Wait until a child has printed `line` exactly `times` times, and no other line."""
    assert child.stdout is not None
    for _ in range(times):
        printed = child.stdout.readline()
        assert printed == f"{line}\n", printed + child.stdout.read()


def interrupt_build(build: subprocess.Popen[str], signal_number: int) -> tuple[str, list[psutil.Process]]:
    """Send a signal to a build when it has a worker, and return its stderr and its workers at that time."""
    while not (workers := psutil.Process(build.pid).children()):
        assert build.poll() is None, "the build ended before it had a worker"
        time.sleep(0.005)
    build.send_signal(signal_number)
    _, stderr = build.communicate(timeout=60)
    return stderr, workers


@contextmanager
def unprivileged_folder() -> Iterator[Path]:
    """Yield a folder and drop root privileges during the block, because permissions do not apply to root."""
    with tempfile.TemporaryDirectory() as folder:
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)
