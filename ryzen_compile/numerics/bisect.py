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

from ryzen_compile.numerics.candidate import Candidate, match_interfaces
from ryzen_compile.numerics.comparison import Comparison, compare_cases
from ryzen_compile.numerics.criteria import Criteria
from ryzen_compile.numerics.grid import GridCase, cases_from_inputs, grid_cases
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.numerics.tensor_diff import EXTERNAL_WEIGHT_BYTES, TensorDifference, tensor_differences
from ryzen_compile.pipeline import pass_manager
from ryzen_compile.progress import Progress
from ryzen_compile.spec import profile as profiles_
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.pass_record import PassRecord
    from ryzen_compile.spec.passes import Inputs, Pass, PassContext
    from ryzen_compile.spec.profile import Profile
    from ryzen_compile.spec.properties import Property


_MAX_LISTED_NODES = 5
"""How many suspects a sentence names."""


class DivergentNode(Record, frozen=True):
    """The node where the chain of differences begins."""

    node: str
    op_type: str
    tensor: str
    """The output of it that parts."""
    message: str
    """How far it parts, in one sentence."""
    unmeasured_nodes: tuple[str, ...] = ()
    """Nodes before it whose outputs have no namesake before the pass, and so were not measured: it may be one of these."""

    def __str__(self) -> str:
        made = f"`{self.tensor}`, made by `{self.node}` ({self.op_type})"
        shown = ", ".join(self.unmeasured_nodes[:_MAX_LISTED_NODES]) + (
            ", ..." if len(self.unmeasured_nodes) > _MAX_LISTED_NODES else ""
        )
        return f"{made}, or in one of the new nodes before it: {shown}" if self.unmeasured_nodes else made


class Divergence(Record, frozen=True):
    """Where a plan parts from its baseline."""

    after_pass: str | None
    """The first pass after which the criteria are not met; None where they are met to the end, or not met from the start."""
    pass_number: int
    """Which pass of the plan that is, from 1; 0: the source graph itself; -1: none, or there is no plan."""
    message: str
    """The finding in one sentence."""
    comparison: Comparison
    """The comparison that was not met; where there is none, that of the source graph."""
    case: str | None = None
    """The case on which the nodes were measured."""
    divergent_node: DivergentNode | None = None


class _DivergenceFound(Exception):
    """Ends the replay at the first pass after which the criteria are not met."""

    def __init__(self, pass_record: PassRecord, pass_number: int, before: Path, after: Path, comparison: Comparison) -> None:
        super().__init__(pass_record.pass_spec)
        self.pass_record = pass_record
        self.pass_number = pass_number
        self.before = before
        self.after = after
        self.comparison = comparison


def bisect(
    source: Path,
    passes: Sequence[Pass],
    *,
    baseline: Candidate,
    context: PassContext,
    properties: Iterable[Property],
    criteria: Criteria,
    profiles: Sequence[Profile] = (),
    samples: Sequence[Inputs] | None = None,
    inputs: Sequence[Inputs] | None = None,
    baseline_file: Path | None = None,
    packaged_graph: Path | None = None,
    progress: Progress,
) -> Divergence:
    """Replay `plan` on the ONNX file `source` and find where it parts from `baseline`.

    `context` and `facts` are those that the plan was run with. The cases are as for `compare`. Where `source` itself parts from
    the baseline, and that is the ONNX file `baseline_file`, the two are measured by their namesakes; where no pass is to blame,
    what the plan leaves and `shipped`, the graph that it once left. Raises what the passes and the comparison raise.
    """
    start, baseline, interface = match_interfaces(onnx_candidate(source), baseline)

    cases = _case_factory(interface, baseline, profiles, samples, inputs, context.seed)

    def judge(subject: Candidate, some: Iterable[GridCase]) -> Comparison:
        return compare_cases(some, subject, baseline, interface, criteria=criteria, progress=progress)

    first = judge(start, cases())
    if not first.met:
        case, culprit = _first_divergence(baseline_file, source, cases, judge, criteria) if baseline_file else (None, None)
        says = f"the source itself parts from the baseline: `{source}` does not meet the criteria against `{baseline.name}`"
        return Divergence(
            after_pass=None,
            pass_number=0,
            message=f"{says}{_format_location(culprit)}; no pass is to blame",
            comparison=first,
            case=case.description if case else None,
            divergent_node=culprit,
        )
    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        parted = _replay(source, passes, context, properties, Path(folder), lambda subject: judge(subject, cases()))
        if isinstance(parted, Path):
            says = f"the criteria are met after each of {len(passes)} passes"
            if packaged_graph is None or (last := judge(onnx_candidate(packaged_graph), cases())).met:
                return Divergence(after_pass=None, pass_number=-1, message=says, comparison=first)
            case, culprit = _first_divergence(parted, packaged_graph, cases, judge, criteria)
            return Divergence(
                after_pass=None,
                pass_number=0,
                message=f"the source itself parts from the baseline: {says} of `{source}`, and not by the graph in the package, "
                f"built from another model or by other passes{_format_location(culprit)}; no pass is to blame",
                comparison=last,
                case=case.description if case else None,
                divergent_node=culprit,
            )
        after = onnx_candidate(parted.after)
        case = next((one for one in cases() if not judge(after, [one]).met), None)
        culprit = _find_divergent_node(parted.before, parted.after, case, criteria) if case else None
    return Divergence(
        after_pass=parted.pass_record.pass_spec,
        pass_number=parted.pass_number,
        message=f"after `{parted.pass_record.pass_spec}`, pass {parted.pass_number} of {len(passes)}, the outputs part{_format_location(culprit)}",
        comparison=parted.comparison,
        case=case.description if case else None,
        divergent_node=culprit,
    )


def find_divergence(
    candidate: Path,
    baseline: Path,
    *,
    criteria: Criteria,
    profiles: Sequence[Profile] = (),
    samples: Sequence[Inputs] | None = None,
    inputs: Sequence[Inputs] | None = None,
    seed: int = 0,
    progress: Progress,
) -> Divergence:
    """Find the node at which the ONNX file `subject` parts from the ONNX file `baseline`, tensor by tensor of one name."""
    mine, theirs, interface = match_interfaces(onnx_candidate(candidate), onnx_candidate(baseline))
    cases = _case_factory(interface, theirs, profiles, samples, inputs, seed)

    def judge(one: Candidate, some: Iterable[GridCase]) -> Comparison:
        return compare_cases(some, one, theirs, interface, criteria=criteria, progress=progress)

    result = judge(mine, cases())
    case, culprit = (None, None) if result.met else _first_divergence(baseline, candidate, cases, judge, criteria)
    found = f"`{candidate}` meets the criteria against `{baseline}`"
    if not result.met:
        found = (
            f"`{candidate}` parts from `{baseline}`{_format_location(culprit) or ', and no tensor that both name tells where'}"
        )
    return Divergence(
        after_pass=None,
        pass_number=-1,
        message=f"{found}; there are no passes to blame",
        comparison=result,
        case=case.description if case else None,
        divergent_node=culprit,
    )


def _replay(
    source: Path,
    passes: Sequence[Pass],
    context: PassContext,
    properties: Iterable[Property],
    folder: Path,
    compare: Callable[[Candidate], Comparison],
) -> _DivergenceFound | Path:
    """Run `plan` until what a pass leaves does not meet the criteria, and return that, or the last graph where all are met."""
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.save import save_to_store

    before = source
    numbers = itertools.count(1)

    def witness(step: PassRecord, model: ir.Model) -> None:
        nonlocal before
        number = next(numbers)
        if step.outcome != "changed":
            return
        after = folder / f"{number}.onnx"
        save_to_store(model, after, folder / "weights", threshold_bytes=EXTERNAL_WEIGHT_BYTES)
        comparison = compare(onnx_candidate(after))
        if not comparison.met:
            raise _DivergenceFound(step, number, before, after, comparison)
        before = after

    try:
        pass_manager.run_passes(load(source), passes, context, properties, on_pass_end=witness)
    except _DivergenceFound as parted:
        return parted
    return before


def _case_factory(
    interface: Interface,
    baseline: Candidate,
    profiles: Sequence[Profile],
    samples: Sequence[Inputs] | None,
    inputs: Sequence[Inputs] | None,
    seed: int,
) -> Callable[[], Iterator[GridCase]]:
    if samples is None:
        samples = baseline.samples(seed) if baseline.samples else ()

    def cases() -> Iterator[GridCase]:
        if inputs is not None:
            return cases_from_inputs(interface, inputs)
        return grid_cases(interface, tuple(profiles) or (profiles_.derive_profile(interface),), seed=seed, samples=samples)

    return cases


def _first_divergence(
    before: Path,
    after: Path,
    cases: Callable[[], Iterator[GridCase]],
    compare: Callable[[Candidate, Iterable[GridCase]], Comparison],
    criteria: Criteria,
) -> tuple[GridCase | None, DivergentNode | None]:
    """Return the first case that `after` fails, and the node of it where it parts from its namesakes in `before`."""
    subject = onnx_candidate(after)
    case = next((one for one in cases() if not compare(subject, [one]).met), None)
    if case is None:
        return None, None
    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        return case, _find_divergent_node(
            before, after, case, criteria, folder=Path(folder), baseline_label=f"its namesake in `{before.name}`"
        )


def _format_location(divergent_node: DivergentNode | None) -> str:
    return f", first at {divergent_node}" if divergent_node else ""


def _find_divergent_node(
    before: Path,
    after: Path,
    case: GridCase,
    criteria: Criteria,
    *,
    folder: Path | None = None,
    baseline_label: str = "its namesake before the pass",
) -> DivergentNode | None:
    """Return the node of `after` where the chain of differences begins that reaches an output, or None where there is none."""
    from ryzen_compile.ir.load import load

    model = load(after)
    found = tensor_differences(
        load(before), model, case.inputs, criteria=criteria, folder=folder or after.parent, baseline_label=baseline_label
    )
    start = _first_divergent_value(model, found)
    if start is None:
        return None
    node = start.producer()
    unmeasured = [one for one in _unmeasured_producers(start, found) if one is not node]
    return DivergentNode(
        node=(node.name if node else None) or "a node without a name",
        op_type=node.op_type if node else "",
        tensor=start.name or "",
        message=found[start.name or ""].message,
        unmeasured_nodes=tuple(f"{one.name} ({one.op_type})" for one in unmeasured),
    )


def _first_divergent_value(model: ir.Model, differences: Mapping[str, TensorDifference]) -> ir.Value | None:
    """Return the earliest tensor that differs and from which differing tensors lead on to an output."""
    order = {node: at for at, node in enumerate(model.graph)}
    chain = [value for value in model.graph.outputs if _differs(value, differences)]
    seen = set(chain)
    for value in chain:  # grows while it is walked
        for earlier in _measured_producers(value, differences):
            if earlier not in seen and _differs(earlier, differences):
                seen.add(earlier)
                chain.append(earlier)
    return min(chain, key=lambda value: order.get(value.producer(), -1), default=None)  # type: ignore[arg-type]


def _differs(value: ir.Value, differences: Mapping[str, TensorDifference]) -> bool:
    one = differences.get(value.name or "")
    return one is not None and not one.met


def _measured_producers(value: ir.Value, differences: Mapping[str, TensorDifference]) -> list[ir.Value]:
    """Return the nearest tensors that `value` is computed from and that were measured."""
    return [one for one in _walk_back(value, differences) if (one.name or "") in differences]


def _unmeasured_producers(value: ir.Value, differences: Mapping[str, TensorDifference]) -> list[ir.Node]:
    """Return the nodes between `value` and the nearest measured tensors before it."""
    between = [one.producer() for one in _walk_back(value, differences) if (one.name or "") not in differences]
    return list(dict.fromkeys(node for node in between if node is not None))


def _walk_back(value: ir.Value, differences: Mapping[str, TensorDifference]) -> Iterator[ir.Value]:
    """Yield what `value` is computed from, back to the nearest measured tensors and these included."""
    from ryzen_compile.ir.weights import GRAPH_ATTRIBUTE_TYPES, attribute_graphs

    seen = {value}
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is None:
            continue
        inner = (
            source
            for attribute in node.attributes.values()
            if attribute.type in GRAPH_ATTRIBUTE_TYPES
            for graph in attribute_graphs(attribute)
            for one in itertools.chain([graph], graph.subgraphs())
            for deep in one
            for source in deep.inputs
        )
        for source in itertools.chain(node.inputs, inner):
            if source is None or source in seen:
                continue
            seen.add(source)
            yield source
            if (source.name or "") not in differences:
                waiting.append(source)
