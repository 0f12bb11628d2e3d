"""The child process of a worker: `child MODULE:CLASS PARENT_PID REPLY_FD BREADCRUMB_FD`, run with `python -m`.

Commands are JSON lines on standard input; its end means that the parent has exited. Replies are written to a separate pipe,
because native libraries print to standard output and standard error.
"""

from __future__ import annotations

import importlib
import os
import queue
import select
import sys
import threading

import msgspec

from ryzen_compile.backends.process.protocol import BuildCommand, BuildRejected, WorkerBuilder, WorkerReady, WorkerReply
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.processes.crash_breadcrumb import ChildOutput, CrashBreadcrumb
from ryzen_compile.processes.limits import raise_oom_score

_GRACE_SECONDS = 0.2


def main(entry_point: str, parent_pid: int, reply_fd: int, breadcrumb_fd: int) -> None:
    """Execute build commands with the builder at `entry_point`, `module:class`, until the parent closes standard input."""
    commands: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    idle = threading.Event()
    raise_oom_score()
    threading.Thread(target=_read_commands, args=(commands, idle, parent_pid), daemon=True).start()
    breadcrumb, child_output = CrashBreadcrumb(breadcrumb_fd), ChildOutput(sys.stderr.fileno())
    encode = msgspec.json.Encoder().encode
    decode = msgspec.json.Decoder(BuildCommand).decode

    def reply(message: WorkerReply) -> None:
        os.write(reply_fd, encode(message) + b"\n")

    module, _, name = entry_point.partition(":")
    try:
        builder: WorkerBuilder = getattr(importlib.import_module(module), name)()
    except RyzenError as error:
        return reply(BuildRejected(message=error.message, hint=error.hint, may_be_one_target=False))
    reply(WorkerReady(version=builder.version))
    while (line := commands.get()) is not None:
        command = decode(line)
        breadcrumb.write("")
        child_output.clear()
        try:
            reply(builder.build(command.request, command.output, breadcrumb, child_output))
        except RyzenError as error:
            may_be_one_target = isinstance(error, BackendError) and error.may_be_one_target
            reply(BuildRejected(message=error.message, hint=error.hint, may_be_one_target=may_be_one_target))
        except OSError as error:
            reply(BuildRejected(message=f"`{error.filename or command.output}`: {error.strerror or error}", is_disk_error=True))
    idle.set()


def _read_commands(commands: queue.SimpleQueue[bytes | None], idle: threading.Event, parent_pid: int) -> None:
    """Queue incoming lines; once the parent has exited, queue None, and end the process if a build is still running.

    A fork of the parent may keep standard input open, so the parent is also checked once per second.
    """
    rest = b""
    poller = select.poll()
    poller.register(sys.stdin, select.POLLIN)
    while True:
        readable = poller.poll(1000)
        chunk = os.read(sys.stdin.fileno(), 1 << 16) if readable else b""
        if (readable and not chunk) or os.getppid() != parent_pid:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            commands.put(line)
    commands.put(None)
    if not idle.wait(_GRACE_SECONDS):
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
