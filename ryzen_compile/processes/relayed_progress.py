"""The progress of a function in a child process, sent to its parent as events."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator

import msgspec

from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.processes.operation import performing
from ryzen_compile.processes.protocol import (
    ChildEvent,
    DiagnosticReported,
    StageAdvanced,
    StageBegan,
    StageEnded,
    TextWritten,
)
from ryzen_compile.progress import StageItems

ADVANCE_SECONDS = 0.05
"""The shortest time between two events with counts of a stage, in seconds."""


class RelayedProgress:
    """Sends progress to the parent, and records the current stage as the operation."""

    def __init__(self, event_fd: int) -> None:
        self._event_fd = event_fd
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def stage(self, title: str, items: StageItems | None = None) -> Iterator[RelayedStage]:
        """Send the beginning, the counts and the end of a stage."""
        number = next(self._numbers)
        send_event(self._event_fd, StageBegan(stage=number, title=title, items=items))
        stage = RelayedStage(number, lambda event: send_event(self._event_fd, event), time.monotonic)
        try:
            with performing(title):
                yield stage
        finally:
            stage.flush()
            send_event(self._event_fd, StageEnded(stage=number))

    def report(self, diagnostic: Diagnostic) -> None:
        """Send a diagnostic."""
        send_event(self._event_fd, DiagnosticReported(diagnostic=diagnostic))

    def write(self, text: str) -> None:
        """Send a part of a text."""
        send_event(self._event_fd, TextWritten(text=text))


class RelayedStage:
    """A stage whose counts are sent at most once in `ADVANCE_SECONDS`."""

    def __init__(self, number: int, send: Callable[[StageAdvanced], None], clock: Callable[[], float]) -> None:
        self._number, self._send, self._clock = number, send, clock
        self._unsent = 0
        self._next_send = 0.0

    def advance(self, count: int = 1) -> None:
        """Count finished items."""
        self._unsent += count
        if self._clock() >= self._next_send:
            self.flush()

    def flush(self) -> None:
        """Send the items that were counted since the last event."""
        if self._unsent:
            self._send(StageAdvanced(stage=self._number, count=self._unsent))
            self._unsent, self._next_send = 0, self._clock() + ADVANCE_SECONDS


def send_event(event_fd: int, event: ChildEvent) -> None:
    """Write an event to the pipe `event_fd`; waits until the pipe takes it."""
    data = memoryview(msgspec.json.encode(event) + b"\n")
    while data:
        data = data[os.write(event_fd, data) :]
