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

from ryzen_compile.backends.process.crash_breadcrumb import Chatter, Recorder
from ryzen_compile.backends.process.protocol import Builder, Order, Ready, Refused, Reply
from ryzen_compile.errors import RyzenError

_GRACE_SECONDS = 0.2


def main(where: str, parent: int, replies: int, page: int) -> None:
    """Serve the builder `where`, `module:class`, until the parent closes its end."""
    orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    idle = threading.Event()
    _volunteer_for_the_oom_killer()
    threading.Thread(target=_listen, args=(orders, idle, parent), daemon=True).start()
    recorder, chatter = Recorder(page), Chatter(sys.stderr.fileno())
    encode = msgspec.json.Encoder().encode
    decode = msgspec.json.Decoder(Order).decode

    def reply(message: Reply) -> None:
        os.write(replies, encode(message) + b"\n")

    module, _, name = where.partition(":")
    try:
        builder: Builder = getattr(importlib.import_module(module), name)()
    except RyzenError as error:
        return reply(Refused(says=error.says, hint=error.hint))
    reply(Ready(version=builder.version))
    while (line := orders.get()) is not None:
        order = decode(line)
        recorder.note("")
        chatter.forget()
        try:
            reply(builder.build(order.request, order.output, recorder, chatter))
        except RyzenError as error:
            reply(Refused(says=error.says, hint=error.hint))
        except OSError as error:
            reply(Refused(says=f"`{error.filename or order.output}`: {error.strerror or error}", by_disk=True))
    idle.set()


def _listen(orders: queue.SimpleQueue[bytes | None], idle: threading.Event, parent: int) -> None:
    """Queue what comes in; when the parent is gone let `main` end, and end it where it is in the midst of work.

    A fork of the parent may hold the other end open, so the parent's life is also looked at once a second.
    """
    rest = b""
    waiting = select.poll()
    waiting.register(sys.stdin, select.POLLIN)
    while True:
        readable = waiting.poll(1000)
        chunk = os.read(sys.stdin.fileno(), 1 << 16) if readable else b""
        if (readable and not chunk) or os.getppid() != parent:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            orders.put(line)
    orders.put(None)
    if not idle.wait(_GRACE_SECONDS):
        os._exit(1)


def _volunteer_for_the_oom_killer() -> None:
    """Let the kernel end this process and not its parent when the machine runs out of memory."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:
        return


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
