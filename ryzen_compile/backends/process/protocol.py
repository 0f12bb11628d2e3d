"""What a worker and its child process say to each other: JSON lines over a pipe of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ryzen_compile.backends.api import BuildRequest, EngineLayers
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.backends.process.crash_breadcrumb import ChildOutput, CrashBreadcrumb


class WorkerReady(Record, frozen=True, tag=True):
    """The child has loaded its library and takes requests."""

    version: str


class BuildDone(Record, frozen=True, tag=True):
    """What was asked for was built."""

    sha256: str
    size_bytes: int
    uses_source_graph: bool = False
    """Nothing was written: the graph itself is what runs."""
    layers: EngineLayers | None = None
    warnings: tuple[str, ...] = ()


class BuildRejected(Record, frozen=True, tag=True):
    """What was asked for cannot be built, and the child is well."""

    message: str
    hint: str | None = None
    is_disk_error: bool = False
    """Whether it is not the graph that stands in the way but the disk: then no other target fares better."""


WorkerReply = WorkerReady | BuildDone | BuildRejected


class BuildCommand(Record, frozen=True):
    """What the parent asks for."""

    request: BuildRequest
    output: str


class WorkerBuilder(Protocol):
    """The child's side of a backend: made once in each child, asked for one engine after the other."""

    version: str

    def build(self, request: BuildRequest, output: str, breadcrumb: CrashBreadcrumb, child_output: ChildOutput) -> BuildDone:
        """Build into the file `output`; raises BackendError for what cannot be built."""
        ...


@runtime_checkable
class WorkerBackend(Protocol):
    """A backend whose builds run in a worker."""

    @property
    def name(self) -> str:
        """The name that the register knows it by."""
        ...

    @property
    def builder_entry_point(self) -> str:
        """Where its builder is: `module:class`."""
        ...

    def check(self, request: BuildRequest) -> None:
        """Raise BackendError for what is refused before a child is asked."""
        ...
