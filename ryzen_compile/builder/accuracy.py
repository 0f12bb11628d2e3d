"""Accuracy of a build: compare each variant with its source graph before the package is published.

A variant whose passes are exact or within a tolerance is compared with its source under the numeric criteria. Where a lossy
pass changed the graph, the passes are checked in segments: the output of the lossy pass against the source, by the metric and
floor that the pass declares, and each run of other passes against its own input, by the numeric criteria. So a wrong rewrite
cannot hide behind a declared loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile.data.loading import load_samples
from ryzen_compile.errors import PipelineError
from ryzen_compile.spec.fidelity import COMPARISON_METRICS, Lossy

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.artifacts.package.manifest import AccuracyRecord
    from ryzen_compile.builder.config import ResolvedBuild
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.pass_record import PassRecord
    from ryzen_compile.spec.passes import Pass


@dataclass(frozen=True, kw_only=True)
class AccuracyCheck:
    """A comparison of two states of a graph, before and after some passes."""

    candidate: Path
    baseline: Path
    passes: tuple[str, ...] = ()
    """The specs of the passes between the two; empty: all passes of the variant."""
    floor: Lossy | None = None
    """The metric and floor of the lossy pass that is checked; None: the numeric criteria apply."""


class Checkpoints:
    """Saves the states of a graph between which passes must be compared, while the pass manager runs the passes."""

    def __init__(self, passes: Sequence[Pass], source: Path, folder: Path) -> None:
        """Record checkpoints of `passes`, applied to the graph in the file `source`, in `folder`.

        Raises PipelineError if a lossy pass declares no floor, or a metric that a comparison does not measure.
        """
        self._passes = passes
        self._source = source
        self._folder = folder
        self._finished = 0
        self._pending: list[str] = []
        """Specs of the passes other than lossy ones that changed the graph since the last checkpoint."""
        self._last = source
        self._checks: list[AccuracyCheck] = []
        for pass_ in passes:
            if isinstance(pass_.fidelity, Lossy):
                _check_floor(pass_, pass_.fidelity)

    def on_pass_end(self, record: PassRecord, model: ir.Model) -> None:
        """Save `model` if the pass was lossy, or if the next one is."""
        pass_ = self._passes[self._finished]
        self._finished += 1
        next_pass = self._passes[self._finished] if self._finished < len(self._passes) else None
        if record.outcome == "changed":
            if isinstance(pass_.fidelity, Lossy):
                saved = self._save(model)
                self._checks.append(
                    AccuracyCheck(candidate=saved, baseline=self._source, passes=(record.pass_spec,), floor=pass_.fidelity)
                )
                self._last = saved
            else:
                self._pending.append(record.pass_spec)
        if self._pending and next_pass is not None and isinstance(next_pass.fidelity, Lossy):
            self._close_segment(self._save(model))

    def checks(self, variant: Path) -> tuple[AccuracyCheck, ...]:
        """Return the comparisons to make for the finished graph in the file `variant`."""
        if not any(check.floor for check in self._checks):
            return (AccuracyCheck(candidate=variant, baseline=self._source),)
        if self._pending:
            self._close_segment(variant)
        return tuple(self._checks)

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
    """Compare the two graphs of `check` over the grid of the source's profiles and return the record.

    The record states whether the criteria, or the floor of a lossy pass, are met. Raises BackendError if one of the two graphs
    cannot be run on this machine.
    """
    from ryzen_compile.numerics.comparison import compare
    from ryzen_compile.numerics.criteria import floor_criteria
    from ryzen_compile.numerics.onnx_candidates import onnx_candidate

    config = build.config
    samples = None
    if config.data is not None:
        samples = list(load_samples(config.data, source.summary.interface, seed=config.seed))
    accuracy = compare(
        onnx_candidate(check.candidate),
        onnx_candidate(check.baseline),
        criteria=build.criteria if check.floor is None else floor_criteria(check.floor, f"`{check.passes[0]}`"),
        profiles=build.profiles[source.name],
        samples=samples,
        seed=config.seed,
        progress=progress,
    ).accuracy
    return msgspec.structs.replace(accuracy, passes=check.passes)


def _check_floor(pass_: Pass, fidelity: Lossy) -> None:
    if fidelity.floor is None:
        raise PipelineError(
            f"`{pass_}` is lossy and declares no floor, so a build cannot check it",
            hint=f"set a floor for its metric `{fidelity.metric}`, or run it with `ryzen-compile rewrite` and `evaluate`",
        )
    if fidelity.metric not in COMPARISON_METRICS:
        raise PipelineError(
            f"`{pass_}` is lossy by the metric `{fidelity.metric}`, which a build does not measure",
            hint="run it with `ryzen-compile rewrite`, and measure the result with `ryzen-compile evaluate`",
        )
