"""The text of running stages: counts, elapsed time and expected time, in lines at fixed intervals."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ryzen_compile.progress import StageItems

LINE_SECONDS = 10.0
"""The time between two lines of progress where stderr is not a terminal, in seconds."""

_MIN_SHARE = 0.1
"""The share of items of different sizes from which on the time left is estimated: before, fixed costs may outweigh theirs."""
_MIN_MINUTES_SECONDS, _MIN_HOURS_SECONDS = 120, 7200
"""From these durations on, a duration is given in minutes, or in hours and minutes."""
_MIN_ESTIMATE_MINUTES_SECONDS = 90
"""From this duration on, an estimate is given in minutes."""


class RunningStage:
    """A running stage with the items that it has finished. Thread-safe."""

    def __init__(self, title: str, items: StageItems | None, clock: Callable[[], float]) -> None:
        self.items = items
        self._title, self._clock = title, clock
        self._started = self._advanced = clock()
        self._done = 0
        self._lock = threading.Lock()

    def advance(self, count: int = 1) -> None:
        """Count finished items."""
        with self._lock:
            self._done += count
            self._advanced = self._clock()

    def text(self) -> str:
        """Return the title, the count, the elapsed time and the time left: `compare: 12 of 40 cases, 8 s, about 19 s left`.

        The time left is estimated from the rate so far, after the first item; if sizes differ, after `_MIN_SHARE` of them.
        It is left out while the current item takes longer than the estimate.
        """
        with self._lock:
            now, done, advanced = self._clock(), self._done, self._advanced
        elapsed, items = now - self._started, self.items
        if items is None or (items.count is None and not done):
            return f"{self._title}: {format_elapsed(elapsed)}" if elapsed >= 1 else self._title
        if items.count is None:
            return f"{self._title}: {done:,} {items.unit}, {format_elapsed(elapsed)}"
        text = f"{self._title}: {done:,} of {items.count:,} {items.unit}, {format_elapsed(elapsed)}"
        share = sum(items.sizes[:done]) / max(1, sum(items.sizes)) if items.sizes else done / max(1, items.count)
        if not (_MIN_SHARE if items.sizes else 0) < share < 1:
            return text
        left = (advanced - self._started) * (1 / share - 1) - (now - advanced)
        return f"{text}, about {format_estimate(max(left, 1))} left" if left > 0 else text

    def summary(self) -> str:
        """Return the title, the number of finished items, and the duration: `compare: 40 cases, 27.0 s`."""
        with self._lock:
            count = f"{self._done:,} {self.items.unit}, " if self.items is not None else ""
        return f"{self._title}: {count}{self._clock() - self._started:.1f} s"


class StageList:
    """The running stages of a command, and when the next line about them is due. Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stages: list[RunningStage] = []
        self._last_line: float | None = None
        """The time of the last line, at first that of the first stage."""

    def begin(self, stage: RunningStage) -> None:
        """Add a stage."""
        with self._lock:
            self._stages.append(stage)
            if self._last_line is None:
                self._last_line = self._clock()

    def end(self, stage: RunningStage) -> bool:
        """Remove a stage, and return whether it was the last one."""
        with self._lock:
            self._stages.remove(stage)
            return not self._stages

    def text(self) -> str | None:
        """Return the text of the newest stage that counts items, otherwise of the newest stage; None if there are none."""
        with self._lock:
            stages = self._stages[::-1]
        stage = next((stage for stage in stages if stage.items is not None), stages[0] if stages else None)
        return stage.text() if stage is not None else None

    def seconds_to_line(self) -> float:
        """Return the time until the next line is due."""
        now = self._clock()
        return LINE_SECONDS if self._last_line is None else max(0.0, self._last_line + LINE_SECONDS - now)

    def next_line(self) -> str | None:
        """Return a line that is due; None if no stage is running. The next one is due `LINE_SECONDS` later."""
        self._last_line = self._clock()
        return self.text()


def format_elapsed(seconds: float) -> str:
    """Return a duration to the second: `75 s`, `12 min 5 s`, `2 h 5 min`."""
    if seconds < _MIN_MINUTES_SECONDS:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if seconds < _MIN_HOURS_SECONDS else f"{minutes // 60} h {minutes % 60} min"


def format_estimate(seconds: float) -> str:
    """Return an estimated duration: `75 s`, `12 min`, `2 h 5 min`."""
    if _MIN_ESTIMATE_MINUTES_SECONDS <= seconds < _MIN_HOURS_SECONDS:
        return f"{seconds / 60:.0f} min"
    return format_elapsed(seconds)
