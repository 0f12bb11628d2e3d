"""Accuracy of a build: which comparisons check a variant, and their results, before the package is published.

A variant whose passes are exact or within a tolerance is compared with its source under the numeric criteria. Where a lossy
pass changed the graph, the passes are checked in segments: the output of the lossy pass against the source, by the metric and
floor that the pass declares, and each run of other passes against its own input, by the numeric criteria. So a wrong rewrite
cannot hide behind a declared loss. The accuracy budget of the pipeline, if there is one, is a floor for the finished variant
and for every lossy pass that declares none. A variant is also compared with a PyTorch baseline, if one is given, to which the
same lossy methods are applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile.artifacts.package.manifest import AccuracyRecord, LossShare
from ryzen_compile.data.loading import load_samples
from ryzen_compile.errors import PipelineError
from ryzen_compile.spec.fidelity import COMPARISON_METRICS, AccuracyBudget, Lossy, loss_of
from ryzen_compile.spec.passes import TorchEquivalent

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.builder.config import ResolvedBuild
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.numerics.candidate import Candidate
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.pass_record import PassRecord
    from ryzen_compile.spec.passes import Pass


@dataclass(frozen=True, kw_only=True)
class AccuracyPolicy:
    """What the variants of a build are compared with beside their source, and what their lossy passes may cost together."""

    budget: AccuracyBudget | None = None
    torch_baseline: str | None = None
    """A PyTorch module, FILE.py:FUNCTION or recipe:NAME; None: variants are compared with their source only."""


@dataclass(frozen=True, kw_only=True)
class TorchBaseline:
    """A PyTorch module to which the methods of some lossy passes are applied."""

    reference: str
    """FILE.py:FUNCTION or recipe:NAME."""
    passes: tuple[Pass, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The smallest accepted value of a comparison metric, and whose floor it is."""

    metric: str
    value: float
    origin: str


@dataclass(frozen=True, kw_only=True)
class AccuracyCheck:
    """A comparison of a graph with a state of it before some passes, or with a PyTorch module."""

    candidate: Path
    baseline: Path | TorchBaseline
    passes: tuple[str, ...] = ()
    """The specs of the passes that are checked; empty: all passes of the variant."""
    floor: Floor | None = None
    """The floor to check; None: the numeric criteria apply."""
    loss_metric: str | None = None
    """The metric by which the cost of the lossy pass in `passes` is recorded; None: the check is not one of a lossy pass."""
    notes: tuple[str, ...] = ()
    """Remarks for the record."""


class Checkpoints:
    """Saves the states of a graph between which passes must be compared, while the pass manager runs the passes."""

    def __init__(self, passes: Sequence[Pass], source: Path, folder: Path, policy: AccuracyPolicy) -> None:
        """Record checkpoints of `passes`, applied to the graph in the file `source`, in `folder`.

        Raises PipelineError if a lossy pass has neither a floor nor a budget, or a metric that a comparison does not measure.
        """
        self._passes = passes
        self._source = source
        self._folder = folder
        self._policy = policy
        self._floors = {id(pass_): _floor_of(pass_, policy.budget) for pass_ in passes if isinstance(pass_.fidelity, Lossy)}
        self._finished = 0
        self._pending: list[str] = []
        """Specs of the passes other than lossy ones that changed the graph since the last checkpoint."""
        self._last = source
        self._checks: list[AccuracyCheck] = []
        self._lossy: list[Pass] = []
        """The lossy passes that changed the graph."""

    def on_pass_end(self, record: PassRecord, model: ir.Model) -> None:
        """Save `model` if the pass was lossy, or if the next one is."""
        pass_ = self._passes[self._finished]
        self._finished += 1
        next_pass = self._passes[self._finished] if self._finished < len(self._passes) else None
        if record.outcome == "changed":
            if isinstance(pass_.fidelity, Lossy):
                self._add_lossy(pass_, record.pass_spec, self._save(model))
            else:
                self._pending.append(record.pass_spec)
        if self._pending and next_pass is not None and isinstance(next_pass.fidelity, Lossy):
            self._close_segment(self._save(model))

    def checks(self, variant: Path) -> tuple[AccuracyCheck, ...]:
        """Return the comparisons to make for the finished graph in the file `variant`."""
        budget, torch_baseline = self._policy.budget, self._policy.torch_baseline
        if not self._lossy:
            self._checks.append(AccuracyCheck(candidate=variant, baseline=self._source))
        elif self._pending:
            self._close_segment(variant)
        if self._lossy and budget is not None:
            self._checks.append(AccuracyCheck(candidate=variant, baseline=self._source, floor=_budget_floor(budget)))
        if torch_baseline is not None and all(isinstance(pass_, TorchEquivalent) for pass_ in self._lossy):
            baseline = TorchBaseline(reference=torch_baseline, passes=tuple(self._lossy))
            self._checks.append(AccuracyCheck(candidate=variant, baseline=baseline))
        return tuple(self._checks)

    def _add_lossy(self, pass_: Pass, pass_spec: str, saved: Path) -> None:
        floor, budget = self._floors[id(pass_)], self._policy.budget
        notes: tuple[str, ...] = ()
        if self._policy.torch_baseline is not None and not isinstance(pass_, TorchEquivalent):
            notes = (f"not compared with the same method in PyTorch: `{pass_.name}` has no PyTorch form",)
        self._checks.append(
            AccuracyCheck(
                candidate=saved,
                baseline=self._source,
                passes=(pass_spec,),
                floor=floor,
                loss_metric=budget.metric if budget is not None else floor.metric,
                notes=notes,
            )
        )
        self._lossy.append(pass_)
        self._last = saved

    def _close_segment(self, saved: Path) -> None:
        self._checks.append(AccuracyCheck(candidate=saved, baseline=self._last, passes=tuple(self._pending)))
        self._pending.clear()
        self._last = saved

    def _save(self, model: ir.Model) -> Path:
        from ryzen_compile.ir.save import save

        path = self._folder / f"after-pass-{self._finished}.onnx"
        self._folder.mkdir(parents=True, exist_ok=True)
        save(model, path)
        return path


def measure_accuracy(check: AccuracyCheck, source: SourceGraph, build: ResolvedBuild, progress: Progress) -> AccuracyRecord:
    """Compare the two sides of `check` over the grid of the source's profiles and return the record.

    The record states whether the criteria, or the floor, are met. Raises BackendError if one of the two graphs cannot be run on
    this machine, and the errors of loading a PyTorch baseline.
    """
    from ryzen_compile.numerics.comparison import compare
    from ryzen_compile.numerics.criteria import floor_criteria
    from ryzen_compile.numerics.onnx_candidates import onnx_candidate

    config, floor = build.config, check.floor
    samples = None
    if config.data is not None:
        samples = list(load_samples(config.data, source.summary.interface, seed=config.seed))
    accuracy = compare(
        onnx_candidate(check.candidate),
        _torch_candidate(check.baseline) if isinstance(check.baseline, TorchBaseline) else onnx_candidate(check.baseline),
        criteria=build.criteria if floor is None else floor_criteria(floor.metric, floor.value, floor.origin),
        profiles=build.profiles[source.name],
        samples=samples,
        seed=config.seed,
        progress=progress,
    ).accuracy
    return msgspec.structs.replace(accuracy, passes=check.passes, notes=(*accuracy.notes, *check.notes))


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


def _torch_candidate(baseline: TorchBaseline) -> Candidate:
    from ryzen_compile.numerics.torch_candidates import torch_candidate

    reference = baseline.reference
    return torch_candidate(reference.removeprefix("recipe:"), name=reference, passes=baseline.passes)


def _budget_floor(budget: AccuracyBudget) -> Floor:
    return Floor(metric=budget.metric, value=budget.floor, origin="the pipeline")


def _floor_of(pass_: Pass, budget: AccuracyBudget | None) -> Floor:
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
    return Floor(metric=fidelity.metric, value=fidelity.floor, origin=f"`{pass_}`")
