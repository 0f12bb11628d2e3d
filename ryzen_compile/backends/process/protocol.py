"""What a worker and its child process say to each other: JSON lines over a pipe of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ryzen_compile.backends.api import Layers, Request
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.backends.process.crash_breadcrumb import Chatter, Recorder


class Ready(Record, frozen=True, tag=True):
    """The child has loaded its library and takes requests."""

    version: str


class Done(Record, frozen=True, tag=True):
    """What was asked for was built."""

    sha256: str
    size_bytes: int
    as_it_is: bool = False
    """Nothing was written: the graph itself is what runs."""
    layers: Layers | None = None
    warnings: tuple[str, ...] = ()


class Refused(Record, frozen=True, tag=True):
    """What was asked for cannot be built, and the child is well."""

    says: str
    hint: str | None = None
    by_disk: bool = False
    """Whether it is not the graph that stands in the way but the disk: then no other target fares better."""


Reply = Ready | Done | Refused


class Order(Record, frozen=True):
    """What the parent asks for."""

    request: Request
    output: str


class Builder(Protocol):
    """The child's side of a backend: made once in each child, asked for one engine after the other."""

    version: str

    def build(self, request: Request, output: str, recorder: Recorder, chatter: Chatter) -> Done:
        """Build into the file `output`; raises BackendError for what cannot be built."""
        ...


@runtime_checkable
class Buildable(Protocol):
    """A backend whose builds run in a worker."""

    @property
    def name(self) -> str:
        """The name that the register knows it by."""
        ...

    @property
    def builder(self) -> str:
        """Where its builder is: `module:class`."""
        ...

    def check(self, request: Request) -> None:
        """Raise BackendError for what is refused before a child is asked."""
        ...
