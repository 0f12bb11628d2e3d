"""Progress reporting: the interface through which long operations report what they do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ryzen_compile.diagnostic import Diagnostic

_Item = TypeVar("_Item")


class Stage(Protocol):
    """A running stage. Its method does not block and must not raise."""

    def advance(self, count: int = 1) -> None:
        """Report that `count` more items are finished, at least 0."""
        ...


@dataclass(frozen=True)
class StageItems:
    """The items that a stage counts."""

    unit: str
    """What they are, in the plural: `cases`."""
    count: int | None = None
    """Their number; None: it is not known."""
    sizes: tuple[float, ...] = ()
    """The relative times that they take, in order; empty: all are equal."""


class Progress(Protocol):
    """A progress listener. Its methods do not block and must not raise."""

    def stage(self, title: str, items: StageItems | None = None) -> AbstractContextManager[Stage]:
        """Report that a stage such as `build sm86,sm89` begins; it ends when the returned context exits.

        A stage with `items` reports each finished one to the object that the context yields.
        """
        ...

    def report(self, diagnostic: Diagnostic) -> None:
        """Report one diagnostic to the user: a warning, or information about what was done."""
        ...


class SilentStage:
    """A stage that discards its counts."""

    def advance(self, count: int = 1) -> None:
        """Discard the count."""


class SilentProgress:
    """A progress listener that discards everything."""

    def stage(self, title: str, items: StageItems | None = None) -> AbstractContextManager[Stage]:
        """Discard the stage."""
        return nullcontext(SilentStage())

    def report(self, diagnostic: Diagnostic) -> None:
        """Discard the diagnostic."""


def counted(items: Iterable[_Item], stage: Stage) -> Iterator[_Item]:
    """Yield `items`, and report each to `stage` when the next one is requested."""
    for item in items:
        yield item
        stage.advance()
