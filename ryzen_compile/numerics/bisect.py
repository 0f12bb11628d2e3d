"""Bisection: the first pass of a plan, and the first node after it, at which a graph parts from its baseline.

The plan is replayed on the source graph, and what each pass leaves is compared with the baseline. Within the first bad result
every tensor that has a namesake before the pass is measured against it. A difference may heal: a mask of -65504 instead of
-3.4e38 changes nothing behind the softmax. So the first node is not the first that differs, but the one where the chain of
differences begins that reaches an output.

Two ONNX files without a plan between them, a source graph and a baseline among them, are measured namesake by namesake too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ryzen_compile.numerics.candidate import Subject, paired
from ryzen_compile.numerics.comparison import Comparison, compare_on
from ryzen_compile.numerics.criteria import Criteria
from ryzen_compile.numerics.grid import Case, given, grid
from ryzen_compile.numerics.onnx_candidates import of_onnx
from ryzen_compile.numerics.tensor_diff import STORE_BYTES, Difference, differences
from ryzen_compile.pipeline import pass_manager
from ryzen_compile.progress import Progress
from ryzen_compile.spec import profile as profiles_
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.pass_record import Step
    from ryzen_compile.spec.passes import Context, Feed, Pass
    from ryzen_compile.spec.profile import Profile
    from ryzen_compile.spec.properties import Fact


_SHOWN = 5
"""How many suspects a sentence names."""


class Culprit(Record, frozen=True):
    """The node where the chain of differences begins."""

    node: str
    op_type: str
    tensor: str
    """The output of it that parts."""
    says: str
    """How far it parts, in one sentence."""
    among: tuple[str, ...] = ()
    """Nodes before it whose outputs have no namesake before the pass, and so were not measured: it may be one of these."""

    def __str__(self) -> str:
        made = f"`{self.tensor}`, made by `{self.node}` ({self.op_type})"
        shown = ", ".join(self.among[:_SHOWN]) + (", ..." if len(self.among) > _SHOWN else "")
        return f"{made}, or in one of the new nodes before it: {shown}" if self.among else made


class Divergence(Record, frozen=True):
    """Where a plan parts from its baseline."""

    after: str | None
    """The first pass after which the criteria are not met; None where they are met to the end, or not met from the start."""
    number: int
    """Which pass of the plan that is, from 1; 0: the source graph itself; -1: none, or there is no plan."""
    says: str
    """The finding in one sentence."""
    comparison: Comparison
    """The comparison that was not met; where there is none, that of the source graph."""
    case: str | None = None
    """The case on which the nodes were measured."""
    culprit: Culprit | None = None


class _Parted(Exception):
    """Ends the replay at the first pass after which the criteria are not met."""

    def __init__(self, step: Step, number: int, before: Path, after: Path, comparison: Comparison) -> None:
        super().__init__(step.spelling)
        self.step = step
        self.number = number
        self.before = before
        self.after = after
        self.comparison = comparison


def bisect(
    source: Path,
    plan: Sequence[Pass],
    *,
    baseline: Subject,
    context: Context,
    facts: Iterable[Fact],
    criteria: Criteria,
    profiles: Sequence[Profile] = (),
    samples: Sequence[Feed] | None = None,
    inputs: Sequence[Feed] | None = None,
    baseline_file: Path | None = None,
    shipped: Path | None = None,
    progress: Progress,
) -> Divergence:
    """Replay `plan` on the ONNX file `source` and find where it parts from `baseline`.

    `context` and `facts` are those that the plan was run with. The cases are as for `compare`. Where `source` itself parts from
    the baseline, and that is the ONNX file `baseline_file`, the two are measured by their namesakes; where no pass is to blame,
    what the plan leaves and `shipped`, the graph that it once left. Raises what the passes and the comparison raise.
    """
    start, baseline, interface = paired(of_onnx(source), baseline)

    cases = _cases(interface, baseline, profiles, samples, inputs, context.seed)

    def judge(subject: Subject, some: Iterable[Case]) -> Comparison:
        return compare_on(some, subject, baseline, interface, criteria=criteria, progress=progress)

    first = judge(start, cases())
    if not first.met:
        case, culprit = _first_part(baseline_file, source, cases, judge, criteria) if baseline_file else (None, None)
        says = f"the source itself parts from the baseline: `{source}` does not meet the criteria against `{baseline.name}`"
        return Divergence(
            after=None,
            number=0,
            says=f"{says}{_where(culprit)}; no pass is to blame",
            comparison=first,
            case=case.says if case else None,
            culprit=culprit,
        )
    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        parted = _replay(source, plan, context, facts, Path(folder), lambda subject: judge(subject, cases()))
        if isinstance(parted, Path):
            says = f"the criteria are met after each of {len(plan)} passes"
            if shipped is None or (last := judge(of_onnx(shipped), cases())).met:
                return Divergence(after=None, number=-1, says=says, comparison=first)
            case, culprit = _first_part(parted, shipped, cases, judge, criteria)
            return Divergence(
                after=None,
                number=0,
                says=f"the source itself parts from the baseline: {says} of `{source}`, and not by the graph in the package, "
                f"built from another model or by other passes{_where(culprit)}; no pass is to blame",
                comparison=last,
                case=case.says if case else None,
                culprit=culprit,
            )
        after = of_onnx(parted.after)
        case = next((one for one in cases() if not judge(after, [one]).met), None)
        culprit = _culprit(parted.before, parted.after, case, criteria) if case else None
    return Divergence(
        after=parted.step.spelling,
        number=parted.number,
        says=f"after `{parted.step.spelling}`, pass {parted.number} of {len(plan)}, the outputs part{_where(culprit)}",
        comparison=parted.comparison,
        case=case.says if case else None,
        culprit=culprit,
    )


def part(
    subject: Path,
    baseline: Path,
    *,
    criteria: Criteria,
    profiles: Sequence[Profile] = (),
    samples: Sequence[Feed] | None = None,
    inputs: Sequence[Feed] | None = None,
    seed: int = 0,
    progress: Progress,
) -> Divergence:
    """Find the node at which the ONNX file `subject` parts from the ONNX file `baseline`, tensor by tensor of one name."""
    mine, theirs, interface = paired(of_onnx(subject), of_onnx(baseline))
    cases = _cases(interface, theirs, profiles, samples, inputs, seed)

    def judge(one: Subject, some: Iterable[Case]) -> Comparison:
        return compare_on(some, one, theirs, interface, criteria=criteria, progress=progress)

    result = judge(mine, cases())
    case, culprit = (None, None) if result.met else _first_part(baseline, subject, cases, judge, criteria)
    found = f"`{subject}` meets the criteria against `{baseline}`"
    if not result.met:
        found = f"`{subject}` parts from `{baseline}`{_where(culprit) or ', and no tensor that both name tells where'}"
    return Divergence(
        after=None,
        number=-1,
        says=f"{found}; there are no passes to blame",
        comparison=result,
        case=case.says if case else None,
        culprit=culprit,
    )


def _replay(
    source: Path,
    plan: Sequence[Pass],
    context: Context,
    facts: Iterable[Fact],
    folder: Path,
    judge: Callable[[Subject], Comparison],
) -> _Parted | Path:
    """Run `plan` until what a pass leaves does not meet the criteria, and return that, or the last graph where all are met."""
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.save import save_to_store

    before = source
    numbers = itertools.count(1)

    def witness(step: Step, model: ir.Model) -> None:
        nonlocal before
        number = next(numbers)
        if step.decision != "changed":
            return
        after = folder / f"{number}.onnx"
        save_to_store(model, after, folder / "weights", threshold_bytes=STORE_BYTES)
        comparison = judge(of_onnx(after))
        if not comparison.met:
            raise _Parted(step, number, before, after, comparison)
        before = after

    try:
        pass_manager.run(load(source), plan, context, facts, witness=witness)
    except _Parted as parted:
        return parted
    return before


def _cases(
    interface: Interface,
    baseline: Subject,
    profiles: Sequence[Profile],
    samples: Sequence[Feed] | None,
    inputs: Sequence[Feed] | None,
    seed: int,
) -> Callable[[], Iterator[Case]]:
    if samples is None:
        samples = baseline.samples(seed) if baseline.samples else ()

    def cases() -> Iterator[Case]:
        if inputs is not None:
            return given(interface, inputs)
        return grid(interface, tuple(profiles) or (profiles_.derive(interface),), seed=seed, samples=samples)

    return cases


def _first_part(
    before: Path,
    after: Path,
    cases: Callable[[], Iterator[Case]],
    judge: Callable[[Subject, Iterable[Case]], Comparison],
    criteria: Criteria,
) -> tuple[Case | None, Culprit | None]:
    """Return the first case that `after` fails, and the node of it where it parts from its namesakes in `before`."""
    subject = of_onnx(after)
    case = next((one for one in cases() if not judge(subject, [one]).met), None)
    if case is None:
        return None, None
    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        return case, _culprit(before, after, case, criteria, folder=Path(folder), against=f"its namesake in `{before.name}`")


def _where(culprit: Culprit | None) -> str:
    return f", first at {culprit}" if culprit else ""


def _culprit(
    before: Path,
    after: Path,
    case: Case,
    criteria: Criteria,
    *,
    folder: Path | None = None,
    against: str = "its namesake before the pass",
) -> Culprit | None:
    """Return the node of `after` where the chain of differences begins that reaches an output, or None where there is none."""
    from ryzen_compile.ir.load import load

    model = load(after)
    found = differences(load(before), model, case.feed, criteria=criteria, folder=folder or after.parent, against=against)
    start = _start_of_chain(model, found)
    if start is None:
        return None
    node = start.producer()
    unmeasured = [one for one in _unmeasured_before(start, found) if one is not node]
    return Culprit(
        node=(node.name if node else None) or "a node without a name",
        op_type=node.op_type if node else "",
        tensor=start.name or "",
        says=found[start.name or ""].says,
        among=tuple(f"{one.name} ({one.op_type})" for one in unmeasured),
    )


def _start_of_chain(model: ir.Model, found: Mapping[str, Difference]) -> ir.Value | None:
    """Return the earliest tensor that differs and from which differing tensors lead on to an output."""
    order = {node: at for at, node in enumerate(model.graph)}
    chain = [value for value in model.graph.outputs if _differs(value, found)]
    seen = set(chain)
    for value in chain:  # grows while it is walked
        for earlier in _measured_before(value, found):
            if earlier not in seen and _differs(earlier, found):
                seen.add(earlier)
                chain.append(earlier)
    return min(chain, key=lambda value: order.get(value.producer(), -1), default=None)  # type: ignore[arg-type]


def _differs(value: ir.Value, found: Mapping[str, Difference]) -> bool:
    one = found.get(value.name or "")
    return one is not None and not one.met


def _measured_before(value: ir.Value, found: Mapping[str, Difference]) -> list[ir.Value]:
    """Return the nearest tensors that `value` is computed from and that were measured."""
    return [one for one in _walk_back(value, found) if (one.name or "") in found]


def _unmeasured_before(value: ir.Value, found: Mapping[str, Difference]) -> list[ir.Node]:
    """Return the nodes between `value` and the nearest measured tensors before it."""
    between = [one.producer() for one in _walk_back(value, found) if (one.name or "") not in found]
    return list(dict.fromkeys(node for node in between if node is not None))


def _walk_back(value: ir.Value, found: Mapping[str, Difference]) -> Iterator[ir.Value]:
    """Yield what `value` is computed from, back to the nearest measured tensors and these included."""
    from ryzen_compile.ir.weights import GRAPHS, graphs_of

    seen = {value}
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is None:
            continue
        inner = (
            source
            for attribute in node.attributes.values()
            if attribute.type in GRAPHS
            for graph in graphs_of(attribute)
            for one in itertools.chain([graph], graph.subgraphs())
            for deep in one
            for source in deep.inputs
        )
        for source in itertools.chain(node.inputs, inner):
            if source is None or source in seen:
                continue
            seen.add(source)
            yield source
            if (source.name or "") not in found:
                waiting.append(source)
