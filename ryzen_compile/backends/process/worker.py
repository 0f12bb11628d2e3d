"""`Worker`: runs builds in a child process with limits on memory and time; the child process ends with its parent.

A parser may abort, and a build may hang or exhaust the memory: the caller receives a BackendError that names the operation the
child process was performing. A worker executes one request after the other in the same child process, so that many small builds
share one process start; after a crash the next request starts a new child process.
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

import msgspec

from ryzen_compile import registry
from ryzen_compile.backends.api import BuildRequest, BuiltEngine
from ryzen_compile.backends.process.in_process import InProcessWorker
from ryzen_compile.backends.process.protocol import (
    BuildCommand,
    BuildDone,
    BuildRejected,
    WorkerBackend,
    WorkerReady,
    WorkerReply,
)
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.processes.crash_breadcrumb import ChildOutput, CrashBreadcrumb, make_breadcrumb_file, make_output_file
from ryzen_compile.processes.failure import describe_exit, with_operation
from ryzen_compile.processes.limits import LimitMonitor, ResourceLimits
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.utils.closeable import Closeable

_POLL_SECONDS = 0.05
_SHUTDOWN_SECONDS = 5.0


def start_worker(name: str) -> Worker | InProcessWorker:
    """Start a worker of the backend called `name`, which loads its library in the background.

    A backend that does not implement `WorkerBackend` builds in this process.
    """
    backend = registry.find_backend(name)
    return Worker(backend) if isinstance(backend, WorkerBackend) else InProcessWorker(backend)


class Worker(Closeable):
    """A child process that builds for one backend, one request at a time. Close it, or use it as a context manager."""

    def __init__(self, backend: WorkerBackend) -> None:
        """Start the child process without waiting for it."""
        self._backend = backend
        self._lock = threading.Lock()
        self._idle_child: _ChildProcess | None = _ChildProcess(backend)
        self._building_child: _ChildProcess | None = None

    def build(self, request: BuildRequest, progress: Progress | None = None) -> BuiltEngine:
        """Build one engine.

        Raises BackendError, with the reason, if the engine cannot be built, or with the failing node if the child process
        died. Raises RyzenError if the engine cannot be written to disk.
        """
        self._backend.check(request)
        targets = tuple(target.name for target in request.targets)
        output = f"{request.output}.part"
        start_time = time.perf_counter()
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
            target_names=targets,
            seconds=round(time.perf_counter() - start_time, 3),
            layers=done.layers,
            warnings=done.warnings,
        )

    def _run(self, request: BuildRequest, output: str) -> tuple[str, BuildDone]:
        child, self._idle_child = self._idle_child, None
        if child is not None and not child.is_alive():
            child.kill()
            child = None
        self._building_child = child = child or _ChildProcess(self._backend)
        limits = LimitMonitor(ResourceLimits(seconds=request.seconds, memory_bytes=request.memory_bytes))
        try:
            version = child.version(limits)
            reply = child.execute(BuildCommand(request=request, output=output), limits)
        except BaseException:
            child.kill()
            raise
        finally:
            self._building_child = None
        self._idle_child = child
        if isinstance(reply, BuildRejected):
            if reply.is_disk_error:
                raise RyzenError(f"the engine cannot be written: {reply.message}", hint="free disk space, or change the output")
            raise BackendError(reply.message, hint=reply.hint, may_be_one_target=reply.may_be_one_target)
        return version, reply

    def kill(self) -> None:
        """Abort a build that runs in another thread; it raises BackendError there."""
        if child := self._building_child:
            child.send_kill()

    def shutdown(self) -> None:
        """Ask the child process to exit, without waiting for it. No further build may follow."""
        with self._lock:
            if self._idle_child:
                self._idle_child.shutdown()

    def close(self) -> None:
        """End the child process; waits up to 5 s for it to exit by itself."""
        with self._lock:
            if self._idle_child:
                self._idle_child.close()
                self._idle_child = None


class _ChildProcess:
    """A child process, its reply pipe, its current operation and its output."""

    def __init__(self, backend: WorkerBackend) -> None:
        self._backend = backend
        self._version: str | None = None
        self._unparsed = b""
        self._reply_fd, write_fd = os.pipe()
        self._breadcrumb_fd, self._output_fd = make_breadcrumb_file(), make_output_file()
        self._breadcrumb, self._output = CrashBreadcrumb(self._breadcrumb_fd), ChildOutput(self._output_fd)
        command = [sys.executable, "-P", "-m", "ryzen_compile.backends.process.child", backend.builder_entry_point]
        self._process = subprocess.Popen(
            [*command, str(os.getpid()), str(write_fd), str(self._breadcrumb_fd)],
            stdin=subprocess.PIPE,
            stdout=self._output_fd,
            stderr=self._output_fd,
            pass_fds=(write_fd, self._breadcrumb_fd),
            start_new_session=True,
        )
        os.close(write_fd)

    def is_alive(self) -> bool:
        """Return whether the process is still running."""
        return self._process.poll() is None

    def version(self, limits: LimitMonitor) -> str:
        """Wait until the process has loaded its library, and return the version of the library. Raises BackendError."""
        if self._version is None:
            reply = self._wait_for_reply(limits)
            if isinstance(reply, BuildRejected):
                raise BackendError(reply.message, hint=reply.hint, may_be_one_target=reply.may_be_one_target)
            if not isinstance(reply, WorkerReady):
                raise TypeError(f"expected WorkerReady, got {reply}")
            self._version = reply.version
        return self._version

    def execute(self, command: BuildCommand, limits: LimitMonitor) -> BuildDone | BuildRejected:
        """Send a command and return the reply. Raises BackendError if the process dies or exceeds its limits."""
        with contextlib.suppress(BrokenPipeError):
            stdin = self._process.stdin
            if stdin is not None:
                stdin.write(msgspec.json.encode(command) + b"\n")
                stdin.flush()
        reply = self._wait_for_reply(limits)
        if isinstance(reply, WorkerReady):
            raise TypeError("expected BuildDone or BuildRejected, got WorkerReady")
        return reply

    def _wait_for_reply(self, limits: LimitMonitor) -> WorkerReply:
        poller = select.poll()
        poller.register(self._reply_fd, select.POLLIN)
        while b"\n" not in self._unparsed:
            if poller.poll(1000 * _POLL_SECONDS):
                chunk = os.read(self._reply_fd, 1 << 16)
                if not chunk:
                    raise self._exit_error()
                self._unparsed += chunk
            elif violation := limits.violation(self._process.pid):
                message, hint = violation
                if "memory" in message:
                    hint += ", or lower --memPoolSize or --builderOptimizationLevel"
                raise BackendError(
                    f"`{self._backend.name}` {with_operation(message, self._breadcrumb.read())}, and was stopped",
                    hint=hint,
                    may_be_one_target=False,
                )
            self._output.clear_if_large()
        line, _, self._unparsed = self._unparsed.partition(b"\n")
        reply: WorkerReply = msgspec.json.decode(line, type=WorkerReply)
        return reply

    def _exit_error(self) -> BackendError:
        code = self._process.wait()
        failure, hint = describe_exit(code)
        message = with_operation(failure, self._breadcrumb.read(), self._output.tail())
        return BackendError(f"`{self._backend.name}` {message}", hint=hint, may_be_one_target=code != -signal.SIGKILL)

    def shutdown(self) -> None:
        """Close standard input, upon which the process exits."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def close(self) -> None:
        """Ask the process to exit, and kill it after 5 s."""
        self.shutdown()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SHUTDOWN_SECONDS)
        self.kill()

    def send_kill(self) -> None:
        """Send SIGKILL to the process group of the child process, without waiting."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kill the process group of the child process, wait for it and close its files."""
        self.send_kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._breadcrumb.close()
        for fd in (self._reply_fd, self._breadcrumb_fd, self._output_fd):
            os.close(fd)
