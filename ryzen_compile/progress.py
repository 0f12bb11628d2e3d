"""Progress: how long work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """A listener. Both verbs return at once; neither may fail the work."""

    def stage(self, title: str) -> AbstractContextManager[object]:
        """Announce a stage, `build sm86,sm89`; it ends with the block."""
        ...

    def message(self, text: str) -> None:
        """Tell one thing that the user should read."""
        ...


class SilentProgress:
    """Listens to nothing."""

    def stage(self, title: str) -> AbstractContextManager[object]:
        """Ignore the stage."""
        return nullcontext()

    def message(self, text: str) -> None:
        """Ignore the line."""
