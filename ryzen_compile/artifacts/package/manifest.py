"""The manifest: all that a package says about itself."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ryzen_compile.backends.api import Layers
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.pass_record import Step
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import Target
from ryzen_compile.utils.record import Record

SCHEMA_VERSION: Literal[1] = 1

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Bytes = Annotated[int, Meta(ge=0, le=2**53)]


class File(Record, frozen=True):
    """A file of the package."""

    path: str
    """Relative to the package, with `/`; never outside of it."""
    sha256: Sha256
    size_bytes: Bytes


class Metric(Record, frozen=True):
    """One measure of one output against the baseline, at its worst over all cases."""

    output: str
    name: str
    """`max_abs`, `relative_l2`, `cosine`, `top1`, `unequal`; of equal rows against each other: `slot_max_abs`, ..."""
    worst: float
    required: str | None
    """What the criteria ask: `<= 0.0001`; None: told, not judged."""
    met: bool
    case: str
    """Where it was worst: `opt 8x128, mixed rows, row 3`."""


class Accuracy(Record, frozen=True):
    """The result of one comparison."""

    subject: str
    """What was compared: `model.fp16.onnx, rounded after every op`."""
    baseline: str
    where: str
    """The machine's processor or GPU that ran it."""
    cases: int
    criteria: str
    """The name of the criteria that it was held to."""
    metrics: tuple[Metric, ...]
    met: bool
    when: str
    """UTC, ISO 8601."""
    faults: tuple[str, ...] = ()
    """What fails whatever the criteria: a NaN, a missing output, a comparison that compared nothing."""
    notes: tuple[str, ...] = ()
    """What a reader should know of how it was compared."""


class Figure(Record, frozen=True):
    """A number, and where it lies with a confidence of 95 %; None where that cannot be told."""

    value: float
    low: float | None = None
    high: float | None = None


class Finding(Record, frozen=True):
    """One measure of a decoder, side by side with its baseline's."""

    name: str
    """`perplexity`, `agreement`, the name of a task, ..."""
    part: str
    """Of what it is a part: `depth 0.2 to 0.4`; empty: of all."""
    of: int
    """How many documents, questions or continuations it is a figure of."""
    baseline: Figure | None
    """The PyTorch baseline's; None where the measure is the distance to it."""
    method: Figure | None
    """The same of the baseline with the method of the caches that the subject has; None where that was not run."""
    subject: Figure
    required: str | None = None
    """What it must be: `<= 1.01x`, where x is the baseline's; None: told, not judged."""
    met: bool = True


class Evaluated(Record, frozen=True):
    """The result of one evaluation of a decoder."""

    subject: str
    """What ran: `graphs/decode.fp32.onnx by onnxruntime`."""
    baseline: str
    method: str
    """What the middle column is: `knorm, 512 tokens a head, in torch`, or why there is none."""
    where: str
    """The machine's processor or GPU that ran it."""
    data: str
    """Documents and questions: where they come from, and how many."""
    steps: str
    """How they were fed: one token at a time, or in chunks."""
    findings: tuple[Finding, ...]
    met: bool
    when: str
    """UTC, ISO 8601."""
    seconds: float
    notes: tuple[str, ...] = ()


class Evidence(Record, frozen=True):
    """How much is known about an engine, and from where."""

    level: Literal["built", "executed", "compared"]
    on: str
    """The machine's processor or GPU."""
    says: str
    when: str


class Variant(Record, frozen=True):
    """A graph as the passes left it for some of the targets."""

    name: str
    """`fp32`, `fp16`; with the backend's name where it only suits that: `fp16-tensorrt-rtx`."""
    path: str
    backend: str
    """The backend that the passes were chosen for."""
    precision: Literal["fp32", "fp16", "bf16"]
    portable: bool
    """Whether ONNX Runtime may serve it on a CPU: never for half precision."""
    weights: tuple[str, ...]
    """The files of the weight store that it reads."""
    steps: tuple[Step, ...]
    accuracy: tuple[Accuracy, ...] = ()
    not_compared: str | None = None
    """Why `accuracy` is empty."""
    states: dict[str, str] = {}
    """The element types of states that are not those of the graph's interface, by the names of the states."""
    evaluations: tuple[Evaluated, ...] = ()


class Engine(Record, frozen=True):
    """A compiled graph for some targets."""

    path: str
    backend: str
    backend_version: str
    targets: tuple[Target, ...]
    graph: str
    variant: str
    profiles: tuple[Profile, ...]
    options: dict[str, str | int | float | bool | list[str]]
    seconds: float
    layers: Layers | None
    warnings: tuple[str, ...]
    evidence: tuple[Evidence, ...]


class Refused(Record, frozen=True):
    """A target that could not be built for."""

    target: Target
    graph: str
    backend: str
    reason: str
    hint: str | None = None


class Graph(Record, frozen=True):
    """One named graph of the model: `model`, `prefill`, `decode`, `encoder`."""

    name: str
    interface: Interface
    profiles: tuple[Profile, ...]
    fingerprint: str
    """Of the graph as it came in: structure and weights, whatever file they were in."""
    source: str
    """The file's name that it came from."""
    variants: tuple[Variant, ...]


class Manifest(Record, frozen=True):
    """A package."""

    schema_version: Literal[1]
    name: str
    key: str
    """The cache key: a digest of everything that decides what is built."""
    inputs: dict[str, str]
    """What went into the key, part by part: `graph model` -> fingerprint, `passes fp16` -> spelling and versions, ..."""
    graphs: tuple[Graph, ...]
    engines: tuple[Engine, ...]
    refused: tuple[Refused, ...]
    files: tuple[File, ...]
    made_by: str
    made_at: str
    """UTC, ISO 8601."""
    seconds: float

    def graph(self, name: str) -> Graph:
        """Return the graph called `name`; raises KeyError."""
        return {graph.name: graph for graph in self.graphs}[name]
