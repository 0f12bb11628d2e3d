"""The backend interface: what every runtime that builds engines or runs graphs implements, and the records it exchanges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ryzen_compile.spec.interface import Inputs, Outputs, StateSpec, TensorSpec
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import Target
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.backends.traits import BackendTraits
    from ryzen_compile.progress import Progress


class Capabilities(Record, frozen=True):
    """What a backend can do on this machine."""

    available: bool
    """Whether the backend can build on this machine."""
    version: str | None
    """The installed version of the library; None if it cannot be used."""
    message: str
    """One sentence: what the backend can do on this machine, or why it is unavailable."""
    install_hint: str | None = None
    """The command that makes the backend available."""
    sms: tuple[int, ...] = ()
    """The compute capabilities that the backend can build for on this machine, each major * 10 + minor."""
    cpu: bool = False
    """Whether the backend builds for the CPU."""
    can_run: bool = False
    """Whether the backend can also run on this machine what it builds."""
    not_executed: tuple[str, ...] = ()
    """The features of this backend that were never executed during development, each in one sentence."""


class AttentionFusion(Record, frozen=True):
    """An attention of the graph, and the kernels that the builder compiled it to."""

    kernel: str
    """The kernel name in the builder's spelling; for an unfused attention the layer types joined by ` + `."""
    fused: bool
    nodes: tuple[str, ...] = ()
    """The graph nodes that the kernel implements, as far as the builder reports them."""


class EngineLayers(Record, frozen=True):
    """The layers of an engine: their element types and their attention fusions."""

    source: Literal["engine inspector", "builder log"]
    total: int
    by_type: dict[str, int]
    """The number of layers by the element type that they compute in: `float16`, `float32`, ..."""
    attentions: tuple[AttentionFusion, ...] = ()
    limitation: str = ""
    """What the source does not report, in one sentence."""

    def dtype_fraction(self, dtype: str) -> float:
        """Return the fraction of typed layers that compute in `dtype`, in [0, 1]."""
        typed = sum(self.by_type.values())
        return self.by_type.get(dtype, 0) / typed if typed else 0.0


class BuildRequest(Record, frozen=True):
    """A request to build one engine from one ONNX file."""

    onnx_path: str
    """The path of the ONNX file; external weights are located relative to it.

    Weight files may be hard links, which `onnx.load` refuses to read: read the file with `ryzen_compile.ir.load.load`."""
    output: str
    """The path to write the engine to."""
    targets: tuple[Target, ...]
    profiles: tuple[Profile, ...]
    options: dict[str, str | int | float | bool | list[str]] = {}
    """Builder options by their trtexec names, already validated for the backend by `builder_options.parse_options`."""
    memory_bytes: int | None = None
    """The memory limit of the build in bytes; None: unlimited."""
    seconds: float | None = None
    """The time limit of the build in seconds; None: unlimited."""


class BuiltEngine(Record, frozen=True):
    """The result of a successful build."""

    path: str
    sha256: str
    size_bytes: int
    backend: str
    backend_version: str
    target_names: tuple[str, ...]
    """The names of the targets of the request."""
    seconds: float
    """The duration of the build."""
    layers: EngineLayers | None = None
    warnings: tuple[str, ...] = ()


class StateBinding(Protocol):
    """The states of a decoder in device memory, and decoding steps over them. Not thread-safe."""

    def run(self, inputs: Inputs) -> Outputs:
        """Run one step on the inputs that are not states, and return the outputs that are not states, by name.

        The outputs are host arrays owned by the caller. Raises BackendError if the step fails; the contents of the states are
        then undefined until every row is reset.
        """
        ...

    def reset(self, rows: Sequence[int]) -> None:
        """Set `rows` of every state to their initial value."""
        ...

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Return a copy of the state called `name`, (batch, ...), as the next step reads it."""
        ...

    def close(self) -> None:
        """Free the memory of the states."""
        ...


class Session(Protocol):
    """A graph or an engine that is ready to run. Thread-safe."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, inputs: Inputs) -> Outputs:
        """Run once on arrays by input name, and return host arrays by output name.

        Raises ShapeError for inputs that do not match the specs or lie outside every profile, BackendError if the run fails.
        """
        ...

    def bind_states(
        self, states: Sequence[StateSpec], shapes: Mapping[str, tuple[int, ...]], *, share_with: StateBinding | None = None
    ) -> StateBinding:
        """Allocate `states` with their initial values and return steps over them; `shapes` holds {state input name: shape}.

        With `share_with`, the steps of another graph of this backend, both graphs step alternately over the same memory. Their
        states must agree in names, shapes, element types and initial values; `in_place` may differ. Raises BackendError if
        they do not agree.
        """
        ...


class Backend(Protocol):
    """A runtime that builds engines or runs graphs.

    A backend is a value without global state: several are used in one process, and no environment variable selects one. If it
    also implements `process.protocol.WorkerBackend`, its builds run in a child process, which limits their memory and time and
    survives a crash of the library; otherwise `build` runs in the process of the caller.
    """

    @property
    def name(self) -> str:
        """The name under which the registry lists the backend."""
        ...

    @property
    def traits(self) -> BackendTraits:
        """The static facts about the backend."""
        ...

    def probe(self) -> Capabilities:
        """Return what the backend can do on this machine, within milliseconds and without changing the state of a GPU."""
        ...

    def build(self, request: BuildRequest, progress: Progress) -> BuiltEngine:
        """Write one engine to `request.output` and return its record.

        `BuiltEngine.path` is `request.output`, or `request.onnx_path` if the portable backend runs the graph itself. Raises
        BackendError, which names the failing node if it is known.
        """
        ...

    def open(self, path: str, *, cache_dir: str | None = None, map_weights: bool = False) -> AbstractContextManager[Session]:
        """Load a graph or an engine on this machine; loading caches the kernels that it compiles in the folder `cache_dir`.

        With `map_weights`, a backend that can do so maps the weights from their files instead of copying them into a layout of
        its own, so that several graphs share them.

        Raises BackendError if the file cannot be loaded.
        """
        ...
