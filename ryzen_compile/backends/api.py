"""Backends: the same few verbs for each runtime that can build or run a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ryzen_compile.spec.interface import StateSpec, TensorSpec
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import Target
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.passes import Inputs


class Capabilities(Record, frozen=True):
    """What a backend can do on this machine."""

    available: bool
    """Whether it can build here."""
    version: str | None
    message: str
    """One sentence: what it can do here, or why it is absent."""
    install_hint: str | None = None
    """The command that makes it available."""
    sms: tuple[int, ...] = ()
    """The compute capabilities that it can build for here."""
    cpu: bool = False
    """Whether it builds for the CPU."""
    can_run: bool = False
    """Whether it can also run here what it builds."""
    not_executed: tuple[str, ...] = ()
    """What of this backend was never executed where it was developed, each in one sentence."""


class AttentionFusion(Record, frozen=True):
    """An attention of the graph, and what the builder made of it."""

    kernel: str
    """The kernel's name as the builder gives it."""
    fused: bool
    nodes: tuple[str, ...] = ()
    """The nodes of the graph that it stands for, as far as the builder tells."""


class EngineLayers(Record, frozen=True):
    """What is known about the inside of an engine."""

    source: Literal["engine inspector", "builder log"]
    total: int
    by_type: dict[str, int]
    """Layers by the element type they compute in: `float16`, `float32`, ..."""
    attentions: tuple[AttentionFusion, ...] = ()
    limitation: str = ""
    """What the source cannot tell, in one sentence."""

    def dtype_fraction(self, dtype: str) -> float:
        """Return the share of typed layers that compute in `dtype`, in [0, 1]."""
        typed = sum(self.by_type.values())
        return self.by_type.get(dtype, 0) / typed if typed else 0.0


class BuildRequest(Record, frozen=True):
    """One engine to build: a file in, a file out."""

    onnx_path: str
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


class BuiltEngine(Record, frozen=True):
    """An engine that was built."""

    path: str
    sha256: str
    size_bytes: int
    backend: str
    backend_version: str
    targets: tuple[str, ...]
    seconds: float
    layers: EngineLayers | None = None
    warnings: tuple[str, ...] = ()


class StateBinding(Protocol):
    """The states of a decoder in the memory that it computes in, and steps over them. For one caller at a time."""

    def run(self, inputs: Inputs) -> Inputs:
        """Run one step on the inputs that are no states and return the outputs that are none, by name.

        Those are arrays on the host that the caller owns. Where it raises BackendError, what the states hold is unknown until
        every row is reset.
        """
        ...

    def reset(self, rows: Sequence[int]) -> None:
        """Set these rows of every state to what it holds before the first step."""
        ...

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Return a copy of the state called `name`, as the next step finds it."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class Session(Protocol):
    """A graph or an engine that is ready to run. Calls from several threads are safe."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, inputs: Inputs) -> Inputs:
        """Run once; arrays on the host in and out, outputs by name. Shapes outside of the profiles raise ShapeError."""
        ...

    def bind_states(
        self, states: Sequence[StateSpec], shapes: Mapping[str, tuple[int, ...]], *, share_with: StateBinding | None = None
    ) -> StateBinding:
        """Make room for `states`, none of which has seen a step; `shapes` holds theirs by the names of their inputs.

        With `beside`, the steps of another graph of this backend, both step over one memory, in turns: their states agree in
        names, shapes, types and initial values, and each says for itself what it writes in place. Raises BackendError where
        they do not.
        """
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

    def build(self, request: BuildRequest, progress: Progress) -> BuiltEngine:
        """Build one engine in a child process; raises BackendError that names the node when it can be known."""
        ...

    def open(self, path: str, *, cache_dir: str | None = None) -> AbstractContextManager[Session]:
        """Make a graph or an engine ready to run here; `cache` is a folder for what loading makes (compiled kernels)."""
        ...
