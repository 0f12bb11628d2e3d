"""The protocol between a worker and its child process: JSON lines over standard input and a reply pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ryzen_compile.backends.api import BuildRequest, EngineLayers
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.processes.crash_breadcrumb import ChildOutput, CrashBreadcrumb


class WorkerReady(Record, frozen=True, tag=True):
    """The child process has loaded its library and accepts commands."""

    version: str


class BuildDone(Record, frozen=True, tag=True):
    """The engine was built."""

    sha256: str
    size_bytes: int
    uses_source_graph: bool = False
    """Whether nothing was written because the backend runs the graph itself."""
    layers: EngineLayers | None = None
    warnings: tuple[str, ...] = ()


class BuildRejected(Record, frozen=True, tag=True):
    """The engine cannot be built; the child process accepts further commands."""

    message: str
    hint: str | None = None
    may_be_one_target: bool = True
    """Whether the cause may be one of several targets."""
    is_disk_error: bool = False
    """Whether a disk error is the cause, which affects every target, and not the graph."""


WorkerReply = WorkerReady | BuildDone | BuildRejected


class BuildCommand(Record, frozen=True):
    """The command of the parent to build one engine."""

    request: BuildRequest
    output: str
    """The path to write the engine to."""


class WorkerBuilder(Protocol):
    """The part of a backend that runs in the child process: created once per process, and called for one engine at a time."""

    version: str
    """The version of the library."""

    def build(self, request: BuildRequest, output: str, breadcrumb: CrashBreadcrumb, child_output: ChildOutput) -> BuildDone:
        """Build the engine of `request` into the file `output`. Raises BackendError if it cannot be built."""
        ...


@runtime_checkable
class WorkerBackend(Protocol):
    """A backend whose builds run in the child process of a worker."""

    @property
    def name(self) -> str:
        """The name under which the registry lists the backend."""
        ...

    @property
    def builder_entry_point(self) -> str:
        """The builder class that the child process instantiates, as `module:class`."""
        ...

    def check(self, request: BuildRequest) -> None:
        """Raise BackendError if `request` is not supported, before a child process receives it."""
        ...
