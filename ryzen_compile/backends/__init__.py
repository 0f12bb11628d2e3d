"""Backends: the same few verbs for each runtime that can build or run a graph."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, Protocol

from ryzen_compile.interface import TensorSpec
from ryzen_compile.profile import Profile
from ryzen_compile.record import Record
from ryzen_compile.target import Target

if TYPE_CHECKING:
    from ryzen_compile.contract import Feed
    from ryzen_compile.progress import Progress


def members() -> dict[str, str]:
    """Return the backends of this room: every module that is one."""
    from ryzen_compile.registry import modules_of

    return modules_of(__name__, besides=("worker", "options", "layers"))


class Capabilities(Record, frozen=True):
    """What a backend can do on this machine."""

    available: bool
    """Whether it can build here."""
    version: str | None
    says: str
    """One sentence: what it can do here, or why it is absent."""
    mend: str | None = None
    """The command that makes it available."""
    sms: tuple[int, ...] = ()
    """The compute capabilities that it can build for here."""
    cpu: bool = False
    """Whether it builds for the CPU."""
    can_run: bool = False
    """Whether it can also run here what it builds."""
    not_executed: tuple[str, ...] = ()
    """What of this backend was never executed where it was developed, each in one sentence."""


class Fusion(Record, frozen=True):
    """An attention of the graph, and what the builder made of it."""

    kernel: str
    """The kernel's name as the builder gives it."""
    fused: bool
    nodes: tuple[str, ...] = ()
    """The nodes of the graph that it stands for, as far as the builder tells."""


class Layers(Record, frozen=True):
    """What is known about the inside of an engine."""

    source: Literal["engine inspector", "builder log"]
    total: int
    by_type: dict[str, int]
    """Layers by the element type they compute in: `float16`, `float32`, ..."""
    attentions: tuple[Fusion, ...] = ()
    says: str = ""
    """What the source cannot tell, in one sentence."""

    def share(self, dtype: str) -> float:
        """Return the share of typed layers that compute in `dtype`, in [0, 1]."""
        typed = sum(self.by_type.values())
        return self.by_type.get(dtype, 0) / typed if typed else 0.0


class Request(Record, frozen=True):
    """One engine to build: a file in, a file out."""

    graph: str
    """The path of an ONNX file; its weights lie where the file says."""
    output: str
    """Where to write the engine."""
    targets: tuple[Target, ...]
    profiles: tuple[Profile, ...]
    options: dict[str, str | int | float | bool | list[str]] = {}
    """Builder options by the names that trtexec gives them, already accepted by the backend: see `options.py`."""
    memory_bytes: int | None = None
    """The most memory that the build may take; None: no bound."""
    seconds: float | None = None
    """The longest that the build may take; None: no bound."""


class Built(Record, frozen=True):
    """An engine that was built."""

    path: str
    sha256: str
    size_bytes: int
    backend: str
    backend_version: str
    targets: tuple[str, ...]
    seconds: float
    layers: Layers | None = None
    warnings: tuple[str, ...] = ()


class Session(Protocol):
    """A graph or an engine that is ready to run. Calls from several threads are safe."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feed: Feed) -> Feed:
        """Run once; arrays on the host in and out, outputs by name. Shapes outside of the profiles raise ShapeError."""
        ...


class Backend(Protocol):
    """A value: several live in one process, and none is chosen by an environment variable."""

    @property
    def name(self) -> str:
        """The name that the register knows it by."""
        ...

    def probe(self) -> Capabilities:
        """Tell what it can do here; must be quick and must not touch a GPU's state."""
        ...

    def build(self, request: Request, progress: Progress) -> Built:
        """Build one engine in a child process; raises BackendError that names the node when it can be known."""
        ...

    def open(self, path: str, *, cache: str | None = None) -> AbstractContextManager[Session]:
        """Make a graph or an engine ready to run here; `cache` is a folder for what loading makes (compiled kernels)."""
        ...
