"""Compare: a subject with its baseline, over a grid of cases, held to explicit criteria."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from ryzen_compile.artifacts.package.manifest import AccuracyRecord
from ryzen_compile.numerics.accumulator import Accumulator
from ryzen_compile.numerics.candidate import Candidate, match_interfaces
from ryzen_compile.numerics.criteria import Criteria, Precision, Tolerances, coarser
from ryzen_compile.numerics.grid import GridCase, cases_from_inputs, grid_cases, select_row
from ryzen_compile.numerics.metrics import measure
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.spec import profile as profiles_
from ryzen_compile.utils.record import Record, utc_now

if TYPE_CHECKING:
    from ryzen_compile.numerics.metrics import Array, Measurement
    from ryzen_compile.numerics.polygraphy_runner import CandidateRunner
    from ryzen_compile.spec.interface import Interface, TensorSpec
    from ryzen_compile.spec.passes import Inputs
    from ryzen_compile.spec.profile import Profile


_BATCH_DEPENDENT_NOTE = "the baseline itself computes a row otherwise in a batch than alone: rows were not compared alone"


class Comparison(Record, frozen=True):
    """A subject compared with its baseline."""

    candidate: str
    """How the user spells it."""
    baseline: str
    accuracy: AccuracyRecord
    """The result, as a package records it."""
    precision: Precision
    """The coarser precision of the two: its limits are the ones that count."""
    tolerances: Tolerances
    """What every output without an exception of its own was held to."""
    cases: tuple[str, ...]
    not_executed: tuple[str, ...]
    """What belongs to the subject and was not executed here, each with the reason."""
    seconds: float

    @property
    def met(self) -> bool:
        """Whether every limit was met and nothing failed."""
        return self.accuracy.met


def compare(
    candidate: Candidate,
    baseline: Candidate,
    *,
    criteria: Criteria,
    profiles: Sequence[Profile] = (),
    samples: Sequence[Inputs] | None = None,
    inputs: Iterable[Inputs] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Run both on the same cases and measure every output of `subject` against the one of the same name of `baseline`.

    The cases are `inputs` as they are where given, else the grid of `profiles` (default: those of the subject, or derived ones)
    filled from `samples` (default: what the baseline, else the subject brings) or, without any, from `seed`. Beside the
    plain comparison, the rows of a batch of equal rows are measured against its first row, and each row of a mixed batch
    against the baseline run on that row alone; outputs whose rows the baseline itself mixes only take the plain comparison.

    Raises ShapeError where the two do not have the same inputs.
    """
    candidate, baseline, interface = match_interfaces(candidate, baseline)
    if inputs is not None:
        cases = cases_from_inputs(interface, inputs)
    else:
        if samples is None:
            own = baseline.samples or candidate.samples
            samples = own(seed) if own else ()
        shapes = tuple(profiles) or candidate.profiles or (profiles_.derive_profile(interface),)
        cases = grid_cases(interface, shapes, seed=seed, samples=samples)
    return compare_cases(cases, candidate, baseline, interface, criteria=criteria, progress=progress or SilentProgress())


def compare_cases(
    cases: Iterable[GridCase],
    candidate: Candidate,
    baseline: Candidate,
    interface: Interface,
    *,
    criteria: Criteria,
    progress: Progress,
) -> Comparison:
    """Run `cases`, which fit `interface`, on two subjects with names in common: see `compare`."""
    from ryzen_compile.numerics.polygraphy_runner import CandidateRunner, run_cases

    started = time.perf_counter()
    precision = coarser(candidate.precision, baseline.precision)
    tally, names, notes = Accumulator(criteria, precision), [], dict[str, None]()
    runners = [CandidateRunner(candidate), CandidateRunner(baseline)]
    with closing(run_cases(runners, _with_progress(cases, progress))) as stream:
        for case, (mine, theirs) in stream:
            tally.cases += 1
            names.append(case.description)
            _compare_with_baseline(tally, interface, case, mine, theirs)
            if case.row_mode == "identical":
                if not _compare_with_first_row(tally, interface, case, mine, theirs):
                    notes[_BATCH_DEPENDENT_NOTE] = None
            elif case.row_mode == "mixed" and case.batch_size > 1:
                if _accepts(baseline, select_row(interface, case.inputs, 0)):
                    if not _compare_with_single_rows(tally, interface, case, mine, theirs, runners[1]):
                        notes[_BATCH_DEPENDENT_NOTE] = None
                else:
                    notes[f"rows were not compared with the same row alone: {baseline.name} does not take a batch of 1"] = None
    metrics, faults = tally.metrics(), tally.faults()
    return Comparison(
        candidate=candidate.name,
        baseline=baseline.name,
        precision=precision,
        tolerances=criteria.tolerances[precision],
        cases=tuple(names),
        not_executed=candidate.not_executed,
        seconds=round(time.perf_counter() - started, 3),
        accuracy=AccuracyRecord(
            candidate=candidate.description,
            baseline=baseline.description,
            machine=candidate.machine,
            cases=len(names),
            criteria=criteria.name,
            metrics=metrics,
            met=not faults and all(metric.met for metric in metrics),
            timestamp=utc_now(),
            faults=faults,
            notes=(*tally.notes(), *notes),
        ),
    )


def _with_progress(cases: Iterable[GridCase], progress: Progress) -> Iterator[GridCase]:
    for case in cases:
        with progress.stage(f"compare {case.description}"):
            yield case


def _compare_with_baseline(
    accumulator: Accumulator, interface: Interface, case: GridCase, outputs: Inputs, baseline_outputs: Inputs
) -> None:
    chooser = _top1_output(interface)
    for name in [*outputs, *(name for name in baseline_outputs if name not in outputs)]:
        if name not in baseline_outputs:
            accumulator.add_fault(name, "is no output of the baseline", case.description)
        elif name not in outputs:
            accumulator.add_fault(name, "is an output of the baseline, and the subject lacks it", case.description)
        else:
            accumulator.add(
                name,
                measure(
                    outputs[name],
                    baseline_outputs[name],
                    mask=_token_mask(interface, name, outputs[name], case.inputs),
                    vector_axes=_vector_axes(interface, name),
                    compare_top1=name == chooser,
                ),
                case.description,
            )


def _compare_with_first_row(
    accumulator: Accumulator, interface: Interface, case: GridCase, outputs: Inputs, baseline_outputs: Inputs
) -> bool:
    """Measure each row against row 0; return False where an output was left out because it does not hold in the baseline."""
    complete = True
    for name, output in outputs.items():
        axis = _batch_axis(interface, name, output, case)
        if axis is None:
            continue
        counts = _token_mask(interface, name, output, case.inputs) if axis == 0 else None

        def slot(rows: Array, at: int, name: str = name, axis: int = axis, counts: Array | None = counts) -> Measurement:
            return measure(
                _slice_row(rows, axis, at),
                _slice_row(rows, axis, 0),
                mask=None if counts is None else counts[:1],
                vector_axes=_vector_axes(interface, name),
                baseline_label="row 0, which is the same",
            )

        found = {at: slot(output, at) for at in range(1, case.batch_size)}
        blamed = [at for at, measured in found.items() if not accumulator.is_within_tolerance(name, measured)]
        if _have_same_shape(name, outputs, baseline_outputs) and not all(
            accumulator.is_within_tolerance(name, slot(baseline_outputs[name], at)) for at in blamed
        ):
            complete = False
            continue
        for at, measured in found.items():
            accumulator.add_batch_invariance(name, measured, f"{case.description}, row {at}")
    return complete


def _compare_with_single_rows(
    accumulator: Accumulator,
    interface: Interface,
    case: GridCase,
    outputs: Inputs,
    baseline_outputs: Inputs,
    baseline_runner: CandidateRunner,
) -> bool:
    """Measure each row against the baseline on that row alone; return False where an output of which the baseline mixes the
    rows was left out.
    """
    by_row = {
        name: axis for name, output in outputs.items() if (axis := _batch_axis(interface, name, output, case)) is not None
    }
    found: dict[str, list[tuple[int, Measurement]]] = {name: [] for name in by_row}
    mixed: set[str] = set()
    for at in range(case.batch_size if by_row else 0):
        feed = select_row(interface, case.inputs, at)
        alone = baseline_runner.run(feed)
        for name, axis in by_row.items():
            if name not in alone or name in mixed:
                continue

            def one(
                rows: Array, name: str = name, axis: int = axis, at: int = at, feed: Inputs = feed, alone: Inputs = alone
            ) -> Measurement:
                part = _slice_row(rows, axis, at)
                counts = _token_mask(interface, name, part, feed) if axis == 0 else None
                return measure(part, alone[name], mask=counts, vector_axes=_vector_axes(interface, name))

            measured = one(outputs[name])
            if (
                not accumulator.is_within_tolerance(name, measured)
                and _have_same_shape(name, outputs, baseline_outputs)
                and not accumulator.is_within_tolerance(name, one(baseline_outputs[name]))
            ):
                mixed.add(name)
            found[name].append((at, measured))
    for name, rows in found.items():
        for at, measured in rows if name not in mixed else []:
            accumulator.add(name, measured, f"{case.description}, row {at} alone in the baseline")
    return not mixed


def _have_same_shape(name: str, outputs: Inputs, baseline_outputs: Inputs) -> bool:
    return name in baseline_outputs and baseline_outputs[name].shape == outputs[name].shape


def _token_mask(interface: Interface, name: str, output: Array, inputs: Inputs) -> Array | None:
    """Return which tokens of an output count, (B, S), or None where all do.

    An output is by token where its first two dimensions are those of an input of role mask: declared with the same names, or
    with the same sizes when it has a third; an output without declared dimensions goes by the sizes it has. Of a mask over
    earlier and new tokens, (B, past+S), the last S columns speak of the new ones.
    """
    spec = _output_spec(interface, name)
    dims = None if spec is None else spec.dims
    for one in interface.inputs:
        if one.role != "mask" or one.name not in inputs or inputs[one.name].ndim != 2 or output.ndim < 2:
            continue
        mask = inputs[one.name].astype(bool)
        if dims is None or one.dims is None:
            alike = output.ndim >= 3
        elif dims[1] != one.dims[1] and str(one.dims[1]).endswith(f"+{dims[1]}"):
            alike, mask = dims[0] == one.dims[0], mask[:, mask.shape[1] - output.shape[1] :]
        else:
            alike = dims[:2] == one.dims and (output.ndim >= 3 or isinstance(dims[1], str))
        if alike and output.shape[:2] == mask.shape:
            return mask
    return None


def _top1_output(interface: Interface) -> str | None:
    """Return the output whose largest element is a choice: the first that is no state, of a classifier or language model."""
    if interface.task not in ("classifier", "language-model"):
        return None
    states = {state.output for state in interface.states}
    return next((spec.name for spec in interface.outputs if spec.name not in states), None)


def _vector_axes(interface: Interface, name: str) -> int | None:
    """Vectors of a state lie along its last axis, whatever its rank: (B, H, S, D) holds one for each token and head."""
    return 1 if name in {state.output for state in interface.states} else None


def _output_spec(interface: Interface, name: str) -> TensorSpec | None:
    return next((spec for spec in interface.outputs if spec.name == name), None)


def _batch_axis(interface: Interface, name: str, output: Array, case: GridCase) -> int | None:
    spec = _output_spec(interface, name)
    axis = None if spec is None else interface.batch_axis(spec)
    return axis if axis is not None and axis < output.ndim and output.shape[axis] == case.batch_size else None


def _slice_row(output: Array, axis: int, index: int) -> Array:
    return output[(slice(None),) * axis + (slice(index, index + 1),)]


def _accepts(candidate: Candidate, inputs: Inputs) -> bool:
    """Return whether the interface and the profiles of `subject` take the shapes of `feed`."""
    shapes = {name: tuple(array.shape) for name, array in inputs.items()}
    for spec in candidate.interface.inputs if candidate.interface else ():
        sizes = spec.dims or shapes[spec.name]
        if any(isinstance(dim, int) and dim != size for dim, size in zip(sizes, shapes[spec.name], strict=True)):
            return False
    return not candidate.profiles or any(profile.mismatch(shapes) is None for profile in candidate.profiles)
