"""The fork server: `fork_server CONTROL_FD`, run with `python -m`: imports modules once and forks a child for each call.

A fork takes milliseconds, where a new interpreter takes a second to import the same libraries. The server has no threads and
runs no model, so that its forks are safe. Requests are messages on a socket, whose end means that the parent has exited: the
server then kills its children, removes their scratch folders and exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.processes.crash_breadcrumb import CrashBreadcrumb
from ryzen_compile.processes.limits import ResourceLimits, inherit_limits, raise_oom_score
from ryzen_compile.processes.operation import record_operations
from ryzen_compile.processes.protocol import (
    MAX_MESSAGE_BYTES,
    REQUEST_FILE,
    RESULT_FILE,
    SHARED_PACKAGES,
    CallRequest,
    CallReturned,
    ChildEvent,
    ExceptionRaised,
    RyzenErrorRaised,
    ServerRequest,
)
from ryzen_compile.processes.relayed_progress import RelayedProgress, send_event
from ryzen_compile.progress import Progress
from ryzen_compile.utils.deferred_import import defer_sympy
from ryzen_compile.utils.heap import return_freed_memory

_PR_SET_PDEATHSIG = 1


class _ForkedChild(msgspec.Struct, frozen=True):
    """A running child."""

    folder: str
    status_fd: int


def serve(control: socket.socket) -> None:
    """Answer requests until the other end of `control` is closed."""
    children: dict[int, _ForkedChild] = {}
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(wake_read, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        if wake_read in ready:
            os.read(wake_read, 1 << 12)
            _reap(children)
        if control.fileno() in ready:
            message, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 4)
            if not message:
                break
            request = msgspec.json.decode(message, type=ServerRequest)
            _preload(request.preload)
            if request.folder is not None:
                _fork(request.folder, fds, children, (control.fileno(), wake_read, wake_write))
    for pid, child in children.items():
        _kill_group(pid)
        shutil.rmtree(child.folder, ignore_errors=True)


def _preload(modules: tuple[str, ...]) -> None:
    for module in modules:
        if module not in sys.modules:
            # A child that needs a module which cannot be imported reports it.
            with contextlib.suppress(Exception):
                importlib.import_module(module)


def _fork(folder: str, fds: list[int], children: dict[int, _ForkedChild], server_fds: tuple[int, ...]) -> None:
    event_fd, status_fd, breadcrumb_fd, output_fd = fds
    return_freed_memory()
    gc.freeze()  # a collection in the child would copy the pages of all objects
    pid = os.fork()
    if not pid:
        for fd in (*server_fds, status_fd, *(child.status_fd for child in children.values())):
            os.close(fd)
        _run_child(Path(folder), event_fd, breadcrumb_fd, output_fd)
    # Both processes do this, so that the group exists for whichever of them needs it first.
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)
    for fd in (event_fd, breadcrumb_fd, output_fd):
        os.close(fd)
    children[pid] = _ForkedChild(folder, status_fd)
    _write_status(status_fd, pid)


def _reap(children: dict[int, _ForkedChild]) -> None:
    """Report the exit status of children that have ended."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        child = children.pop(pid, None)
        if child is not None:
            _kill_group(pid)  # processes that the child started
            _write_status(child.status_fd, os.waitstatus_to_exitcode(status))
            os.close(child.status_fd)


def _write_status(status_fd: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(status_fd, b"%d\n" % number)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _run_child(folder: Path, event_fd: int, breadcrumb_fd: int, output_fd: int) -> NoReturn:
    """Perform the call of `folder` in the forked process, and exit without the handlers of the server."""
    code = 1
    try:
        os.setpgid(0, 0)
        _end_with_server()
        raise_oom_score()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        breadcrumb = CrashBreadcrumb(breadcrumb_fd)
        record_operations(breadcrumb)
        tempfile.tempdir = str(folder)
        send_event(event_fd, _call(folder, RelayedProgress(event_fd)))
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _end_with_server() -> None:
    """Let the kernel kill this process when the server ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _call(folder: Path, progress: Progress) -> ChildEvent:
    """Call the function of the request in `folder` and return how it ended."""
    shared = set(sys.modules)
    try:
        request = msgspec.json.decode((folder / REQUEST_FILE).read_bytes(), type=CallRequest)
        os.environ.clear()
        os.environ.update(request.environment)
        os.chdir(request.working_directory)
        sys.path[:] = request.import_path
        inherit_limits(ResourceLimits(memory_bytes=request.memory_bytes, seconds=request.seconds))
        module, _, name = request.function.partition(":")
        function: Callable[[bytes, Progress], bytes] = getattr(importlib.import_module(module), name)
        (folder / RESULT_FILE).write_bytes(function(bytes(request.argument), progress))
    except RyzenError as error:
        return RyzenErrorRaised(
            type_name=type(error).__name__,
            message=error.message,
            hint=error.hint,
            diagnostics=error.diagnostics,
            may_be_one_target=isinstance(error, BackendError) and error.may_be_one_target,
        )
    except Exception as error:  # noqa: BLE001
        is_os_error = isinstance(error, OSError) and error.errno is not None
        return ExceptionRaised(
            type_name=type(error).__name__,
            message=str(error),
            traceback=traceback.format_exc(),
            os_error=(error.errno, str(error.strerror), error.filename) if is_os_error else None,  # type: ignore[attr-defined]
        )
    imported = (name for name in set(sys.modules) - shared if name.partition(".")[0] in SHARED_PACKAGES)
    return CallReturned(imported=tuple(sorted(imported)))


if __name__ == "__main__":
    defer_sympy()
    serve(socket.socket(fileno=int(sys.argv[1])))
