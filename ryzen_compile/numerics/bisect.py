"""Bisection: find the first pass of a pipeline, and the first node after it, at which a graph diverges from its baseline.

The pipeline is replayed on the source graph, and the graph after each pass is compared with the baseline. In the first graph
that does not meet the criteria, every tensor that also exists before the pass is compared with that tensor. A difference may
vanish downstream: a mask of -65504 instead of -3.4e38 changes nothing after the softmax. The reported node is therefore not
the first that differs, but the start of the chain of differences that reaches an output.

Two ONNX files without a pipeline between them, such as a source graph and a baseline, are compared tensor by tensor as well.
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
from ryzen_compile.numerics.grid import Cases, CaseSource, GridCase
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.numerics.tensor_diff import EXTERNAL_WEIGHT_BYTES, TensorDifference, tensor_differences
from ryzen_compile.pipeline import pass_manager
from ryzen_compile.progress import Progress
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.spec.pass_record import PassRecord
    from ryzen_compile.spec.passes import Pass, PassContext
    from ryzen_compile.spec.properties import Property

_MAX_LISTED_NODES = 5
"""The number of unmeasured nodes that a message lists."""


class DivergentNode(Record, frozen=True):
    """The node at which the chain of differences starts."""

    node: str
    op_type: str
    tensor: str
    """The output of the node that differs."""
    message: str
    """How much it differs, in one sentence."""
    unmeasured_nodes: tuple[str, ...] = ()
    """Preceding nodes whose outputs do not exist before the pass and could not be compared; one of them may be the cause."""

    def __str__(self) -> str:
        location = f"`{self.tensor}`, computed by `{self.node}` ({self.op_type})"
        listed = ", ".join(self.unmeasured_nodes[:_MAX_LISTED_NODES]) + (
            ", ..." if len(self.unmeasured_nodes) > _MAX_LISTED_NODES else ""
        )
        return f"{location}, or by one of the new nodes before it: {listed}" if self.unmeasured_nodes else location


class Divergence(Record, frozen=True):
    """Where a pipeline or an ONNX file diverges from its baseline."""

    after_pass: str | None
    """The first pass after which the criteria are not met. None if they are met after every pass or if the divergence is not
    caused by a pass: the source diverges, or there is no pipeline."""
    pass_number: int | None
    """The number of that pass in the pipeline, from 1; None if `after_pass` is None."""
    message: str
    """The result in one sentence."""
    comparison: Comparison
    """The comparison that did not meet the criteria; if all did, that of the source graph."""
    case: str | None = None
    """The case on which the tensors were compared."""
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
    case_source: CaseSource | None = None,
    baseline_file: Path | None = None,
    packaged_graph: Path | None = None,
    progress: Progress,
) -> Divergence:
    """Replay `passes` on the ONNX file `source` and find where the result diverges from `baseline`.

    `context` and `properties` are those of the original run of the pipeline. `case_source` is as for `compare`. If `source`
    itself diverges and the baseline is the ONNX file `baseline_file`, the two files are compared tensor by tensor. If the
    criteria are met after every pass, the last graph is compared with `packaged_graph`, the graph that the pipeline originally
    wrote. Raises the errors of the passes and of the comparison.
    """
    source_candidate, baseline, interface = match_interfaces(onnx_candidate(source), baseline)

    cases = (case_source or CaseSource(seed=context.seed)).bind(source_candidate, baseline, interface)

    def compare(candidate: Candidate, cases: Cases) -> Comparison:
        return compare_cases(cases, candidate, baseline, interface, criteria=criteria.of_any_share(), progress=progress)

    comparison = compare(source_candidate, cases)
    if not comparison.met:
        case, node = _first_divergence(baseline_file, source, cases, compare, criteria) if baseline_file else (None, None)
        reason = f"`{source}` does not meet the criteria against `{baseline.name}`{_format_location(node)}"
        return Divergence(
            after_pass=None,
            pass_number=None,
            message=f"the source itself diverges from the baseline: {reason}; no pass is to blame",
            comparison=comparison,
            case=case.description if case else None,
            divergent_node=node,
        )
    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        outcome = _replay(source, passes, context, properties, Path(folder), lambda candidate: compare(candidate, cases))
        if isinstance(outcome, Path):
            reason = f"the criteria are met after each of {len(passes)} passes"
            if packaged_graph is None or (packaged := compare(onnx_candidate(packaged_graph), cases)).met:
                return Divergence(after_pass=None, pass_number=None, message=reason, comparison=comparison)
            case, node = _first_divergence(outcome, packaged_graph, cases, compare, criteria)
            return Divergence(
                after_pass=None,
                pass_number=None,
                message=f"the source itself diverges from the baseline: {reason} of `{source}`, but not by the graph in the "
                f"package, which was built from another model or by other passes{_format_location(node)}; no pass is to blame",
                comparison=packaged,
                case=case.description if case else None,
                divergent_node=node,
            )
        after = onnx_candidate(outcome.after)
        case = next((case for case in cases if not compare(after, _only(case)).met), None)
        node = _find_divergent_node(outcome.before, outcome.after, case, criteria) if case else None
    pass_spec, pass_number = outcome.pass_record.pass_spec, outcome.pass_number
    return Divergence(
        after_pass=pass_spec,
        pass_number=pass_number,
        message=f"after `{pass_spec}`, pass {pass_number} of {len(passes)}, the outputs diverge{_format_location(node)}",
        comparison=outcome.comparison,
        case=case.description if case else None,
        divergent_node=node,
    )


def find_divergence(
    candidate: Path,
    baseline: Path,
    *,
    criteria: Criteria,
    case_source: CaseSource | None = None,
    progress: Progress,
) -> Divergence:
    """Find the node at which the ONNX file `candidate` diverges from the ONNX file `baseline`; tensors are matched by name."""
    own, other, interface = match_interfaces(onnx_candidate(candidate), onnx_candidate(baseline))
    cases = (case_source or CaseSource()).bind(own, other, interface)

    def compare(candidate: Candidate, cases: Cases) -> Comparison:
        return compare_cases(cases, candidate, other, interface, criteria=criteria.of_any_share(), progress=progress)

    result = compare(own, cases)
    case, node = (None, None) if result.met else _first_divergence(baseline, candidate, cases, compare, criteria)
    if result.met:
        message = f"`{candidate}` meets the criteria against `{baseline}`"
    else:
        location = _format_location(node) or ", but no tensor with a common name shows where"
        message = f"`{candidate}` diverges from `{baseline}`{location}"
    return Divergence(
        after_pass=None,
        pass_number=None,
        message=f"{message}; there are no passes to blame",
        comparison=result,
        case=case.description if case else None,
        divergent_node=node,
    )


def _replay(
    source: Path,
    passes: Sequence[Pass],
    context: PassContext,
    properties: Iterable[Property],
    folder: Path,
    compare: Callable[[Candidate], Comparison],
) -> _DivergenceFound | Path:
    """Run `passes` until a graph does not meet the criteria.

    Returns the divergence, or the path of the last graph if the criteria are met after every pass.
    """
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.save import save_to_store

    before = source
    pass_numbers = itertools.count(1)

    def on_pass_end(pass_record: PassRecord, model: ir.Model) -> None:
        nonlocal before
        pass_number = next(pass_numbers)
        if pass_record.outcome != "changed":
            return
        after = folder / f"{pass_number}.onnx"
        save_to_store(model, after, folder / "weights", threshold_bytes=EXTERNAL_WEIGHT_BYTES, check=False)
        comparison = compare(onnx_candidate(after))
        if not comparison.met:
            raise _DivergenceFound(pass_record, pass_number, before, after, comparison)
        before = after

    try:
        pass_manager.run_passes(load(source), passes, context, properties, on_pass_end=on_pass_end)
    except _DivergenceFound as divergence:
        return divergence
    return before


def _only(case: GridCase) -> Cases:
    return Cases(make=lambda: iter((case,)), sizes=(1,))


def _first_divergence(
    before: Path,
    after: Path,
    cases: Cases,
    compare: Callable[[Candidate, Cases], Comparison],
    criteria: Criteria,
) -> tuple[GridCase | None, DivergentNode | None]:
    """Return the first case in which `after` fails, and the node at which it diverges from `before` in that case."""
    candidate = onnx_candidate(after)
    case = next((case for case in cases if not compare(candidate, _only(case)).met), None)
    if case is None:
        return None, None
    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        return case, _find_divergent_node(
            before, after, case, criteria, folder=Path(folder), baseline_label=f"the same tensor in `{before.name}`"
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
    baseline_label: str = "the same tensor before the pass",
) -> DivergentNode | None:
    """Return the node of `after` at which the chain of differences that reaches an output starts, or None."""
    from ryzen_compile.ir.load import load

    model = load(after)
    differences = tensor_differences(
        load(before), model, case.inputs, criteria=criteria, folder=folder or after.parent, baseline_label=baseline_label
    )
    start = _first_divergent_value(model, differences)
    if start is None:
        return None
    node = start.producer()
    unmeasured = [producer for producer in _unmeasured_producers(start, differences) if producer is not node]
    return DivergentNode(
        node=(node.name if node else None) or "a node without a name",
        op_type=node.op_type if node else "",
        tensor=start.name or "",
        message=differences[start.name or ""].message,
        unmeasured_nodes=tuple(f"{producer.name} ({producer.op_type})" for producer in unmeasured),
    )


def _first_divergent_value(model: ir.Model, differences: Mapping[str, TensorDifference]) -> ir.Value | None:
    """Return the earliest differing tensor that is connected to an output by a chain of differing tensors."""
    order = {node: index for index, node in enumerate(model.graph)}
    chain = [value for value in model.graph.outputs if _differs(value, differences)]
    visited = set(chain)
    for value in chain:  # the list grows during the iteration
        for producer in _measured_producers(value, differences):
            if producer not in visited and _differs(producer, differences):
                visited.add(producer)
                chain.append(producer)
    return min(chain, key=lambda value: order.get(value.producer(), -1), default=None)  # type: ignore[arg-type]


def _differs(value: ir.Value, differences: Mapping[str, TensorDifference]) -> bool:
    difference = differences.get(value.name or "")
    return difference is not None and not difference.met


def _measured_producers(value: ir.Value, differences: Mapping[str, TensorDifference]) -> list[ir.Value]:
    """Return the nearest measured tensors from which `value` is computed."""
    return [source for source in _walk_back(value, differences) if (source.name or "") in differences]


def _unmeasured_producers(value: ir.Value, differences: Mapping[str, TensorDifference]) -> list[ir.Node]:
    """Return the nodes between `value` and the nearest measured tensors from which it is computed."""
    nodes = [source.producer() for source in _walk_back(value, differences) if (source.name or "") not in differences]
    return list(dict.fromkeys(node for node in nodes if node is not None))


def _walk_back(value: ir.Value, differences: Mapping[str, TensorDifference]) -> Iterator[ir.Value]:
    """Yield the tensors from which `value` is computed, up to and including the nearest measured ones."""
    from ryzen_compile.ir.traversal import nested_graphs, node_subgraphs

    visited = {value}
    pending = [value]
    while pending:
        node = pending.pop().producer()
        if node is None:
            continue
        subgraph_inputs = (
            source
            for subgraph in node_subgraphs(node)
            for graph in nested_graphs(subgraph)
            for inner_node in graph
            for source in inner_node.inputs
        )
        for source in itertools.chain(node.inputs, subgraph_inputs):
            if source is None or source in visited:
                continue
            visited.add(source)
            yield source
            if (source.name or "") not in differences:
                pending.append(source)
