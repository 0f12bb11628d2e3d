"""The child process of a worker: `python -m ryzen_compile.backends.process.child MODULE:CLASS PARENT REPLIES RECORDER`.

Requests come as JSON lines on standard input, whose end means that the parent is gone. Replies go to a pipe of their own,
because native libraries print where they like.
"""

from __future__ import annotations

import importlib
import os
import queue
import select
import sys
import threading

import msgspec

from ryzen_compile.backends.process.crash_breadcrumb import ChildOutput, CrashBreadcrumb
from ryzen_compile.backends.process.protocol import BuildCommand, BuildRejected, WorkerBuilder, WorkerReady, WorkerReply
from ryzen_compile.errors import RyzenError

_GRACE_SECONDS = 0.2


def main(entry_point: str, parent_pid: int, reply_fd: int, breadcrumb_fd: int) -> None:
    """Serve the builder `where`, `module:class`, until the parent closes its end."""
    orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    idle = threading.Event()
    _raise_oom_score()
    threading.Thread(target=_read_commands, args=(orders, idle, parent_pid), daemon=True).start()
    recorder, chatter = CrashBreadcrumb(breadcrumb_fd), ChildOutput(sys.stderr.fileno())
    encode = msgspec.json.Encoder().encode
    decode = msgspec.json.Decoder(BuildCommand).decode

    def reply(message: WorkerReply) -> None:
        os.write(reply_fd, encode(message) + b"\n")

    module, _, name = entry_point.partition(":")
    try:
        builder: WorkerBuilder = getattr(importlib.import_module(module), name)()
    except RyzenError as error:
        return reply(BuildRejected(message=error.message, hint=error.hint))
    reply(WorkerReady(version=builder.version))
    while (line := orders.get()) is not None:
        order = decode(line)
        recorder.write("")
        chatter.clear()
        try:
            reply(builder.build(order.request, order.output, recorder, chatter))
        except RyzenError as error:
            reply(BuildRejected(message=error.message, hint=error.hint))
        except OSError as error:
            reply(BuildRejected(message=f"`{error.filename or order.output}`: {error.strerror or error}", is_disk_error=True))
    idle.set()


def _read_commands(commands: queue.SimpleQueue[bytes | None], idle: threading.Event, parent_pid: int) -> None:
    """Queue what comes in; when the parent is gone let `main` end, and end it where it is in the midst of work.

    A fork of the parent may hold the other end open, so the parent's life is also looked at once a second.
    """
    rest = b""
    waiting = select.poll()
    waiting.register(sys.stdin, select.POLLIN)
    while True:
        readable = waiting.poll(1000)
        chunk = os.read(sys.stdin.fileno(), 1 << 16) if readable else b""
        if (readable and not chunk) or os.getppid() != parent_pid:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            commands.put(line)
    commands.put(None)
    if not idle.wait(_GRACE_SECONDS):
        os._exit(1)


def _raise_oom_score() -> None:
    """Let the kernel end this process and not its parent when the machine runs out of memory."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:
        return


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
