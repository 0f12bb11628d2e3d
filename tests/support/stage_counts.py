"""A progress object that records the stages and how many items they finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ryzen_compile.progress import StageItems
from support.cache_entries import RecordingProgress


class CountedStage:
    """A stage with the number of its items."""

    def __init__(self, title: str, items: StageItems | None) -> None:
        self.title, self.items, self.done = title, items, 0

    def advance(self, count: int = 1) -> None:
        """Count finished items."""
        self.done += count

    def __str__(self) -> str:
        return f"{self.title}: {self.done} of {self.items.count} {self.items.unit}" if self.items else self.title


class StageCounts(RecordingProgress):
    """Records the stages with counts, in the order in which they begin, and the diagnostics."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[CountedStage] = []

    @contextmanager
    def stage(self, title: str, items: StageItems | None = None) -> Iterator[CountedStage]:
        """Record a stage if it counts items."""
        stage = CountedStage(title, items)
        if items is not None:
            self.stages.append(stage)
        yield stage

    def texts(self) -> list[str]:
        """Return each stage as text: `compare: 4 of 4 cases`."""
        return [str(stage) for stage in self.stages]
