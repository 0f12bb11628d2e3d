"""Calls of functions in child processes, with limits on time and memory: a call ends with an answer or with one error."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import msgspec

from ryzen_compile import errors
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.processes.crash_breadcrumb import ChildOutput, CrashBreadcrumb, make_breadcrumb_file, make_output_file
from ryzen_compile.processes.failure import describe_exit, with_operation
from ryzen_compile.processes.limits import LimitMonitor, ResourceLimits, inherited_limits
from ryzen_compile.processes.protocol import (
    REQUEST_FILE,
    RESULT_FILE,
    CallRequest,
    CallReturned,
    ChildEvent,
    DiagnosticReported,
    ExceptionRaised,
    RyzenErrorRaised,
    ServerRequest,
    StageAdvanced,
    StageBegan,
    StageEnded,
    TextWritten,
)
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.utils.heap import return_freed_memory

_POLL_SECONDS = 0.05
_MODULES_PER_MESSAGE = 200
_COLLECTION_PAUSES = 20
"""The pause after a search for unreachable objects, in durations of the search: it takes up to a second if there are many."""


class ChildProgress(Progress, Protocol):
    """The progress of a function in a child process."""

    def write(self, text: str) -> None:
        """Send a part of a text to the caller."""
        ...


def call_in_child(
    function: str,
    argument: bytes,
    *,
    label: str,
    preload: Sequence[str] = (),
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
    on_text: Callable[[str], None] | None = None,
) -> bytes:
    """Call `function`, `module:name`, in a child process with `argument`, JSON, and the progress; return the JSON it returns.

    The child has the working directory, the environment and the import path of this process, and a folder for temporary files,
    which is removed with everything in it. It ends with this call and with this process. `label` names the call in messages:
    `comparison of a.onnx with b.onnx`. Children of later calls share the module of the function and those of `preload`.
    `on_text` is called with each part of a text that the function writes to its `ChildProgress`.

    Without `limits` those of this process apply, if it is a child itself. Without a limit on memory the memory that is
    available now is the limit.

    Raises the RyzenError or OSError that the function raised, BackendError with the current operation of the child if it
    crashed or exceeded its limits, and RuntimeError for any other exception.
    """
    limits = limits or inherited_limits()
    with ExitStack() as resources:
        folder = Path(tempfile.mkdtemp(prefix="ryzen-compile-"))
        resources.callback(shutil.rmtree, folder, ignore_errors=True)
        request = CallRequest(
            function=function,
            argument=msgspec.Raw(argument),
            working_directory=os.getcwd(),
            environment=dict(os.environ),
            import_path=tuple(path or os.getcwd() for path in sys.path),
            memory_bytes=limits.memory_bytes,
            seconds=limits.seconds,
        )
        (folder / REQUEST_FILE).write_bytes(msgspec.json.encode(request))
        child = _CallProcess(label, on_text)
        resources.callback(child.close)
        server = _start_server()
        _return_freed_memory()  # the child may need it while this process waits
        server.fork(folder, (function.partition(":")[0], *preload), child)
        child.wait(LimitMonitor(limits), progress or SilentProgress())
        server.imported.update(dict.fromkeys(child.imported))
        return (folder / RESULT_FILE).read_bytes()


_next_collection = 0.0
"""The time from which on freed memory is returned again."""


def _return_freed_memory() -> None:
    """Return freed memory to the system, which takes at most a twentieth of the time."""
    global _next_collection
    started = time.monotonic()
    if started >= _next_collection:
        return_freed_memory()
        finished = time.monotonic()
        _next_collection = finished + _COLLECTION_PAUSES * (finished - started)


class _CallProcess:
    """The parent's side of a forked child."""

    def __init__(self, label: str, on_text: Callable[[str], None] | None) -> None:
        self._label, self._on_text = label, on_text
        self._pid: int | None = None
        self._exit_code: int | None = None
        self._event_fd, event_write = os.pipe()
        self._status_fd, status_write = os.pipe()
        breadcrumb_fd, output_fd = make_breadcrumb_file(), make_output_file()
        self.fds: tuple[int, ...] = (event_write, status_write, breadcrumb_fd, output_fd)
        """The descriptors of the child: events, status, breadcrumb and output."""
        self._breadcrumb, self._output = CrashBreadcrumb(breadcrumb_fd), ChildOutput(output_fd)
        self._status = b""
        self.imported: tuple[str, ...] = ()
        """The modules that the child imported and that later children can share."""

    def wait(self, limits: LimitMonitor, progress: Progress) -> None:
        """Return when the function has returned. Raises its error, or BackendError if the child crashed or exceeded a limit."""
        for fd in self.fds[:2]:
            os.close(fd)
        self.fds = self.fds[2:]
        poller = select.poll()
        poller.register(self._event_fd, select.POLLIN)
        poller.register(self._status_fd, select.POLLIN)
        unparsed = b""
        next_check = 0.0
        stages: dict[int, _OpenStage] = {}
        try:
            while True:
                for fd, _ in poller.poll(1000 * _POLL_SECONDS):
                    chunk = os.read(fd, 1 << 16)
                    if not chunk:
                        poller.unregister(fd)
                    if fd == self._event_fd:
                        unparsed += chunk
                    elif chunk:
                        self._status += chunk
                    elif self._exit_status() is None:
                        raise BackendError(f"the {self._label} has lost its process", hint="run the command again")
                code = self._exit_status()
                if code is not None:
                    unparsed += _read_available(self._event_fd)
                *lines, unparsed = unparsed.split(b"\n")
                if any(self._handle(msgspec.json.decode(line, type=ChildEvent), progress, stages) for line in lines):
                    return
                if code is not None:
                    failure, hint = describe_exit(code)
                    message = with_operation(failure, self._breadcrumb.read(), self._output.tail())
                    raise BackendError(f"the {self._label} {message}", hint=hint, may_be_one_target=False)
                if time.monotonic() >= next_check:
                    next_check = time.monotonic() + _POLL_SECONDS
                    self._check(limits)
        finally:
            for stage in reversed(stages.values()):
                stage.close()

    def _handle(self, event: ChildEvent, progress: Progress, stages: dict[int, _OpenStage]) -> bool:
        """Process an event and return whether the function returned. Raises the error of the function."""
        if isinstance(event, StageBegan):
            stages[event.stage] = _OpenStage(progress, event)
        elif isinstance(event, StageAdvanced):
            stages[event.stage].advance(event.count)
        elif isinstance(event, StageEnded):
            stages.pop(event.stage).close()
        elif isinstance(event, DiagnosticReported):
            progress.report(event.diagnostic)
        elif isinstance(event, TextWritten):
            if self._on_text is not None:
                self._on_text(event.text)
        elif isinstance(event, CallReturned):
            self.imported = event.imported
            return True
        else:
            raise _exception(event, self._label, self._breadcrumb.read())
        return False

    def _check(self, limits: LimitMonitor) -> None:
        """Raise BackendError if the child exceeds a limit."""
        self._output.clear_if_large()
        pid = self._process_id()
        if pid is not None and (violation := limits.violation(pid)):
            message, hint = violation
            raise BackendError(
                f"the {self._label} {with_operation(message, self._breadcrumb.read())}, and was stopped",
                hint=hint,
                may_be_one_target=False,
            )

    def _process_id(self) -> int | None:
        lines = self._status.split(b"\n")
        return int(lines[0]) if len(lines) > 1 else None

    def _exit_status(self) -> int | None:
        lines = self._status.split(b"\n")
        return int(lines[1]) if len(lines) > 2 else None

    def close(self) -> None:
        """Kill the child if it still runs, wait for its end and close the descriptors."""
        if len(self.fds) == 4:  # it was not forked
            for fd in self.fds[:2]:
                os.close(fd)
        else:
            self._end()
        self._breadcrumb.close()
        for fd in (*self.fds[-2:], self._event_fd, self._status_fd):
            os.close(fd)

    def _end(self) -> None:
        """Kill the process group of the child and wait until the server has reaped it."""
        killed = False
        while self._exit_status() is None:
            pid = self._process_id()
            if pid is not None and not killed:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                killed = True
            chunk = os.read(self._status_fd, 1 << 12)
            if not chunk:  # the server has ended, and its children with it
                return
            self._status += chunk


class _OpenStage:
    """A stage of a child that has begun here."""

    def __init__(self, progress: Progress, event: StageBegan) -> None:
        self._resources = ExitStack()
        stage = self._resources.enter_context(progress.stage(event.title, event.items))
        self.advance, self.close = stage.advance, self._resources.close


def _read_available(fd: int) -> bytes:
    """Return what can be read from a pipe whose writer has ended, without waiting for other holders of its other end."""
    data = b""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(fd, 1 << 16):
            data += chunk
    return data


def _exception(event: RyzenErrorRaised | ExceptionRaised, label: str, operation: str) -> Exception:
    """Return the exception that the function raised."""
    if isinstance(event, RyzenErrorRaised):
        error_type: type[RyzenError] = getattr(errors, event.type_name, RyzenError)
        error = error_type(event.message, hint=event.hint)
        error.message, error.diagnostics = event.message, event.diagnostics
        if isinstance(error, BackendError):
            error.may_be_one_target = event.may_be_one_target
        return error
    if event.os_error is not None:
        return OSError(*event.os_error)
    if event.type_name == "MemoryError":
        return BackendError(
            f"the {label} {with_operation('ran out of memory', operation)}",
            hint="free memory, use smaller shapes, or increase --memory-limit",
            may_be_one_target=False,
        )
    exception = RuntimeError(f"{event.type_name}: {event.message}")
    exception.add_note(event.traceback)
    return exception


class _ForkServer:
    """The fork server of this process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.imported: dict[str, None] = {}
        """Modules that children imported since the last fork and that later children can share."""
        self._lock = threading.Lock()
        self._control, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other_end:
            self._start(other_end)

    def _start(self, control: socket.socket) -> None:
        """Start the process, which receives its requests from `control`."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ryzen_compile.processes.fork_server", str(control.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[control.fileno()],
            start_new_session=True,
        )

    def is_alive(self) -> bool:
        """Whether the server is a running child of this process."""
        return self.owner == os.getpid() and self._process.poll() is None

    def fork(self, folder: Path, preload: tuple[str, ...], child: _CallProcess) -> None:
        """Fork a child that performs the call of `folder`, after the server has imported what earlier children imported."""
        modules = tuple(self.imported)
        self.imported.clear()
        for start in range(0, len(modules), _MODULES_PER_MESSAGE):
            self.send(ServerRequest(folder=None, preload=modules[start : start + _MODULES_PER_MESSAGE]), [])
        self.send(ServerRequest(folder=str(folder), preload=preload), list(child.fds))

    def send(self, request: ServerRequest, fds: list[int]) -> None:
        """Send a request with file descriptors."""
        with self._lock:
            try:
                socket.send_fds(self._control, [msgspec.json.encode(request)], fds)
            except BrokenPipeError as error:
                raise BackendError("the server of child processes has ended", hint="run the command again") from error

    def close(self) -> None:
        """End the server and its children; waits for it."""
        self._control.close()
        if self.owner == os.getpid():
            self._process.wait()


_server: _ForkServer | None = None
_server_lock = threading.Lock()


def _start_server() -> _ForkServer:
    """Return the running server of this process; start it if there is none."""
    global _server
    with _server_lock:
        if _server is None or not _server.is_alive():
            if _server is not None:
                _server.close()
            _server = _ForkServer()
            atexit.register(_server.close)
        return _server
