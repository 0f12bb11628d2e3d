"""The manifest: all that a package says about itself."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ryzen_compile.backends.api import EngineLayers
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.pass_record import PassRecord
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import Target
from ryzen_compile.utils.record import Record

SCHEMA_VERSION: Literal[1] = 1

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
ByteCount = Annotated[int, Meta(ge=0, le=2**53)]


class FileRecord(Record, frozen=True):
    """A file of the package."""

    path: str
    """Relative to the package, with `/`; never outside of it."""
    sha256: Sha256
    size_bytes: ByteCount


class MetricRecord(Record, frozen=True):
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


class AccuracyRecord(Record, frozen=True):
    """The result of one comparison."""

    candidate: str
    """What was compared: `model.fp16.onnx, rounded after every op`."""
    baseline: str
    machine: str
    """The machine's processor or GPU that ran it."""
    cases: int
    criteria: str
    """The name of the criteria that it was held to."""
    metrics: tuple[MetricRecord, ...]
    met: bool
    timestamp: str
    """UTC, ISO 8601."""
    faults: tuple[str, ...] = ()
    """What fails whatever the criteria: a NaN, a missing output, a comparison that compared nothing."""
    notes: tuple[str, ...] = ()
    """What a reader should know of how it was compared."""


class Estimate(Record, frozen=True):
    """A number, and where it lies with a confidence of 95 %; None where that cannot be told."""

    value: float
    low: float | None = None
    high: float | None = None


class MetricResult(Record, frozen=True):
    """One measure of a decoder, side by side with its baseline's."""

    name: str
    """`perplexity`, `agreement`, the name of a task, ..."""
    group: str
    """Of what it is a part: `depth 0.2 to 0.4`; empty: of all."""
    count: int
    """How many documents, questions or continuations it is a figure of."""
    baseline: Estimate | None
    """The PyTorch baseline's; None where the measure is the distance to it."""
    method: Estimate | None
    """The same of the baseline with the method of the caches that the subject has; None where that was not run."""
    candidate: Estimate
    required: str | None = None
    """What it must be: `<= 1.01x`, where x is the baseline's; None: told, not judged."""
    met: bool = True


class EvaluationRecord(Record, frozen=True):
    """The result of one evaluation of a decoder."""

    candidate: str
    """What ran: `graphs/decode.fp32.onnx by onnxruntime`."""
    baseline: str
    method: str
    """What the middle column is: `knorm, 512 tokens a head, in torch`, or why there is none."""
    machine: str
    """The machine's processor or GPU that ran it."""
    data: str
    """Documents and questions: where they come from, and how many."""
    step_mode: str
    """How they were fed: one token at a time, or in chunks."""
    results: tuple[MetricResult, ...]
    met: bool
    timestamp: str
    """UTC, ISO 8601."""
    seconds: float
    notes: tuple[str, ...] = ()


class Provenance(Record, frozen=True):
    """How much is known about an engine, and from where."""

    level: Literal["built", "executed", "compared"]
    machine: str
    """The machine's processor or GPU."""
    message: str
    timestamp: str


class VariantRecord(Record, frozen=True):
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
    passes: tuple[PassRecord, ...]
    accuracy: tuple[AccuracyRecord, ...] = ()
    not_compared_reason: str | None = None
    """Why `accuracy` is empty."""
    state_dtypes: dict[str, str] = {}
    """The element types of states that are not those of the graph's interface, by the names of the states."""
    evaluations: tuple[EvaluationRecord, ...] = ()


class EngineRecord(Record, frozen=True):
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
    layers: EngineLayers | None
    warnings: tuple[str, ...]
    provenance: tuple[Provenance, ...]


class RefusedTarget(Record, frozen=True):
    """A target that could not be built for."""

    target: Target
    graph: str
    backend: str
    reason: str
    hint: str | None = None


class GraphRecord(Record, frozen=True):
    """One named graph of the model: `model`, `prefill`, `decode`, `encoder`."""

    name: str
    interface: Interface
    profiles: tuple[Profile, ...]
    fingerprint: str
    """Of the graph as it came in: structure and weights, whatever file they were in."""
    source_file: str
    """The file's name that it came from."""
    variants: tuple[VariantRecord, ...]


class Manifest(Record, frozen=True):
    """A package."""

    schema_version: Literal[1]
    name: str
    key: str
    """The cache key: a digest of everything that decides what is built."""
    key_parts: dict[str, str]
    """What went into the key, part by part: `graph model` -> fingerprint, `passes fp16` -> spelling and versions, ..."""
    graphs: tuple[GraphRecord, ...]
    engines: tuple[EngineRecord, ...]
    refused_targets: tuple[RefusedTarget, ...]
    files: tuple[FileRecord, ...]
    created_by: str
    created_at: str
    """UTC, ISO 8601."""
    seconds: float

    def graph(self, name: str) -> GraphRecord:
        """Return the graph called `name`; raises KeyError."""
        return {graph.name: graph for graph in self.graphs}[name]
