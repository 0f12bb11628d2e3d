"""Control flow of a model: its branches and loop bodies, and the inputs whose values determine which of them run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_scalar
from ryzen_compile.ir.analysis.op_traits import COMPARISON_OPS
from ryzen_compile.ir.traversal import all_graphs, attribute_graphs, node_subgraphs
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import InputSpec, Interface

CONTROL_FLOW_OPS = frozenset({"If", "Loop", "Scan"})
"""Ops with branches or a body."""
_MAX_TRACED_VALUES = 10_000
"""The maximum number of values that are followed from one condition."""
MAX_COMBINATIONS = 16
"""The maximum number of combinations of values to try."""
_MAX_RANGE = 64
"""The largest declared range whose maximum is tried."""
_MAX_COUNT, _MAX_NUMBER = 1_000, 1_000_000
"""The largest value that is tried for a trip count, and for another number, which may be a size."""
_SEVERAL = 3
"""A trip count of several iterations."""


@dataclass(frozen=True)
class Branch:
    """A branch of an If, or the body of a Loop or Scan."""

    graph: ir.Graph
    description: str
    """`then branch of If `route``."""
    parent: int | None
    """The index of the branch that contains it; None: the main graph does."""


def has_control_flow(model: ir.Model) -> bool:
    """Return whether the model contains an If, a Loop or a Scan."""
    return any(_is_control_flow(node) for graph in all_graphs(model) for node in graph)


def find_branches(model: ir.Model) -> list[Branch]:
    """Return the branches and bodies of the main graph of `model`, each after the one that contains it."""
    branches: list[Branch] = []
    _add_branches(model.graph, None, branches)
    return branches


def find_control_values(model: ir.Model, interface: Interface, *, loops: bool = True) -> dict[str, tuple[int, ...]]:
    """Return the values to try for each input that determines which branches run and, with `loops`, how often a body runs.

    These are inputs of integers and bools that reach the condition of an If, or the condition or the trip count of a Loop, and
    hold no ids of several tokens, no masks and no positions. The values of a bool are 0 and 1. Those of an integer are the ends
    of its range, 0, 1 and 3 for a trip count, and the neighbors of numbers with which it is compared, within its range. An
    input whose values are all too large to try is left out.
    """
    sources = _body_input_sources(model)
    specs = {spec.name: spec for spec in interface.inputs if _is_control_spec(spec)}
    values: dict[str, set[int]] = {}
    counts: set[str] = set()
    for value, is_count in _conditions(model, loops=loops):
        inputs, numbers = _trace(value, sources)
        candidates = {number + offset for number in numbers for offset in (-1, 0, 1)} | (
            {0, 1, _SEVERAL} if is_count else {0, 1}
        )
        counts |= inputs if is_count else set()
        for name in inputs & specs.keys():
            values.setdefault(name, set()).update(_values_within(specs[name], candidates))
    largest = {name: _MAX_COUNT if name in counts else _MAX_NUMBER for name in values}
    return {
        name: small
        for name, found in sorted(values.items())
        if (small := tuple(sorted(number for number in found if abs(number) <= largest[name])))
    }


def combinations_of(values: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """Return combinations of one value for each input.

    All combinations, if there are at most `MAX_COMBINATIONS`; otherwise as many in which every value occurs, as far as they
    suffice.
    """
    if not values:
        return []
    if math.prod(map(len, values.values())) <= MAX_COMBINATIONS:
        return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    count = min(MAX_COMBINATIONS, max(map(len, values.values())))
    return [{name: found[index % len(found)] for name, found in values.items()} for index in range(count)]


def _is_control_flow(node: ir.Node) -> bool:
    return node.op_type in CONTROL_FLOW_OPS and node.domain in ("", "ai.onnx")


def _add_branches(graph: ir.Graph, parent: int | None, branches: list[Branch]) -> None:
    for node in graph:
        if not _is_control_flow(node):
            continue
        output = next((value.name for value in node.outputs if value.name), "")
        label = f"{node.op_type} `{node.name}`" if node.name else f"the {node.op_type} of `{output}`"
        for name, attribute in sorted(node.attributes.items(), reverse=True):  # then_branch before else_branch
            if attribute.type != ir.AttributeType.GRAPH:
                continue
            description = f"{name.replace('_', ' ') if node.op_type == 'If' else 'body'} of {label}"
            for subgraph in attribute_graphs(attribute):
                branches.append(Branch(subgraph, description, parent))
                _add_branches(subgraph, len(branches) - 1, branches)


def _conditions(model: ir.Model, *, loops: bool) -> Iterator[tuple[ir.Value, bool]]:
    """Yield the values that determine what runs, and whether each is a trip count; without `loops`, the conditions of Ifs."""
    for graph in all_graphs(model):
        for node in graph:
            if not _is_control_flow(node) or node.op_type == "Scan" or (node.op_type == "Loop" and not loops):
                continue
            operands = [(node.inputs[0], node.op_type == "Loop")]
            if node.op_type == "Loop":
                operands += [(node.inputs[1], False), *((body.outputs[0], False) for body in node_subgraphs(node))]
            for value, is_count in operands:
                if value is not None:
                    yield value, is_count


def _body_input_sources(model: ir.Model) -> dict[ir.Value, list[ir.Value | None]]:
    """Return where each input of a body comes from: the inputs of its node, and the outputs of the body itself."""
    sources: dict[ir.Value, list[ir.Value | None]] = {}
    for graph in all_graphs(model):
        for node in graph:
            for body in node_subgraphs(node) if node.op_type in ("Loop", "Scan") else ():
                shift = 1 if node.op_type == "Loop" else 0
                for index, value in enumerate(body.inputs):
                    sources[value] = [
                        *node.inputs[index : index + 1],
                        *body.outputs[max(index - shift, 0) : index - shift + 1],
                    ]
    return sources


def _trace(value: ir.Value, sources: Mapping[ir.Value, Sequence[ir.Value | None]]) -> tuple[set[str], set[int]]:
    """Return the graph inputs that `value` depends on by their elements, and the numbers with which values are compared."""
    inputs, numbers = set[str](), set[int]()
    pending, visited = [value], {value}
    while pending and len(visited) <= _MAX_TRACED_VALUES:
        current = pending.pop()
        node = current.producer()
        operands: list[ir.Value | None] = []
        if current in sources:
            operands = list(sources[current])
        elif node is None:
            inputs.add(current.name or "")
        elif node.op_type not in ("Shape", "Size"):
            operands = [*node.inputs, *(output for graph in node_subgraphs(node) for output in graph.outputs)]
            if node.op_type in COMPARISON_OPS:
                constants = [constant_scalar(operand) for operand in node.inputs]
                numbers |= {math.floor(number) for number in constants if number is not None and math.isfinite(number)}
        for operand in operands:
            if operand is not None and operand not in visited:
                visited.add(operand)
                pending.append(operand)
    return inputs, numbers


def _is_control_spec(spec: InputSpec) -> bool:
    if spec.dtype != "bool" and not spec.dtype.startswith(("int", "uint")):
        return False
    is_single = spec.dims is not None and all(dim == 1 for dim in spec.dims)
    return spec.role == "values" or (spec.role == "ids" and is_single)


def _values_within(spec: InputSpec, candidates: set[int]) -> set[int]:
    if spec.dtype == "bool":
        return {number for number in (0, 1) if (spec.low or 0) <= number <= (1 if spec.high is None else spec.high)}
    low = 0 if spec.low is None else int(spec.low)
    if spec.low is None and spec.high is None and not spec.dtype.startswith("uint"):
        low = min([0, *candidates])
    high = max([low, *candidates]) if spec.high is None else int(spec.high)
    ends = {low, high} if spec.high is not None and high - low <= _MAX_RANGE else {low}
    representable = np.iinfo(numpy_dtype(spec.dtype))
    low, high = max(low, int(representable.min)), min(high, int(representable.max))
    return {number for number in candidates | ends if low <= number <= high}
