"""The manifest of a package: its graphs, engines, files and records of how they were built and compared."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ryzen_compile.backends.api import EngineLayers
from ryzen_compile.spec.dtypes import Precision
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.pass_record import PassRecord
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import Target
from ryzen_compile.utils.record import Record

SCHEMA_VERSION: Literal[2] = 2

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
ByteCount = Annotated[int, Meta(ge=0, le=2**53)]


class FileRecord(Record, frozen=True):
    """A file of the package."""

    path: str
    """Relative to the package, with `/` as separator; never outside it."""
    sha256: Sha256
    size_bytes: ByteCount


LEFT_OUT = "left_out"
"""The name of the metric of the share of an output that was left out of all other metrics as padding."""


class MetricRecord(Record, frozen=True):
    """One metric of one output compared with the baseline, as the worst value over all cases."""

    output: str
    name: str
    """`max_abs`, `relative_l2`, `cosine`, `top1`, `unequal`; of identical rows of a batch: `batch_invariance_max_abs`, ...;
    `left_out`, which is over all cases."""
    worst: float
    required: str | None
    """The condition that the criteria require: `<= 0.0001`; None: informational."""
    met: bool
    case: str
    """The case with the worst value: `opt 8x128, mixed rows, row 3`."""


class LossShare(Record, frozen=True):
    """What one lossy pass costs, as a part of what the whole pipeline may cost; see `spec.fidelity.loss_of`."""

    metric: str
    """`cosine`, `top1` or `snr_db`."""
    loss: float
    """The loss that the pass adds to that of the lossy passes before it; negative if it makes up for their loss."""
    total: float
    """The loss of the graph after the pass, against the source."""
    budget: float | None
    """The loss that the pipeline may cause; None: the pipeline has no budget."""


class AccuracyFloor(Record, frozen=True):
    """What lossy passes may cost: the smallest accepted value of a metric for their result, compared with the source."""

    metric: str
    """`cosine`, `top1` or `snr_db`."""
    value: float
    origin: str
    """The source of the floor: `the pipeline` or a pass."""
    passes: tuple[str, ...] = ()
    """The lossy passes whose result it is."""


class AccuracyRecord(Record, frozen=True):
    """The result of one comparison."""

    candidate: str
    """The system that was compared: `model.fold+precision.to-fp16.onnx, fp16, rounded after every op`."""
    baseline: str
    machine: str
    """The processor or GPU that ran the candidate."""
    cases: int
    criteria: str
    """The name of the criteria that were applied."""
    metrics: tuple[MetricRecord, ...]
    met: bool
    timestamp: str
    """UTC, ISO 8601."""
    passes: tuple[str, ...] = ()
    """The passes whose effect was measured, for a variant with lossy passes; empty: the whole candidate was."""
    loss_share: LossShare | None = None
    """The cost of the lossy pass in `passes`; None for other comparisons."""
    faults: tuple[str, ...] = ()
    """Failures that are independent of the criteria: a NaN, a missing output, a comparison without cases."""
    notes: tuple[str, ...] = ()
    """Remarks on how the comparison was done."""
    not_run: tuple[str, ...] = ()
    """The branches and loop bodies of the model that no case ran, which are therefore not compared."""


class Estimate(Record, frozen=True):
    """A value and its 95 % confidence interval."""

    value: float
    low: float | None = None
    """The lower bound; None if it cannot be estimated."""
    high: float | None = None
    """The upper bound; None if it cannot be estimated."""


class MetricResult(Record, frozen=True):
    """One metric of a decoder, next to that of its baseline."""

    name: str
    """`perplexity`, `agreement`, the name of a task, ..."""
    group: str
    """The subset of the data: `depth 0.2 to 0.4`; empty for all data."""
    count: int
    """The number of documents, questions or continuations in the subset."""
    baseline: Estimate | None
    """The metric of the PyTorch baseline; None if the metric is a distance to the baseline."""
    method: Estimate | None
    """The metric of the PyTorch baseline with the candidate's KV method; None if that was not run."""
    candidate: Estimate
    required: str | None = None
    """The required condition: `<= 1.01x`, where x is the value of the baseline; None: informational."""
    met: bool = True


class EvaluationRecord(Record, frozen=True):
    """The result of one evaluation of a decoder."""

    candidate: str
    """The system that was evaluated: `graphs/decode.fold.onnx by onnxruntime`."""
    baseline: str
    method: str
    """The system of `MetricResult.method`: `knorm, 512 tokens per head, in torch`, or the reason why it was not run."""
    machine: str
    """The processor or GPU that ran the candidate."""
    data: str
    """The source and the number of documents and questions."""
    step_mode: str
    """How tokens were fed: one per step, or in chunks."""
    results: tuple[MetricResult, ...]
    met: bool
    timestamp: str
    """UTC, ISO 8601."""
    seconds: float
    notes: tuple[str, ...] = ()


class Provenance(Record, frozen=True):
    """A record that an engine was built, executed or compared, and on which machine."""

    level: Literal["built", "executed", "compared"]
    machine: str
    """The processor or GPU of the machine."""
    message: str
    """For `compared`: the criteria and the baseline."""
    timestamp: str
    """UTC, ISO 8601."""
    met: bool | None = None
    """For `compared`: whether the criteria are met; otherwise None."""


class VariantRecord(Record, frozen=True):
    """A graph after one pipeline, for one backend. Its name and its backend identify it among the variants of a graph.

    Variants of several backends have the same file if their pipelines have the same result.
    """

    name: str
    """The id of its pipeline: `fold+attention+precision.to-fp16`; `source` for a pipeline without passes."""
    path: str
    backend: str
    """The backend for which the passes were run."""
    precision: Precision
    """The precision in which the graph computes."""
    portable: bool
    """Whether the portable backend can run the variant on a CPU; always false for half precision."""
    weights: tuple[str, ...]
    """The files of the weight store that the graph reads."""
    passes: tuple[PassRecord, ...]
    accuracy: tuple[AccuracyRecord, ...] = ()
    not_compared_reason: str | None = None
    """The reason why `accuracy` is empty."""
    not_compared_hint: str | None = None
    """What to do about `not_compared_reason`."""
    portable_form: str | None = None
    """The name of the portable variant of the same requested pipeline, without conversions to half precision.
    None: this is the variant of the portable backend."""
    accuracy_floor: AccuracyFloor | None = None
    """What the lossy passes of the pipeline may cost; None: no lossy pass changed the graph, or the last one has no floor."""
    state_dtypes: dict[str, str] = {}
    """The element types, by state name, of the states whose types differ from those of the graph's interface."""
    evaluations: tuple[EvaluationRecord, ...] = ()


class EngineRecord(Record, frozen=True):
    """An engine: a compiled graph for some targets."""

    path: str
    backend: str
    backend_version: str
    targets: tuple[Target, ...]
    graph: str
    variant: str
    """The name of the variant that it was compiled from; its backend is that of the engine."""
    profiles: tuple[Profile, ...]
    options: dict[str, str | int | float | bool | list[str]]
    seconds: float
    """The build time."""
    layers: EngineLayers | None
    warnings: tuple[str, ...]
    provenance: tuple[Provenance, ...]


class RefusedTarget(Record, frozen=True):
    """A target for which no engine could be built, and the reason."""

    target: Target
    graph: str
    variant: str | None
    """The name of the variant; None if no backend of the building machine supports the target."""
    backend: str
    reason: str
    hint: str | None = None


class GraphRecord(Record, frozen=True):
    """A graph of the model and its variants."""

    name: str
    """`model`, `prefill`, `decode`, `encoder`."""
    interface: Interface
    profiles: tuple[Profile, ...]
    fingerprint: str
    """The fingerprint of the source graph: structure and weights, independent of the file format."""
    source_file: str
    """The name of the source file."""
    variants: tuple[VariantRecord, ...]
    """For each backend, its first variant is the default."""


class Manifest(Record, frozen=True):
    """The manifest of a package."""

    schema_version: Literal[2]
    name: str
    key: str
    """The cache key: a digest of all inputs that determine the build."""
    key_parts: dict[str, str]
    """The parts of the key: `graphs.model.fingerprint`, `graphs.model.passes.fold@onnxruntime` -> pipeline text, ..."""
    graphs: tuple[GraphRecord, ...]
    engines: tuple[EngineRecord, ...]
    refused_targets: tuple[RefusedTarget, ...]
    files: tuple[FileRecord, ...]
    created_by: str
    created_at: str
    """UTC, ISO 8601."""
    seconds: float
    """The build time."""
    text_files: tuple[str, ...] = ()
    """The files of the tokenizer, relative to the package: `text/tokenizer.json`; empty if there is none."""

    def graph(self, name: str) -> GraphRecord:
        """Return the graph named `name`; raises KeyError if there is none."""
        return {graph.name: graph for graph in self.graphs}[name]

    def variant_at(self, path: str) -> tuple[GraphRecord, VariantRecord]:
        """Return the first variant, with its graph, whose file is `path` or from which the engine `path` was compiled.

        Raises KeyError if there is none.
        """
        engine = next((engine for engine in self.engines if engine.path == path), None)
        if engine is not None:
            return self.graph(engine.graph), self.variant_of(engine)
        variants = {variant.path: (graph, variant) for graph in self.graphs for variant in reversed(graph.variants)}
        return variants[path]

    def variant_of(self, engine: EngineRecord) -> VariantRecord:
        """Return the variant that `engine` was compiled from; raises KeyError if there is none."""
        variants = {(variant.name, variant.backend): variant for variant in self.graph(engine.graph).variants}
        return variants[engine.variant, engine.backend]
