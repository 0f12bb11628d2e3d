"""Run one command in a forked process with limits, and judge its result.

The parent has imported the program, so that a case takes the time of its work and not of starting Python. A forked process
has its own session, its own folder, and limits of memory and CPU time. Processes that it leaves behind are found, because the
parent is their subreaper.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from ryzen_compile.processes import child_call, fork_server

MEMORY_LIMIT_BYTES = 8 << 30
"""The address space of a case."""
FILE_LIMIT_BYTES = 1 << 30
"""The largest file that a case may write."""
_ORPHAN_SECONDS = 5.0
"""How long processes may outlive their command."""
_PR_SET_CHILD_SUBREAPER = 36
_FILES_OF_LIBRARIES = frozenset({".ses"})
"""Files in the folder for temporary files that libraries write when they are imported: the telemetry of ONNX Runtime."""
_EXPECTED_EXIT_CODES = frozenset({0, 1, 2})
_TRACEBACK = "Traceback (most recent call last)"
_DEFECT_CODES = ("[internal-error]", "[pass-failed]", "[pass-defect]")


@dataclass(frozen=True)
class FuzzCase:
    """A command and the files that it reads."""

    arguments: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    """The names of files and folders that the command may create."""
    note: str = ""
    """The mutations."""
    make_files: Callable[[Path], None] = field(default=lambda folder: None)
    """Writes the input files to the folder of the case."""


@dataclass(frozen=True)
class Verdict:
    """The result of one case."""

    kind: str
    """`ok`, `refused`, `usage`, or a failure: `traceback`, `defect`, `abort`, `hang`, `leftover`, `process` or `exit`."""
    signature: str = ""
    """A text that is equal for failures of the same cause."""
    detail: str = ""
    """What the command printed, and how it ended."""
    seconds: float = 0.0

    @property
    def is_failure(self) -> bool:
        """Whether the command did what no input may make it do."""
        return self.kind not in ("ok", "refused", "usage")


def become_subreaper() -> None:
    """Make orphaned descendants children of this process, so that `run_case` finds them."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run_case(case: FuzzCase, folder: Path, *, seconds: float) -> Verdict:
    """Run `case` in `folder`, an empty folder, for at most `seconds`, and return the verdict."""
    work, logs, temporary = folder / "work", folder / "logs", folder / "tmp"
    for path in (work, logs, temporary):
        path.mkdir()
    case.make_files(work)
    before = _listing(work)
    started = time.monotonic()
    child = os.fork()
    if not child:
        _run_in_child(case, work, logs, temporary, seconds)
    status = _wait(child, started + seconds)
    orphans = _end_orphans()
    elapsed = time.monotonic() - started
    output = (logs / "stdout").read_text(errors="replace") + (logs / "stderr").read_text(errors="replace")
    created = sorted(
        (_listing(work) - before - _allowed(work, case.outputs))
        | {f"tmp/{name}" for name in _listing(temporary) - _FILES_OF_LIBRARIES}
    )
    return _judge(status, output, orphans, created, elapsed)


def _run_in_child(case: FuzzCase, work: Path, logs: Path, temporary: Path, seconds: float) -> NoReturn:
    """Run the command in this process, which then ends."""
    code = 99
    try:
        os.setsid()
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(work)
        os.environ |= {
            "TMPDIR": str(temporary),
            "HOME": str(temporary.parent),
            "RYZEN_COMPILE_CACHE": str(temporary.parent / "cache"),
        }
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, FILE_LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from ryzen_compile.cli.main import main

        tempfile.tempdir = None
        child_call._server = _ForkedServer()
        main(list(case.arguments))
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 99
    except BaseException:  # noqa: BLE001 - the traceback is the finding
        import traceback

        traceback.print_exc()
    finally:
        if child_call._server is not None:
            child_call._server.close()  # as at the exit of the interpreter
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _ForkedServer(child_call._ForkServer):
    """A fork server that is itself forked: it has the modules of this process, and starts without a new interpreter."""

    def _start(self, control: socket.socket) -> None:
        server = os.fork()
        if not server:
            os.setsid()
            self._control.close()
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            try:
                fork_server.serve(control)
            finally:
                os._exit(0)
        self._server_id = server
        self._ended = False

    def is_alive(self) -> bool:
        """Whether the server is a running child of this process."""
        if not self._ended and self.owner == os.getpid():
            self._ended = os.waitpid(self._server_id, os.WNOHANG)[0] != 0
        return not self._ended and self.owner == os.getpid()

    def close(self) -> None:
        """End the server and its children; waits for it."""
        self._control.close()
        if self.is_alive():
            os.waitpid(self._server_id, 0)
            self._ended = True


def _wait(child: int, deadline: float) -> int | None:
    """Return the wait status of `child`; None if it did not end before `deadline` and was killed with its session."""
    pause = 0.001
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os.waitpid(child, 0)
    return None


def _end_orphans() -> list[str]:
    """Wait for the processes that a case left, kill those that stay, and return their command lines."""
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while orphans := _running_children():
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    lines = []
    for process in orphans:
        lines.append(" ".join(process.cmdline())[:200])
        process.kill()
        process.wait()
    return lines


def _running_children() -> list[psutil.Process]:
    running = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                process.wait()
            else:
                running.append(process)
        except psutil.NoSuchProcess:
            continue
    return running


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


def _allowed(work: Path, outputs: Sequence[str]) -> set[str]:
    """Return the paths of the outputs of a case, and of everything in them."""
    allowed = set()
    for output in outputs:
        if os.path.lexists(work / output):
            allowed |= {output} | {f"{output}/{name}" for name in _listing(work / output)}
    return allowed


def _judge(status: int | None, output: str, orphans: list[str], created: list[str], seconds: float) -> Verdict:
    def failure(kind: str, cause: str) -> Verdict:
        return Verdict(kind, f"{kind}: {cause}", f"{cause}\n\n{output[-20_000:]}", seconds)

    if status is None:
        return failure("hang", _last_words(output))
    if _TRACEBACK in output:
        return failure("traceback", _traceback_cause(output))
    if os.WIFSIGNALED(status):
        return failure("abort", f"{signal.Signals(os.WTERMSIG(status)).name} {_last_words(output)}")
    if any(code in output for code in _DEFECT_CODES):
        return failure("defect", _defect_cause(output))
    code = os.WEXITSTATUS(status)
    if code not in _EXPECTED_EXIT_CODES:
        return failure("exit", f"exit code {code} {_last_words(output)}")
    if code and "error: " not in output and "NOT MET" not in output:
        return failure("exit", f"exit code {code} without a message: {_last_words(output)}")
    if orphans:
        return failure("process", _normalized(orphans[0]))
    if created:
        return failure("leftover", _normalized(" ".join(created[:3])))
    return Verdict(("ok", "refused", "usage")[code], seconds=seconds)


def _traceback_cause(output: str) -> str:
    """Return the innermost frame of this program and the last line of the last traceback."""
    text = output[output.rindex(_TRACEBACK) :]
    frames = re.findall(r'File ".*?/((?:ryzen_\w+)/[\w/]+\.py)", line (\d+), in (\S+)', text)
    last = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt|Warning)?(:|$)", line)]
    return f"{':'.join(frames[-1]) if frames else '?'} {_normalized(last[-1] if last else '?')}"


def _defect_cause(output: str) -> str:
    lines = [line for line in output.splitlines() if any(code in line for code in _DEFECT_CODES)]
    return _normalized(lines[0])


def _last_words(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return _normalized(lines[-1]) if lines else "(no output)"


def _normalized(text: str) -> str:
    """Return `text` without quoted names, numbers and hexadecimal digits."""
    text = re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"", "`_`", text)
    return re.sub(r"0x[0-9a-f]+|[0-9a-f]{8,}|\d+", "0", text)[:200]


def signature_digest(signature: str) -> str:
    """Return a short name for a signature, for use in paths."""
    return hashlib.sha256(signature.encode()).hexdigest()[:10]
