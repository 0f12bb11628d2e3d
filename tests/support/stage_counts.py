"""A progress object that records the stages and how many items they finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from support.cache_entries import RecordingProgress


class CountedStage:
    """A stage with the number of its items."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0

    def advance(self, count: int = 1) -> None:
        """Count finished items."""
        self.done += count

    def __str__(self) -> str:
        return f"{self.title}: {self.done} of {self.total} {self.unit}"


class StageCounts(RecordingProgress):
    """Records the stages with counts, in the order in which they begin, and the diagnostics."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[CountedStage] = []

    @contextmanager
    def stage(self, title: str, *, total: int | None = None, unit: str = "") -> Iterator[CountedStage]:
        """Record a stage if it counts items."""
        stage = CountedStage(title, total, unit)
        if unit:
            self.stages.append(stage)
        yield stage

    def texts(self) -> list[str]:
        """Return each stage as text: `compare: 4 of 4 cases`."""
        return [str(stage) for stage in self.stages]
