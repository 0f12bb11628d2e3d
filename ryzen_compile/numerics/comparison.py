"""Comparison of a candidate with a baseline over a grid of cases, checked against explicit criteria."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile.artifacts.package.diagnostics import accuracy_diagnostics, branch_not_run
from ryzen_compile.artifacts.package.manifest import AccuracyRecord
from ryzen_compile.artifacts.package.metric_text import format_worst
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.numerics.accumulator import Accumulator
from ryzen_compile.numerics.branches import find_branches_not_run
from ryzen_compile.numerics.candidate import Candidate, match_interfaces
from ryzen_compile.numerics.criteria import Criteria, Tolerances, coarser
from ryzen_compile.numerics.grid import Cases, CaseSource, GridCase, select_row
from ryzen_compile.numerics.output_files import OutputFiles
from ryzen_compile.numerics.padding import PaddingMasks
from ryzen_compile.numerics.stacked_metrics import OutputPair, measure_all
from ryzen_compile.numerics.unspecified_rows import unspecified_note
from ryzen_compile.processes.operation import performing
from ryzen_compile.progress import Progress, SilentProgress, StageItems, counted
from ryzen_compile.spec.dtypes import UNIT_ROUNDOFF, Precision
from ryzen_compile.utils.record import Record, utc_now

if TYPE_CHECKING:
    from ryzen_compile.numerics.metrics import Array, Measurement
    from ryzen_compile.spec.interface import Inputs, Interface, Outputs


MAX_SINGLE_ROWS = 16
"""The largest number of rows of a batch that are compared alone."""

_BATCH_DEPENDENT_NOTE = "the baseline itself computes a row differently in a batch and alone: rows were not compared alone"
_NO_ROWS_NOTE = "rows of a batch were not compared with each other: no output has the batch dimension of the inputs"
_STATIC_BATCH_NOTE = "rows were not compared with the same row alone: the baseline does not take a batch of 1"


class Comparison(Record, frozen=True):
    """The result of comparing a candidate with a baseline."""

    candidate: str
    """The reference that the user gave."""
    baseline: str
    accuracy: AccuracyRecord
    """The result as a package records it."""
    precision: Precision
    """The coarser precision of the two, whose limits apply."""
    tolerances: Tolerances
    """The limits of every output that has none of its own."""
    cases: tuple[str, ...]
    not_executed: tuple[str, ...]
    """Engines built from the candidate that were not executed here, each with the reason."""
    seconds: float

    @property
    def met(self) -> bool:
        """Whether every limit is met and there is no fault."""
        return self.accuracy.met


def comparison_diagnostics(comparisons: Iterable[Comparison]) -> tuple[Diagnostic, ...]:
    """Return the unmet criteria and the faults of comparisons, as errors, and the branches that no case ran, as warnings."""
    return tuple(
        diagnostic
        for comparison in comparisons
        for diagnostic in (
            *accuracy_diagnostics(comparison.accuracy, comparison.candidate, severity="error"),
            *(branch_not_run(branch, comparison.candidate) for branch in comparison.accuracy.not_run),
        )
    )


def summarize(comparisons: Sequence[Comparison]) -> str:
    """Return whether the criteria are met, and what was compared with what, on one line."""
    if not comparisons:
        return "nothing was compared"
    verdict = "MET" if all(comparison.met for comparison in comparisons) else "NOT MET"
    baselines = ", ".join(dict.fromkeys(comparison.baseline for comparison in comparisons))
    return f"{verdict}: {', '.join(comparison.candidate for comparison in comparisons)} against {baselines}"


def describe(comparison: Comparison) -> str:
    """Return a comparison on one line: the candidate, its cases, and the worst value of each metric over all outputs."""
    text = f"{comparison.candidate}: {comparison.accuracy.cases} cases in {comparison.seconds:.1f} s"
    return ": ".join(filter(None, (text, format_worst(comparison.accuracy.metrics))))


def compare(
    candidate: Candidate,
    baseline: Candidate,
    *,
    criteria: Criteria,
    case_source: CaseSource | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run both on the same cases and compare every output of `candidate` with the baseline's output of the same name.

    `case_source` determines the cases; by default they are the grid of the candidate's profiles. In addition, the rows
    of a batch of identical rows are compared with row 0, and up to `MAX_SINGLE_ROWS` rows of a batch of mixed rows with the
    baseline run on that row alone. Outputs whose rows the baseline itself mixes are excluded from these two.

    The result names the branches and loop bodies that no case runs: those of the baseline, or of the candidate if the
    baseline is a module.

    Raises ShapeError if the inputs of the two differ.
    """
    progress = progress or SilentProgress()
    candidate, baseline, interface = match_interfaces(candidate, baseline)
    cases = (case_source or CaseSource()).bind(candidate, baseline, interface)
    seed = case_source.seed if case_source is not None else 0
    comparison = compare_cases(cases, candidate, baseline, interface, criteria=criteria, seed=seed, progress=progress)
    model_file = baseline.model_file or candidate.model_file
    not_run, note = find_branches_not_run(model_file, cases)
    notes = (*comparison.accuracy.notes, *((note,) if note else ()), *unspecified_note(model_file))
    accuracy = msgspec.structs.replace(comparison.accuracy, not_run=not_run, notes=notes)
    return msgspec.structs.replace(comparison, accuracy=accuracy)


@dataclass(frozen=True, kw_only=True)
class _BaselineRun:
    """What the baseline computed for one case."""

    outputs: Outputs
    rows: Mapping[int, Outputs] | None
    """The outputs of rows that were run alone, by row; None: the case has one row, or the baseline does not take one alone."""


def compare_cases(
    cases: Cases,
    candidate: Candidate,
    baseline: Candidate,
    interface: Interface,
    *,
    criteria: Criteria,
    seed: int = 0,
    progress: Progress,
) -> Comparison:
    """Run cases, which fit `interface`, on a candidate and a baseline with common input names; see `compare`.

    `seed` selects the rows that are run alone. The baseline runs first,
    and its large outputs are kept in files, so that one model and one large output are in memory at a time.
    """
    from ryzen_compile.numerics.polygraphy_runner import CandidateRunner, run_cases

    started = time.perf_counter()
    precision = coarser(candidate.precision, baseline.precision)
    accumulator, descriptions, notes = Accumulator(criteria, precision), [], dict[str, None]()
    padding, declared = PaddingMasks(interface), _DeclaredOutputs(interface)
    with OutputFiles() as files:
        baseline_cases = _with_progress("run the baseline", "running the baseline on", cases, progress)
        runs = list(_run_baseline(baseline_cases, baseline, declared, padding, files, seed))
        runner = CandidateRunner(candidate)
        with closing(run_cases([runner], _with_progress("compare", "comparing", cases, progress))) as results:
            for (case, (outputs,)), run in zip(results, runs, strict=True):
                accumulator.cases += 1
                descriptions.append(case.description)
                _compare_with_baseline(accumulator, padding, declared, case, outputs, run.outputs)
                is_complete = True
                if case.row_mode == "identical":
                    is_complete = _compare_with_first_row(accumulator, padding, declared, case, outputs, run.outputs)
                elif run.rows is not None:
                    is_complete = _compare_with_single_rows(accumulator, padding, declared, case, outputs, run)
                    if not run.rows:
                        notes[_NO_ROWS_NOTE] = None
                    elif len(run.rows) < case.batch_size:
                        notes[f"{len(run.rows)} of {case.batch_size} rows of a batch were compared with the same row alone"] = (
                            None
                        )
                elif case.row_mode == "mixed" and case.batch_size > 1:
                    notes[_STATIC_BATCH_NOTE] = None
                if not is_complete:
                    notes[_BATCH_DEPENDENT_NOTE] = None
    metrics, faults = (*accumulator.metrics(), *accumulator.left_out()), accumulator.faults()
    return Comparison(
        candidate=candidate.name,
        baseline=baseline.name,
        precision=precision,
        tolerances=criteria.tolerances[precision],
        cases=tuple(descriptions),
        not_executed=candidate.not_executed,
        seconds=round(time.perf_counter() - started, 3),
        accuracy=AccuracyRecord(
            candidate=candidate.description,
            baseline=baseline.description,
            machine=candidate.machine,
            cases=len(descriptions),
            criteria=criteria.name,
            metrics=metrics,
            met=not faults and all(metric.met for metric in metrics),
            timestamp=utc_now(),
            faults=faults,
            notes=(*accumulator.notes(), *notes, *padding.notes),
        ),
    )


def _with_progress(title: str, operation: str, cases: Cases, progress: Progress) -> Iterator[GridCase]:
    """Yield the cases, and count each when the next one is requested."""
    with progress.stage(title, StageItems("cases", len(cases), cases.sizes)) as stage:
        for case in counted(cases, stage):
            with performing(f"{operation} {case.description}"):
                yield case


def _run_baseline(
    cases: Iterable[GridCase],
    baseline: Candidate,
    declared: _DeclaredOutputs,
    padding: PaddingMasks,
    files: OutputFiles,
    seed: int,
) -> Iterator[_BaselineRun]:
    """Run the baseline on each case, and on rows of it alone; large outputs are kept in `files`."""
    from ryzen_compile.numerics.polygraphy_runner import CandidateRunner, run_cases

    runner = CandidateRunner(baseline)
    with closing(run_cases([runner], cases)) as results:
        for case, (outputs,) in results:
            first_row = select_row(declared.interface, case.inputs, 0)
            takes_rows = _accepts(baseline, first_row)
            if padding.is_pending(case.inputs):
                padding.check(first_row if takes_rows else case.inputs, runner.run)
            rows = None
            if case.row_mode == "mixed" and case.batch_size > 1 and takes_rows:
                indices = _rows_to_run_alone(case.batch_size, seed) if declared.batch_axes(outputs, case) else ()
                rows = {row: files.keep(runner.run(select_row(declared.interface, case.inputs, row))) for row in indices}
            yield _BaselineRun(outputs=files.keep(outputs), rows=rows)


def _rows_to_run_alone(batch_size: int, seed: int) -> Sequence[int]:
    """Return at most `MAX_SINGLE_ROWS` rows of a batch: the first, the last, and others that `seed` selects."""
    import numpy as np

    if batch_size <= MAX_SINGLE_ROWS:
        return range(batch_size)
    others = np.random.default_rng(seed).choice(np.arange(1, batch_size - 1), MAX_SINGLE_ROWS - 2, replace=False)
    return sorted([0, batch_size - 1, *map(int, others)])


def _compare_with_baseline(
    accumulator: Accumulator,
    padding: PaddingMasks,
    declared: _DeclaredOutputs,
    case: GridCase,
    outputs: Outputs,
    baseline_outputs: Outputs,
) -> None:
    names = [name for name in outputs if name in baseline_outputs]
    pairs = [
        OutputPair(
            outputs[name],
            baseline_outputs[name],
            mask=padding.valid_elements(name, outputs[name], case.inputs),
            vector_axes=declared.vector_axes(name),
            compare_top1=name == declared.top1_output,
            unit_roundoff=UNIT_ROUNDOFF[accumulator.precision],
        )
        for name in names
    ]
    measurements = dict(zip(names, measure_all(pairs), strict=True))
    for name in [*outputs, *(name for name in baseline_outputs if name not in outputs)]:
        if name not in baseline_outputs:
            accumulator.add_fault(name, "is not an output of the baseline", case.description)
        elif name not in outputs:
            accumulator.add_fault(name, "is an output of the baseline and missing in the candidate", case.description)
        else:
            accumulator.add(name, measurements[name], case.description)


def _compare_with_first_row(
    accumulator: Accumulator,
    padding: PaddingMasks,
    declared: _DeclaredOutputs,
    case: GridCase,
    outputs: Outputs,
    baseline_outputs: Outputs,
) -> bool:
    """Compare the rows that differ most from row 0 with row 0 of the same output.

    An output is excluded if the rows that fail also fail in the baseline. Returns whether no output was excluded.
    """
    axes = declared.batch_axes(outputs, case)
    rows = [(name, row) for name, axis in axes.items() for row in _most_different_rows(outputs[name], axis)]

    def measure_rows(arrays: Outputs, rows: Sequence[_Row]) -> list[Measurement]:
        first_rows = {name: _slice_row(arrays[name], axes[name], 0) for name, _ in rows}
        masks = {
            name: padding.valid_elements(name, outputs[name], case.inputs) if axes[name] == 0 else None for name, _ in rows
        }
        return measure_all(
            [
                OutputPair(
                    _slice_row(arrays[name], axes[name], row),
                    first_rows[name],
                    mask=None if (mask := masks[name]) is None else mask[:1],
                    vector_axes=declared.vector_axes(name),
                    baseline_label="the identical row 0",
                )
                for name, row in rows
            ]
        )

    measurements, excluded = _measure_rows(accumulator, rows, measure_rows, outputs, baseline_outputs)
    for (name, row), measurement in measurements.items():
        accumulator.add_batch_invariance(name, measurement, f"{case.description}, row {row}")
    return not excluded


_Row = tuple[str, int]
"""The name of an output, and the index of a row of it."""


def _measure_rows(
    accumulator: Accumulator,
    rows: Sequence[_Row],
    measure_rows: Callable[[Outputs, Sequence[_Row]], Sequence[Measurement]],
    outputs: Outputs,
    baseline_outputs: Outputs,
) -> tuple[dict[_Row, Measurement], frozenset[str]]:
    """Return the measurements of `rows`, without outputs that are excluded, and the names of those.

    An output is excluded if a row of it that exceeds a limit exceeds it in the baseline's own batch too.
    """

    def failing(arrays: Outputs, rows: Sequence[_Row]) -> tuple[dict[_Row, Measurement], list[_Row]]:
        measurements = dict(zip(rows, measure_rows(arrays, rows), strict=True))
        return measurements, [row for row in rows if not accumulator.is_within_tolerance(row[0], measurements[row])]

    measurements, failed = failing(outputs, rows)
    comparable = [row for row in failed if _have_same_shape(row[0], outputs, baseline_outputs)]
    excluded = frozenset(name for name, _ in failing(baseline_outputs, comparable)[1])
    return {row: measurement for row, measurement in measurements.items() if row[0] not in excluded}, excluded


def _most_different_rows(output: Array, axis: int) -> Sequence[int]:
    """Return at most `MAX_SINGLE_ROWS` rows of an output of identical rows: those that differ most from row 0, or row 1."""
    import numpy as np

    rows = np.moveaxis(output, axis, 0)
    if len(rows) <= MAX_SINGLE_ROWS:
        return range(1, len(rows))
    is_number = rows.dtype.kind not in "OUSb"
    distances = np.zeros(len(rows))
    for row in range(1, len(rows)):
        if np.array_equal(rows[row], rows[0]):
            continue
        distances[row] = math.inf
        if is_number:
            with np.errstate(invalid="ignore", over="ignore"):
                largest = float(np.abs(rows[row].astype(np.float64) - rows[0].astype(np.float64)).max())
            distances[row] = largest if math.isfinite(largest) else math.inf
    most = sorted(range(1, len(rows)), key=lambda row: -distances[row])[:MAX_SINGLE_ROWS]
    return [row for row in most if distances[row]] or [1]


def _compare_with_single_rows(
    accumulator: Accumulator,
    padding: PaddingMasks,
    declared: _DeclaredOutputs,
    case: GridCase,
    outputs: Outputs,
    run: _BaselineRun,
) -> bool:
    """Compare rows with the baseline run on each of them alone.

    An output is excluded if a row that fails also fails in the baseline's own batch. Returns whether no output was excluded.
    """
    axes, alone = declared.batch_axes(outputs, case), run.rows or {}
    rows = [(name, row) for name in axes for row, single_outputs in alone.items() if name in single_outputs]
    inputs = {row: select_row(declared.interface, case.inputs, row) for row in alone}

    def measure_rows(arrays: Outputs, rows: Sequence[_Row]) -> list[Measurement]:
        pairs = []
        for name, row in rows:
            array = _slice_row(arrays[name], axes[name], row)
            mask = padding.valid_elements(name, array, inputs[row]) if axes[name] == 0 else None
            pairs.append(OutputPair(array, alone[row][name], mask=mask, vector_axes=declared.vector_axes(name)))
        return measure_all(pairs)

    measurements, excluded = _measure_rows(accumulator, rows, measure_rows, outputs, run.outputs)
    for (name, row), measurement in measurements.items():
        accumulator.add(name, measurement, f"{case.description}, row {row} alone in the baseline")
    return not excluded


def _have_same_shape(name: str, outputs: Outputs, baseline_outputs: Outputs) -> bool:
    return name in baseline_outputs and baseline_outputs[name].shape == outputs[name].shape


class _DeclaredOutputs:
    """What an interface states about the outputs of a comparison."""

    def __init__(self, interface: Interface) -> None:
        self.interface = interface
        self._states = {state.output for state in interface.states}
        self._specs = {spec.name: spec for spec in interface.outputs}
        self._input_dims = {dim for spec in interface.inputs for dim in spec.dims or ()}

    @property
    def top1_output(self) -> str | None:
        """The output whose argmax is compared: the first non-state output of a classifier or language model, else None."""
        if self.interface.task not in ("classifier", "language-model"):
            return None
        return next((name for name in self._specs if name not in self._states), None)

    def vector_axes(self, name: str) -> int | None:
        """Return 1 for a state, whose vectors lie along the last axis ((B, H, S, D): one per token and head); else None."""
        return 1 if name in self._states else None

    def batch_axes(self, outputs: Outputs, case: GridCase) -> dict[str, int]:
        """Return the batch axis of each output that has one: that of its declaration, or the first if its size is undeclared.

        Exporters declare outputs with names of their own for sizes that they do not derive.
        """
        axes = {name: self._batch_axis(name) for name in outputs}
        return {
            name: axis
            for name, axis in axes.items()
            if axis is not None and axis < outputs[name].ndim and outputs[name].shape[axis] == case.batch_size
        }

    def _batch_axis(self, name: str) -> int | None:
        spec = self._specs.get(name)
        if spec is None or (axis := self.interface.batch_axis(spec)) is not None:
            return None if spec is None else axis
        if self.interface.batch is None or not spec.dims:
            return None
        return 0 if isinstance(spec.dims[0], str) and spec.dims[0] not in self._input_dims else None


def _slice_row(output: Array, axis: int, index: int) -> Array:
    return output[(slice(None),) * axis + (slice(index, index + 1),)]


def _accepts(candidate: Candidate, inputs: Inputs) -> bool:
    """Return whether the interface and the profiles of `candidate` allow the shapes of `inputs`."""
    shapes = {name: tuple(array.shape) for name, array in inputs.items()}
    for spec in candidate.interface.inputs if candidate.interface else ():
        sizes = spec.dims or shapes[spec.name]
        if any(isinstance(dim, int) and dim != size for dim, size in zip(sizes, shapes[spec.name], strict=True)):
            return False
    return not candidate.profiles or any(profile.mismatch(shapes) is None for profile in candidate.profiles)
