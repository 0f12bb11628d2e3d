"""Workers: the child processes that builds run in, bounded in memory and time, dead when their parent is.

A parser may abort, a build may hang or take all memory: none of it reaches the caller but as a BackendError that says what
the child was doing. A worker serves one request after the other, so that many small builds pay for one start; after a
crash the next request starts a fresh child.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import Self

import msgspec

from ryzen_compile import registry
from ryzen_compile.backends.api import BuildRequest, BuiltEngine
from ryzen_compile.backends.process.crash_breadcrumb import ChildOutput, CrashBreadcrumb, make_breadcrumb_file, make_output_file
from ryzen_compile.backends.process.protocol import (
    BuildCommand,
    BuildDone,
    BuildRejected,
    WorkerBackend,
    WorkerReady,
    WorkerReply,
)
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.progress import Progress, SilentProgress

_POLL_SECONDS = 0.05
_SHUTDOWN_SECONDS = 5.0


def start_worker(backend: str) -> Worker:
    """Start a worker for the backend called `backend`: it loads its library while the caller does something else."""
    found = registry.find_backend(backend)
    if not isinstance(found, WorkerBackend):
        raise BackendError(f"`{backend}` does not build in a worker", hint=f"call the `build` of `{backend}` itself")
    return Worker(found)


class Worker:
    """A child process that builds for one backend, one request at a time. Close it, or use it in `with`."""

    def __init__(self, backend: WorkerBackend) -> None:
        """Start the child; returns at once."""
        self._backend = backend
        self._lock = threading.Lock()
        self._idle_child: _ChildProcess | None = _ChildProcess(backend)
        self._building_child: _ChildProcess | None = None

    def build(self, request: BuildRequest, progress: Progress | None = None) -> BuiltEngine:
        """Build one engine; raises BackendError that says why it cannot be, or how the child died and at which node.

        Raises RyzenError where the disk refuses.
        """
        self._backend.check(request)
        targets = tuple(target.name for target in request.targets)
        output = f"{request.output}.part"
        began = time.perf_counter()
        try:
            with self._lock, (progress or SilentProgress()).stage(f"build {','.join(targets)} with {self._backend.name}"):
                version, done = self._run(request, output)
            if not done.uses_source_graph:
                os.replace(output, request.output)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(output)
        return BuiltEngine(
            path=request.onnx_path if done.uses_source_graph else request.output,
            sha256=done.sha256,
            size_bytes=done.size_bytes,
            backend=self._backend.name,
            backend_version=version,
            targets=targets,
            seconds=round(time.perf_counter() - began, 3),
            layers=done.layers,
            warnings=done.warnings,
        )

    def _run(self, request: BuildRequest, output: str) -> tuple[str, BuildDone]:
        child, self._idle_child = self._idle_child, None
        if child is not None and not child.is_alive():
            child.kill()
            child = None
        self._building_child = child = child or _ChildProcess(self._backend)
        bounds = _ChildLimits(seconds=request.seconds, memory_bytes=request.memory_bytes)
        try:
            version = child.version(bounds)
            reply = child.execute(BuildCommand(request=request, output=output), bounds)
        except BaseException:
            child.kill()
            raise
        finally:
            self._building_child = None
        self._idle_child = child
        if isinstance(reply, BuildRejected):
            if reply.is_disk_error:
                raise RyzenError(f"the engine cannot be written: {reply.message}", hint="make room, or write elsewhere")
            raise BackendError(reply.message, hint=reply.hint)
        return version, reply

    def kill(self) -> None:
        """End a build that runs in another thread: it fails there with a BackendError."""
        if child := self._building_child:
            child.send_kill()

    def shutdown(self) -> None:
        """Let the child end in its own time; `close` then finds it gone. There must be nothing more to build."""
        with self._lock:
            if self._idle_child:
                self._idle_child.shutdown()

    def close(self) -> None:
        """End the child."""
        with self._lock:
            if self._idle_child:
                self._idle_child.close()
                self._idle_child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _ChildLimits(msgspec.Struct, frozen=True):
    """How long a child may still take, and how much."""

    seconds: float | None
    memory_bytes: int | None
    started: float = msgspec.field(default_factory=time.monotonic)

    def violation(self, pid: int) -> tuple[str, str] | None:
        """Return what the process did that it may not, and what to do about it, or None."""
        if self.seconds is not None and time.monotonic() - self.started > self.seconds:
            return f"took longer than its {self.seconds:g} s", "give the build more time"
        if self.memory_bytes is not None and (taken := unreclaimable_bytes(pid)) > self.memory_bytes:
            return (
                f"took {taken / 1e9:.2f} GB of memory, more than its {self.memory_bytes / 1e9:.2f} GB",
                "give the build more memory, or lower --memPoolSize or --builderOptimizationLevel",
            )
        return None


class _ChildProcess:
    """The process, its three files, and how it ended."""

    def __init__(self, backend: WorkerBackend) -> None:
        self._backend = backend
        self._version: str | None = None
        self._unparsed = b""
        self._reply_fd, far_end = os.pipe()
        self._breadcrumb_fd, self._output_fd = make_breadcrumb_file(), make_output_file()
        self._breadcrumb, self._output = CrashBreadcrumb(self._breadcrumb_fd), ChildOutput(self._output_fd)
        command = [sys.executable, "-P", "-m", "ryzen_compile.backends.process.child", backend.builder_entry_point]
        self._process = subprocess.Popen(
            [*command, str(os.getpid()), str(far_end), str(self._breadcrumb_fd)],
            stdin=subprocess.PIPE,
            stdout=self._output_fd,
            stderr=self._output_fd,
            pass_fds=(far_end, self._breadcrumb_fd),
            start_new_session=True,
        )
        os.close(far_end)

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def version(self, limits: _ChildLimits) -> str:
        """Wait until the child has loaded its library, and return the library's version."""
        if self._version is None:
            reply = self._wait_for_reply(limits)
            if isinstance(reply, BuildRejected):
                raise BackendError(reply.message, hint=reply.hint)
            if not isinstance(reply, WorkerReady):
                raise TypeError(f"expected Ready, got {reply}")
            self._version = reply.version
        return self._version

    def execute(self, command: BuildCommand, limits: _ChildLimits) -> BuildDone | BuildRejected:
        """Send an order and wait for what becomes of it; raises BackendError when the child dies or oversteps."""
        with contextlib.suppress(BrokenPipeError):
            stdin = self._process.stdin
            if stdin is not None:
                stdin.write(msgspec.json.encode(command) + b"\n")
                stdin.flush()
        reply = self._wait_for_reply(limits)
        if isinstance(reply, WorkerReady):
            raise TypeError("expected Done or Refused, got Ready")
        return reply

    def _wait_for_reply(self, limits: _ChildLimits) -> WorkerReply:
        waiting = select.poll()
        waiting.register(self._reply_fd, select.POLLIN)
        while b"\n" not in self._unparsed:
            if waiting.poll(1000 * _POLL_SECONDS):
                chunk = os.read(self._reply_fd, 1 << 16)
                if not chunk:
                    raise self._exit_error()
                self._unparsed += chunk
            elif overrun := limits.violation(self._process.pid):
                what, hint = overrun
                raise BackendError(f"`{self._backend.name}` {what}{self._current_action()}, and was stopped", hint=hint)
            self._output.clear_if_large()
        line, _, self._unparsed = self._unparsed.partition(b"\n")
        reply: WorkerReply = msgspec.json.decode(line, type=WorkerReply)
        return reply

    def _current_action(self) -> str:
        what = self._breadcrumb.read()
        return f" while {what}" if what else ""

    def _exit_error(self) -> BackendError:
        code = self._process.wait()
        printed = self._output.tail()
        last_words = f": {printed}" if printed else ""
        if code == -signal.SIGKILL:
            how, hint = "was killed", "the machine has most likely run out of memory: free some, or give the build a bound"
        elif code < 0:
            how, hint = f"died of {signal.Signals(-code).name}", "leave the node out, or report the model that it dies of"
        else:
            how, hint = f"ended with code {code}", "report the model that it ends at"
        return BackendError(f"`{self._backend.name}` {how}{self._current_action()}{last_words}", hint=hint)

    def shutdown(self) -> None:
        """Tell the child that there is nothing more to do."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def close(self) -> None:
        """Let the child end by itself, and make it where it does not."""
        self.shutdown()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SHUTDOWN_SECONDS)
        self.kill()

    def send_kill(self) -> None:
        """Let the child and whatever it started die, and return at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the child and whatever it started, now."""
        self.send_kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._breadcrumb.close()
        for fd in (self._reply_fd, self._breadcrumb_fd, self._output_fd):
            os.close(fd)


def unreclaimable_bytes(pid: int) -> int:
    """Return the bytes that the process holds and nobody can take back: anonymous and shared memory; 0 once it is gone.

    Mapped files, such as libraries and weights, do not count: the kernel drops their pages when it needs room.
    """
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            words = [line.split() for line in file if line.startswith(("RssAnon:", "RssShmem:"))]
    except OSError:
        return 0
    return sum(int(word[1]) * 1024 for word in words)
