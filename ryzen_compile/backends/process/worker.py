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
from ryzen_compile.backends.api import Built, Request
from ryzen_compile.backends.process.crash_breadcrumb import Chatter, Recorder, printed, unlisted
from ryzen_compile.backends.process.protocol import Buildable, Done, Order, Ready, Refused, Reply
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.progress import Progress, Silent

_TICK_SECONDS = 0.05
_FAREWELL_SECONDS = 5.0


def start(backend: str) -> Worker:
    """Start a worker for the backend called `backend`: it loads its library while the caller does something else."""
    found = registry.find_backend(backend)
    if not isinstance(found, Buildable):
        raise BackendError(f"`{backend}` does not build in a worker", hint=f"call the `build` of `{backend}` itself")
    return Worker(found)


class Worker:
    """A child process that builds for one backend, one request at a time. Close it, or use it in `with`."""

    def __init__(self, backend: Buildable) -> None:
        """Start the child; returns at once."""
        self._backend = backend
        self._lock = threading.Lock()
        self._child: _Child | None = _Child(backend)
        self._busy: _Child | None = None

    def build(self, request: Request, progress: Progress | None = None) -> Built:
        """Build one engine; raises BackendError that says why it cannot be, or how the child died and at which node.

        Raises RyzenError where the disk refuses.
        """
        self._backend.check(request)
        targets = tuple(target.name for target in request.targets)
        output = f"{request.output}.part"
        began = time.perf_counter()
        try:
            with self._lock, (progress or Silent()).stage(f"build {','.join(targets)} with {self._backend.name}"):
                version, done = self._run(request, output)
            if not done.as_it_is:
                os.replace(output, request.output)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(output)
        return Built(
            path=request.graph if done.as_it_is else request.output,
            sha256=done.sha256,
            size_bytes=done.size_bytes,
            backend=self._backend.name,
            backend_version=version,
            targets=targets,
            seconds=round(time.perf_counter() - began, 3),
            layers=done.layers,
            warnings=done.warnings,
        )

    def _run(self, request: Request, output: str) -> tuple[str, Done]:
        child, self._child = self._child, None
        if child is not None and not child.is_alive():
            child.kill()
            child = None
        self._busy = child = child or _Child(self._backend)
        bounds = _Bounds(seconds=request.seconds, memory_bytes=request.memory_bytes)
        try:
            version = child.version(bounds)
            reply = child.ask(Order(request=request, output=output), bounds)
        except BaseException:
            child.kill()
            raise
        finally:
            self._busy = None
        self._child = child
        if isinstance(reply, Refused):
            if reply.by_disk:
                raise RyzenError(f"the engine cannot be written: {reply.says}", hint="make room, or write elsewhere")
            raise BackendError(reply.says, hint=reply.hint)
        return version, reply

    def abandon(self) -> None:
        """End a build that runs in another thread: it fails there with a BackendError."""
        if child := self._busy:
            child.signal()

    def dismiss(self) -> None:
        """Let the child end in its own time; `close` then finds it gone. There must be nothing more to build."""
        with self._lock:
            if self._child:
                self._child.dismiss()

    def close(self) -> None:
        """End the child."""
        with self._lock:
            if self._child:
                self._child.close()
                self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Bounds(msgspec.Struct, frozen=True):
    """How long a child may still take, and how much."""

    seconds: float | None
    memory_bytes: int | None
    began: float = msgspec.field(default_factory=time.monotonic)

    def overrun(self, pid: int) -> tuple[str, str] | None:
        """Return what the process did that it may not, and what to do about it, or None."""
        if self.seconds is not None and time.monotonic() - self.began > self.seconds:
            return f"took longer than its {self.seconds:g} s", "give the build more time"
        if self.memory_bytes is not None and (taken := memory_of(pid)) > self.memory_bytes:
            return (
                f"took {taken / 1e9:.2f} GB of memory, more than its {self.memory_bytes / 1e9:.2f} GB",
                "give the build more memory, or lower --memPoolSize or --builderOptimizationLevel",
            )
        return None


class _Child:
    """The process, its three files, and how it ended."""

    def __init__(self, backend: Buildable) -> None:
        self._backend = backend
        self._version: str | None = None
        self._rest = b""
        self._replies, far_end = os.pipe()
        self._page, self._print = unlisted(), printed()
        self._recorder, self._chatter = Recorder(self._page), Chatter(self._print)
        command = [sys.executable, "-P", "-m", "ryzen_compile.backends.process.child", backend.builder]
        self._process = subprocess.Popen(
            [*command, str(os.getpid()), str(far_end), str(self._page)],
            stdin=subprocess.PIPE,
            stdout=self._print,
            stderr=self._print,
            pass_fds=(far_end, self._page),
            start_new_session=True,
        )
        os.close(far_end)

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def version(self, bounds: _Bounds) -> str:
        """Wait until the child has loaded its library, and return the library's version."""
        if self._version is None:
            reply = self._await(bounds)
            if isinstance(reply, Refused):
                raise BackendError(reply.says, hint=reply.hint)
            if not isinstance(reply, Ready):
                raise TypeError(f"expected Ready, got {reply}")
            self._version = reply.version
        return self._version

    def ask(self, order: Order, bounds: _Bounds) -> Done | Refused:
        """Send an order and wait for what becomes of it; raises BackendError when the child dies or oversteps."""
        with contextlib.suppress(BrokenPipeError):
            stdin = self._process.stdin
            if stdin is not None:
                stdin.write(msgspec.json.encode(order) + b"\n")
                stdin.flush()
        reply = self._await(bounds)
        if isinstance(reply, Ready):
            raise TypeError("expected Done or Refused, got Ready")
        return reply

    def _await(self, bounds: _Bounds) -> Reply:
        waiting = select.poll()
        waiting.register(self._replies, select.POLLIN)
        while b"\n" not in self._rest:
            if waiting.poll(1000 * _TICK_SECONDS):
                chunk = os.read(self._replies, 1 << 16)
                if not chunk:
                    raise self._died()
                self._rest += chunk
            elif overrun := bounds.overrun(self._process.pid):
                what, hint = overrun
                raise BackendError(f"`{self._backend.name}` {what}{self._doing()}, and was stopped", hint=hint)
            self._chatter.bound()
        line, _, self._rest = self._rest.partition(b"\n")
        reply: Reply = msgspec.json.decode(line, type=Reply)
        return reply

    def _doing(self) -> str:
        what = self._recorder.read()
        return f" while {what}" if what else ""

    def _died(self) -> BackendError:
        code = self._process.wait()
        printed = self._chatter.tail()
        last_words = f": {printed}" if printed else ""
        if code == -signal.SIGKILL:
            how, hint = "was killed", "the machine has most likely run out of memory: free some, or give the build a bound"
        elif code < 0:
            how, hint = f"died of {signal.Signals(-code).name}", "leave the node out, or report the model that it dies of"
        else:
            how, hint = f"ended with code {code}", "report the model that it ends at"
        return BackendError(f"`{self._backend.name}` {how}{self._doing()}{last_words}", hint=hint)

    def dismiss(self) -> None:
        """Tell the child that there is nothing more to do."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def close(self) -> None:
        """Let the child end by itself, and make it where it does not."""
        self.dismiss()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_FAREWELL_SECONDS)
        self.kill()

    def signal(self) -> None:
        """Let the child and whatever it started die, and return at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the child and whatever it started, now."""
        self.signal()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._recorder.close()
        for fd in (self._replies, self._page, self._print):
            os.close(fd)


def memory_of(pid: int) -> int:
    """Return the bytes that the process holds and nobody can take back: anonymous and shared memory; 0 once it is gone.

    Mapped files, such as libraries and weights, do not count: the kernel drops their pages when it needs room.
    """
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            words = [line.split() for line in file if line.startswith(("RssAnon:", "RssShmem:"))]
    except OSError:
        return 0
    return sum(int(word[1]) * 1024 for word in words)
