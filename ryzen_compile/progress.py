"""Progress reporting: the interface through which long operations report what they do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from ryzen_compile.diagnostic import Diagnostic


class Progress(Protocol):
    """A progress listener. Its methods do not block and must not raise."""

    def stage(self, title: str) -> AbstractContextManager[object]:
        """Report that a stage such as `build sm86,sm89` begins; it ends when the returned context exits."""
        ...

    def report(self, diagnostic: Diagnostic) -> None:
        """Report one diagnostic to the user: a warning, or information about what was done."""
        ...


class SilentProgress:
    """A progress listener that discards everything."""

    def stage(self, title: str) -> AbstractContextManager[object]:
        """Discard the stage."""
        return nullcontext()

    def report(self, diagnostic: Diagnostic) -> None:
        """Discard the diagnostic."""
