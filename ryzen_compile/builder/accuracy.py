"""Accuracy of a build: which comparisons check a variant, and their results, before the package is published.

A variant whose passes are exact or within a tolerance is compared with its source under the numeric criteria. Where a lossy
pass changed the graph, the passes are checked in segments: the output of the lossy pass against the source, by the metric and
floor that the pass declares, and each run of other passes against its own input, by the numeric criteria. So an error of
another rewrite is found although a loss is declared. The accuracy budget of the pipeline, if there is one, is a floor for the
finished variant and for every lossy pass that declares none; without a budget, the floor of the last lossy pass is that of the
finished variant. A variant is also compared with a PyTorch baseline, if one is given, to which the same lossy methods are
applied.

The kv passes change the interface and run in `rewrite` only: their cost is measured by `evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import AccuracyFloor, AccuracyRecord, LossShare
from ryzen_compile.builder.cache_keys import ComparisonKey, comparison_key
from ryzen_compile.errors import PipelineError
from ryzen_compile.jobs.job import Job, JobOutput, Resources, runs
from ryzen_compile.numerics import COMPARISON_MODULES
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.spec.fidelity import COMPARISON_METRICS, AccuracyBudget, Lossy, loss_of
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.pass_abilities import TorchEquivalent
from ryzen_compile.spec.passes import recorded_spec
from ryzen_compile.spec.profile import Profile
from ryzen_compile.utils.files import file_label
from ryzen_compile.utils.machine import processor_name

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.builder.resolve import AccuracyPolicy, ResolvedBuild
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.ir.save import StoredGraph
    from ryzen_compile.numerics.candidate import Candidate
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.pass_record import PassRecord
    from ryzen_compile.spec.passes import Pass


@dataclass(frozen=True, kw_only=True)
class TorchBaseline:
    """A PyTorch module to which the methods of some lossy passes are applied."""

    reference: str
    """FILE.py:FUNCTION or recipe:NAME."""
    passes: tuple[Pass, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GraphFile:
    """A graph in a file."""

    path: str
    """Relative to the package, or the path of a source file of the user."""
    digest: str
    """The sha256 of the file, or the fingerprint of a source graph."""


@dataclass(frozen=True, kw_only=True)
class AccuracyCheck:
    """A comparison of a graph with itself before some passes, or with a PyTorch module."""

    candidate: GraphFile
    baseline: GraphFile | TorchBaseline
    passes: tuple[str, ...] = ()
    """The specs of the passes that are checked; empty: all passes of the variant."""
    floor: AccuracyFloor | None = None
    """The floor to check; None: the numeric criteria apply."""
    loss_metric: str | None = None
    """The metric by which the cost of the lossy pass in `passes` is recorded; None: the check is not one of a lossy pass."""
    notes: tuple[str, ...] = ()
    """Remarks for the record."""


class Checkpoints:
    """Saves the graphs between which passes must be compared, while the pass manager runs the passes."""

    def __init__(self, passes: Sequence[Pass], folder: Path) -> None:
        """Save checkpoints of a graph to which `passes` are applied, in `folder`."""
        self.saved: dict[int, StoredGraph] = {}
        """The saved graphs by the number of finished passes; each is the file `checkpoint_name` in the folder."""
        self._passes = passes
        self._folder = folder
        self._finished = 0
        self._changed = False
        """Whether passes other than lossy ones changed the graph since the last checkpoint."""

    def on_pass_end(self, record: PassRecord, model: ir.Model) -> None:
        """Save `model` if the pass was lossy and changed it, or if the next one is lossy and others changed it."""
        is_lossy = isinstance(self._passes[self._finished].fidelity, Lossy)
        self._finished += 1
        next_is_lossy = any(isinstance(pass_.fidelity, Lossy) for pass_ in self._passes[self._finished : self._finished + 1])
        self._changed = self._changed or (record.outcome == "changed" and not is_lossy)
        if (record.outcome == "changed" and is_lossy) or (self._changed and next_is_lossy):
            self._save(model)

    def _save(self, model: ir.Model) -> None:
        from ryzen_compile.ir.save import save_to_store

        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / checkpoint_name(self._finished)
        self.saved[self._finished] = save_to_store(
            model, path, self._folder / "weights", threshold_bytes=layout.MIN_WEIGHT_FILE_BYTES
        )
        self._changed = False


def checkpoint_name(finished: int) -> str:
    """Return the file name of the checkpoint of a graph after `finished` passes."""
    return f"after-pass-{finished}.onnx"


def accuracy_checks(
    passes: Sequence[Pass],
    pass_log: Sequence[PassRecord],
    checkpoints: Mapping[int, GraphFile],
    *,
    source: GraphFile,
    variant: GraphFile,
    policy: AccuracyPolicy,
) -> tuple[AccuracyCheck, ...]:
    """Return the comparisons to make for `variant`, to which `passes` led with this log and these `checkpoints`."""
    checks: list[AccuracyCheck] = []
    lossy: list[Pass] = []
    pending: list[str] = []
    last = source
    for finished, (pass_, record) in enumerate(zip(passes, pass_log, strict=True), start=1):
        if record.outcome == "changed" and isinstance(pass_.fidelity, Lossy):
            last = checkpoints[finished]
            checks.append(_lossy_check(pass_, record.pass_spec, last, source, policy))
            lossy.append(pass_)
        elif record.outcome == "changed":
            pending.append(record.pass_spec)
        if pending and finished in checkpoints:
            checks.append(AccuracyCheck(candidate=checkpoints[finished], baseline=last, passes=tuple(pending)))
            pending, last = [], checkpoints[finished]
    if not lossy:
        checks = [AccuracyCheck(candidate=variant, baseline=source)]
    elif pending:
        checks.append(AccuracyCheck(candidate=variant, baseline=last, passes=tuple(pending)))
    floor = variant_floor(passes, pass_log, policy.budget)
    if floor is not None and (policy.budget is not None or pending):  # without these, a checkpoint is the finished variant
        checks.append(AccuracyCheck(candidate=variant, baseline=source, floor=floor))
    if policy.torch_baseline is not None and all(isinstance(pass_, TorchEquivalent) for pass_ in lossy):
        baseline = TorchBaseline(reference=policy.torch_baseline, passes=tuple(lossy))
        checks.append(AccuracyCheck(candidate=variant, baseline=baseline))
    return tuple(checks)


def _lossy_check(
    pass_: Pass, pass_spec: str, checkpoint: GraphFile, source: GraphFile, policy: AccuracyPolicy
) -> AccuracyCheck:
    floor, budget = _floor_of(pass_, policy.budget), policy.budget
    notes: tuple[str, ...] = ()
    if policy.torch_baseline is not None and not isinstance(pass_, TorchEquivalent):
        notes = (f"not compared with the same method in PyTorch: `{pass_.name}` has no PyTorch form",)
    return AccuracyCheck(
        candidate=checkpoint,
        baseline=source,
        passes=(pass_spec,),
        floor=floor,
        loss_metric=budget.metric if budget is not None else floor.metric,
        notes=notes,
    )


def variant_floor(
    passes: Sequence[Pass], pass_log: Sequence[PassRecord], budget: AccuracyBudget | None
) -> AccuracyFloor | None:
    """Return what the finished variant may cost: the budget, otherwise the floor of the last lossy pass that changed it.

    None if no lossy pass changed the graph, or if that pass has no floor that a comparison measures.
    """
    changes = [(pass_, record) for pass_, record in zip(passes, pass_log, strict=True) if record.outcome == "changed"]
    lossy = [(pass_, record.pass_spec) for pass_, record in changes if isinstance(pass_.fidelity, Lossy)]
    if not lossy:
        return None
    try:
        floor = _budget_floor(budget) if budget is not None else _floor_of(lossy[-1][0], None)
    except PipelineError:
        return None  # such a pipeline is built only if the build compares nothing
    return msgspec.structs.replace(floor, passes=tuple(pass_spec for _, pass_spec in lossy))


def check_floors(passes: Sequence[Pass], policy: AccuracyPolicy) -> None:
    """Raise PipelineError if a lossy pass has neither a floor nor a budget, or a metric that a comparison does not measure."""
    for pass_ in passes:
        if isinstance(pass_.fidelity, Lossy):
            _floor_of(pass_, policy.budget)


class ComparisonJob(Job[AccuracyRecord], frozen=True, kw_only=True):
    """Compare a graph with another one, or with a PyTorch module, over the grid of its profiles."""

    result_type: ClassVar[Any] = AccuracyRecord
    isolated: ClassVar[bool] = True
    preload: ClassVar[tuple[str, ...]] = COMPARISON_MODULES

    key: ComparisonKey
    candidate: str
    """The path of the graph, in the folder of the job."""
    baseline: str
    """The path of a graph, in the folder of the job or absolute; with `torch_passes`, FILE.py:FUNCTION or recipe:NAME."""
    torch_passes: tuple[str, ...] | None = None
    """The lossy passes whose methods are applied to the PyTorch module; None: the baseline is a graph."""
    interface: Interface
    profiles: tuple[Profile, ...]
    data: str | None
    """The user's samples, which must exist where the job runs; None: random ones."""
    seed: int

    @property
    def label(self) -> str:
        """The two sides."""
        return f"comparison of {self.candidate} with {self.key.baseline_name}"


def comparison_job(check: AccuracyCheck, source: SourceGraph, build: ResolvedBuild) -> ComparisonJob:
    """Return the job that makes the comparison `check` of a variant of `source`."""
    from ryzen_compile.numerics.criteria import floor_criteria

    floor, baseline, profiles = check.floor, check.baseline, build.profiles[source.name]
    inputs = {check.candidate.path: check.candidate.digest}
    if isinstance(baseline, TorchBaseline):
        path, digest, name = baseline.reference, build.torch_baseline_digest or "", file_label(baseline.reference)
    else:
        path, digest, name = baseline.path, baseline.digest, Path(baseline.path).name
        inputs[path] = digest
    torch_passes = baseline.passes if isinstance(baseline, TorchBaseline) else None
    key = comparison_key(
        candidate=check.candidate.digest,
        candidate_name=Path(check.candidate.path).name,
        baseline=digest,
        baseline_name=name,
        torch_passes=torch_passes,
        interface=source.summary.interface,
        profiles=profiles,
        samples=build.samples_digest,
        criteria=build.criteria if floor is None else floor_criteria(floor.metric, floor.value, floor.origin),
        machine=processor_name(),
    )
    return ComparisonJob(
        key=key,
        inputs=inputs,
        candidate=check.candidate.path,
        resources=Resources.within(build.config.limits),
        baseline=path,
        torch_passes=None if torch_passes is None else tuple(map(str, torch_passes)),
        interface=source.summary.interface,
        profiles=profiles,
        data=build.config.data,
        seed=build.config.seed,
    )


@runs(ComparisonJob)
def run_comparison_job(job: ComparisonJob, folder: Path, progress: Progress) -> JobOutput[AccuracyRecord]:
    """Compare the two sides. The record states whether the criteria are met.

    Raises BackendError if one of the two graphs cannot be run on this machine, and the errors of loading a PyTorch baseline.
    """
    from ryzen_compile.builder.graph_samples import graph_samples, kept_samples
    from ryzen_compile.numerics.comparison import compare
    from ryzen_compile.numerics.grid import CaseSource
    from ryzen_compile.numerics.onnx_candidates import onnx_candidate

    samples = None
    if job.data is not None:
        graph = folder / (job.baseline if job.torch_passes is None else job.candidate)
        samples = kept_samples(graph_samples(job.data, job.interface, job.profiles[0], graph, seed=job.seed))
    baseline = onnx_candidate(folder / job.baseline) if job.torch_passes is None else _torch_candidate(job)
    comparison = compare(
        onnx_candidate(folder / job.candidate),
        baseline,
        criteria=job.key.criteria,
        case_source=CaseSource(profiles=job.profiles, samples=samples, seed=job.seed),
        progress=progress,
    )
    return JobOutput(result=comparison.accuracy)


def with_check(record: AccuracyRecord, check: AccuracyCheck) -> AccuracyRecord:
    """Return `record`, the result of `check`, with the passes and the remarks of the check."""
    return msgspec.structs.replace(record, passes=check.passes, notes=(*record.notes, *check.notes))


def with_loss_shares(
    checks: Sequence[AccuracyCheck], records: Sequence[AccuracyRecord], budget: AccuracyBudget | None
) -> tuple[AccuracyRecord, ...]:
    """Return `records`, the results of `checks` in the same order, with what each lossy pass costs.

    The cost of a pass is the loss of the graph after it minus that after the lossy pass before it, both against the source.
    """
    result, totals = [], dict[str, float]()
    for check, record in zip(checks, records, strict=True):
        metric = check.loss_metric
        total = None if metric is None else _loss(record, metric)
        if metric is not None and total is not None:
            share = LossShare(
                metric=metric,
                loss=total - totals.get(metric, 0.0),
                total=total,
                budget=budget.loss if budget is not None else None,
            )
            totals[metric] = total
            record = msgspec.structs.replace(record, loss_share=share)
        result.append(record)
    return tuple(result)


def _loss(record: AccuracyRecord, metric: str) -> float | None:
    """Return the loss that a comparison measured, as that of the worst output; None if no output has the metric."""
    name = "relative_l2" if metric == "snr_db" else metric
    values = [result.worst for result in record.metrics if result.name == name]
    if not values:
        return None
    if metric == "snr_db":
        return max(values) ** 2
    return loss_of(metric, min(values))


def _torch_candidate(job: ComparisonJob) -> Candidate:
    from ryzen_compile.numerics.torch_candidates import torch_candidate

    passes = parse(",".join(job.torch_passes or ()))
    return torch_candidate(job.baseline, name=job.baseline, passes=passes)


def _budget_floor(budget: AccuracyBudget) -> AccuracyFloor:
    return AccuracyFloor(metric=budget.metric, value=budget.floor, origin="the pipeline")


def _floor_of(pass_: Pass, budget: AccuracyBudget | None) -> AccuracyFloor:
    """Return the floor of a lossy pass: its own, otherwise that of the pipeline's budget."""
    fidelity = pass_.fidelity
    assert isinstance(fidelity, Lossy)
    if fidelity.floor is None and budget is not None:
        return _budget_floor(budget)
    if fidelity.floor is None:
        raise PipelineError(
            f"`{pass_}` is lossy and declares no floor, so a build cannot check it",
            hint="give the pipeline an accuracy floor, such as --accuracy-floor cosine=0.99, or run the pass with "
            "`ryzen-compile rewrite` and `evaluate`",
        )
    if fidelity.metric not in COMPARISON_METRICS:
        raise PipelineError(
            f"`{pass_}` is lossy by the metric `{fidelity.metric}`, which a build does not measure",
            hint="run it with `ryzen-compile rewrite`, and measure the result with `ryzen-compile evaluate`",
        )
    return AccuracyFloor(metric=fidelity.metric, value=fidelity.floor, origin=f"`{recorded_spec(pass_)}`")
