"""Compare: a subject with its baseline, over a grid of cases, held to explicit criteria."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from ryzen_compile.artifacts.package.manifest import Accuracy
from ryzen_compile.numerics.accumulator import Tally
from ryzen_compile.numerics.candidate import Subject, paired
from ryzen_compile.numerics.criteria import Criteria, Limits, Precision, coarser
from ryzen_compile.numerics.grid import Case, given, grid, row
from ryzen_compile.numerics.metrics import measure
from ryzen_compile.progress import Progress, Silent
from ryzen_compile.spec import profile as profiles_
from ryzen_compile.utils.record import Record, utc_now

if TYPE_CHECKING:
    from ryzen_compile.numerics.metrics import Array, Measured
    from ryzen_compile.numerics.polygraphy_runner import SubjectRunner
    from ryzen_compile.spec.interface import Interface, TensorSpec
    from ryzen_compile.spec.passes import Feed
    from ryzen_compile.spec.profile import Profile


_MIXES = "the baseline itself computes a row otherwise in a batch than alone: rows were not compared alone"


class Comparison(Record, frozen=True):
    """A subject compared with its baseline."""

    subject: str
    """How the user spells it."""
    baseline: str
    accuracy: Accuracy
    """The result, as a package records it."""
    precision: Precision
    """The coarser precision of the two: its limits are the ones that count."""
    limits: Limits
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
    subject: Subject,
    baseline: Subject,
    *,
    criteria: Criteria,
    profiles: Sequence[Profile] = (),
    samples: Sequence[Feed] | None = None,
    inputs: Iterable[Feed] | None = None,
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
    subject, baseline, interface = paired(subject, baseline)
    if inputs is not None:
        cases = given(interface, inputs)
    else:
        if samples is None:
            own = baseline.samples or subject.samples
            samples = own(seed) if own else ()
        shapes = tuple(profiles) or subject.profiles or (profiles_.derive(interface),)
        cases = grid(interface, shapes, seed=seed, samples=samples)
    return compare_on(cases, subject, baseline, interface, criteria=criteria, progress=progress or Silent())


def compare_on(
    cases: Iterable[Case],
    subject: Subject,
    baseline: Subject,
    interface: Interface,
    *,
    criteria: Criteria,
    progress: Progress,
) -> Comparison:
    """Run `cases`, which fit `interface`, on two subjects with names in common: see `compare`."""
    from ryzen_compile.numerics.polygraphy_runner import SubjectRunner, side_by_side

    started = time.perf_counter()
    precision = coarser(subject.precision, baseline.precision)
    tally, names, notes = Tally(criteria, precision), [], dict[str, None]()
    runners = [SubjectRunner(subject), SubjectRunner(baseline)]
    with closing(side_by_side(runners, _announced(cases, progress))) as stream:
        for case, (mine, theirs) in stream:
            tally.cases += 1
            names.append(case.says)
            _against_baseline(tally, interface, case, mine, theirs)
            if case.rows == "identical":
                if not _against_first_row(tally, interface, case, mine, theirs):
                    notes[_MIXES] = None
            elif case.rows == "mixed" and case.batch > 1:
                if _takes(baseline, row(interface, case.feed, 0)):
                    if not _against_rows_alone(tally, interface, case, mine, theirs, runners[1]):
                        notes[_MIXES] = None
                else:
                    notes[f"rows were not compared with the same row alone: {baseline.name} does not take a batch of 1"] = None
    metrics, faults = tally.metrics(), tally.faults()
    return Comparison(
        subject=subject.name,
        baseline=baseline.name,
        precision=precision,
        limits=criteria.limits[precision],
        cases=tuple(names),
        not_executed=subject.not_executed,
        seconds=round(time.perf_counter() - started, 3),
        accuracy=Accuracy(
            subject=subject.executed,
            baseline=baseline.executed,
            where=subject.where,
            cases=len(names),
            criteria=criteria.name,
            metrics=metrics,
            met=not faults and all(metric.met for metric in metrics),
            when=utc_now(),
            faults=faults,
            notes=(*tally.notes(), *notes),
        ),
    )


def _announced(cases: Iterable[Case], progress: Progress) -> Iterator[Case]:
    for case in cases:
        with progress.stage(f"compare {case.says}"):
            yield case


def _against_baseline(tally: Tally, interface: Interface, case: Case, mine: Feed, theirs: Feed) -> None:
    chooser = _chooser(interface)
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        if name not in theirs:
            tally.fail(name, "is no output of the baseline", case.says)
        elif name not in mine:
            tally.fail(name, "is an output of the baseline, and the subject lacks it", case.says)
        else:
            tally.see(
                name,
                measure(
                    mine[name],
                    theirs[name],
                    counts=_counts(interface, name, mine[name], case.feed),
                    vector_axes=_vector_axes(interface, name),
                    choices=name == chooser,
                ),
                case.says,
            )


def _against_first_row(tally: Tally, interface: Interface, case: Case, mine: Feed, theirs: Feed) -> bool:
    """Measure each row against row 0; return False where an output was left out because it does not hold in the baseline."""
    complete = True
    for name, output in mine.items():
        axis = _rows_axis(interface, name, output, case)
        if axis is None:
            continue
        counts = _counts(interface, name, output, case.feed) if axis == 0 else None

        def slot(rows: Array, at: int, name: str = name, axis: int = axis, counts: Array | None = counts) -> Measured:
            return measure(
                _slice(rows, axis, at),
                _slice(rows, axis, 0),
                counts=None if counts is None else counts[:1],
                vector_axes=_vector_axes(interface, name),
                against="row 0, which is the same",
            )

        found = {at: slot(output, at) for at in range(1, case.batch)}
        blamed = [at for at, measured in found.items() if not tally.holds(name, measured)]
        if _alike(name, mine, theirs) and not all(tally.holds(name, slot(theirs[name], at)) for at in blamed):
            complete = False
            continue
        for at, measured in found.items():
            tally.see_slot(name, measured, f"{case.says}, row {at}")
    return complete


def _against_rows_alone(
    tally: Tally, interface: Interface, case: Case, mine: Feed, theirs: Feed, baseline: SubjectRunner
) -> bool:
    """Measure each row against the baseline on that row alone; return False where an output of which the baseline mixes the
    rows was left out.
    """
    by_row = {name: axis for name, output in mine.items() if (axis := _rows_axis(interface, name, output, case)) is not None}
    found: dict[str, list[tuple[int, Measured]]] = {name: [] for name in by_row}
    mixed: set[str] = set()
    for at in range(case.batch if by_row else 0):
        feed = row(interface, case.feed, at)
        alone = baseline.run(feed)
        for name, axis in by_row.items():
            if name not in alone or name in mixed:
                continue

            def one(
                rows: Array, name: str = name, axis: int = axis, at: int = at, feed: Feed = feed, alone: Feed = alone
            ) -> Measured:
                part = _slice(rows, axis, at)
                counts = _counts(interface, name, part, feed) if axis == 0 else None
                return measure(part, alone[name], counts=counts, vector_axes=_vector_axes(interface, name))

            measured = one(mine[name])
            if not tally.holds(name, measured) and _alike(name, mine, theirs) and not tally.holds(name, one(theirs[name])):
                mixed.add(name)
            found[name].append((at, measured))
    for name, rows in found.items():
        for at, measured in rows if name not in mixed else []:
            tally.see(name, measured, f"{case.says}, row {at} alone in the baseline")
    return not mixed


def _alike(name: str, mine: Feed, theirs: Feed) -> bool:
    return name in theirs and theirs[name].shape == mine[name].shape


def _counts(interface: Interface, name: str, output: Array, feed: Feed) -> Array | None:
    """Return which tokens of an output count, (B, S), or None where all do.

    An output is by token where its first two dimensions are those of an input of role mask: declared with the same names, or
    with the same sizes when it has a third; an output without declared dimensions goes by the sizes it has. Of a mask over
    earlier and new tokens, (B, past+S), the last S columns speak of the new ones.
    """
    spec = _output(interface, name)
    dims = None if spec is None else spec.dims
    for one in interface.inputs:
        if one.role != "mask" or one.name not in feed or feed[one.name].ndim != 2 or output.ndim < 2:
            continue
        mask = feed[one.name].astype(bool)
        if dims is None or one.dims is None:
            alike = output.ndim >= 3
        elif dims[1] != one.dims[1] and str(one.dims[1]).endswith(f"+{dims[1]}"):
            alike, mask = dims[0] == one.dims[0], mask[:, mask.shape[1] - output.shape[1] :]
        else:
            alike = dims[:2] == one.dims and (output.ndim >= 3 or isinstance(dims[1], str))
        if alike and output.shape[:2] == mask.shape:
            return mask
    return None


def _chooser(interface: Interface) -> str | None:
    """Return the output whose largest element is a choice: the first that is no state, of a classifier or language model."""
    if interface.task not in ("classifier", "language-model"):
        return None
    states = {state.output for state in interface.states}
    return next((spec.name for spec in interface.outputs if spec.name not in states), None)


def _vector_axes(interface: Interface, name: str) -> int | None:
    """Vectors of a state lie along its last axis, whatever its rank: (B, H, S, D) holds one for each token and head."""
    return 1 if name in {state.output for state in interface.states} else None


def _output(interface: Interface, name: str) -> TensorSpec | None:
    return next((spec for spec in interface.outputs if spec.name == name), None)


def _rows_axis(interface: Interface, name: str, output: Array, case: Case) -> int | None:
    spec = _output(interface, name)
    axis = None if spec is None else interface.batch_axis(spec)
    return axis if axis is not None and axis < output.ndim and output.shape[axis] == case.batch else None


def _slice(output: Array, axis: int, at: int) -> Array:
    return output[(slice(None),) * axis + (slice(at, at + 1),)]


def _takes(subject: Subject, feed: Feed) -> bool:
    """Return whether the interface and the profiles of `subject` take the shapes of `feed`."""
    shapes = {name: tuple(array.shape) for name, array in feed.items()}
    for spec in subject.interface.inputs if subject.interface else ():
        sizes = spec.dims or shapes[spec.name]
        if any(isinstance(dim, int) and dim != size for dim, size in zip(sizes, shapes[spec.name], strict=True)):
            return False
    return not subject.profiles or any(profile.problem(shapes) is None for profile in subject.profiles)
