"""Branch coverage: a graph that computes which branches and loop bodies of a model run, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.analysis.control_flow import Branch, find_branches
from ryzen_compile.ir.edit.insertion import NameAllocator

MIN_OPSET = 9
"""The oldest opset whose branches can be followed."""
COVERAGE_OUTPUT = "ryzen_compile_branches"
"""The name of the output, (branches,) bool."""


def branch_coverage_graph(model: ir.Model) -> tuple[ir.Model, list[Branch]]:
    """Return a copy of `model` whose only output states for each branch whether it runs, and the branches in its order.

    The copy contains only what the conditions depend on. The bodies of a Loop or Scan are complete; the branches of an If
    compute what is needed of them. Raises ModelError for an opset older than 9, which has no constants of bools.
    """
    opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx"))
    if opset is not None and opset < MIN_OPSET:
        raise ModelError(f"the opset of the model is {opset}, expected at least {MIN_OPSET}")
    copy = model.clone()
    if copy.functions:
        copy = InlinePass()(copy).model
    branches = find_branches(copy)
    instrumentation = _Instrumentation(copy, branches)
    output = instrumentation.instrument(copy.graph, None)
    output.name = COVERAGE_OUTPUT
    copy.graph.outputs.clear()
    copy.graph.outputs.append(output)
    for _ in range(1 + max((_depth(branch, branches) for branch in branches), default=0)):
        RemoveUnusedNodesPass()(copy)
        _drop_unused_branch_outputs(copy.graph)
    RemoveUnusedNodesPass()(copy)
    return copy, branches


def _depth(branch: Branch, branches: Sequence[Branch]) -> int:
    return 1 if branch.parent is None else 1 + _depth(branches[branch.parent], branches)


class _Instrumentation:
    """Adds a vector of bools to each graph: which branches ran in it."""

    def __init__(self, model: ir.Model, branches: Sequence[Branch]) -> None:
        self._names = NameAllocator(model)
        self._index = {branch.graph: index for index, branch in enumerate(branches)}
        self._size = len(branches)

    def instrument(self, graph: ir.Graph, own: int | None) -> ir.Value:
        """Return the coverage of `graph`, in which the branch `own` itself has run."""
        coverage = self._constant(graph, own)
        for node in list(graph):
            subgraphs = [
                attribute.as_graph()
                for attribute in node.attributes.values()
                if attribute.type == ir.AttributeType.GRAPH and attribute.as_graph() in self._index
            ]
            if subgraphs:
                coverage = self._or(graph, coverage, self._instrument_node(graph, node, subgraphs))
        return coverage

    def _instrument_node(self, graph: ir.Graph, node: ir.Node, subgraphs: Sequence[ir.Graph]) -> ir.Value:
        """Return the coverage of the branches of `node`, as an additional output of it."""
        inner = [self.instrument(subgraph, self._index[subgraph]) for subgraph in subgraphs]
        if node.op_type == "If":
            for subgraph, coverage in zip(subgraphs, inner, strict=True):
                subgraph.outputs.append(coverage)
            node.resize_outputs(len(node.outputs) + 1)
            return self._typed(node.outputs[-1])
        # The coverage is one more carried state, after the others.
        [body], [ran] = subgraphs, inner
        is_loop = node.op_type == "Loop"
        states = len(node.inputs) - (2 if is_loop else node.attributes["num_scan_inputs"].as_int())
        position = states + (2 if is_loop else 0)
        before = self._typed(ir.Value())
        body.inputs.insert(position, before)
        body.outputs.insert(states + (1 if is_loop else 0), self._or(body, before, ran))
        inputs = [*node.inputs[:position], self._constant(graph, None), *node.inputs[position:]]
        outputs = [*range(states), None, *range(states, len(node.outputs))]
        return self._typed(_rebuild(graph, node, inputs, outputs).outputs[states])

    def _constant(self, graph: ir.Graph, index: int | None) -> ir.Value:
        """Insert the coverage of the branch `index` alone, or of nothing, at the start of `graph`."""
        array = np.arange(self._size) == index if index is not None else np.zeros(self._size, bool)
        node = ir.node("Constant", [], {"value": ir.tensor(array)}, name=self._names.allocate(f"{COVERAGE_OUTPUT}_constant"))
        first = next(iter(graph), None)
        if first is None:
            graph.append(node)
        else:
            graph.insert_before(first, node)
        return self._typed(node.outputs[0])

    def _or(self, graph: ir.Graph, left: ir.Value, right: ir.Value) -> ir.Value:
        node = ir.node("Or", [left, right], name=self._names.allocate(f"{COVERAGE_OUTPUT}_or"))
        graph.append(node)
        return self._typed(node.outputs[0])

    def _typed(self, value: ir.Value) -> ir.Value:
        value.name = self._names.allocate(f"{COVERAGE_OUTPUT}_of_graph")
        value.type, value.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([self._size])
        return value


def _rebuild(graph: ir.Graph, node: ir.Node, inputs: Sequence[ir.Value | None], outputs: Sequence[int | None]) -> ir.Node:
    """Replace `node` by one with these inputs and outputs, each an index of its outputs or None for a new one."""
    new = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        attributes=list(node.attributes.values()),
        num_outputs=len(outputs),
        name=node.name,
    )
    graph.insert_before(node, new)
    for index, value in zip(outputs, new.outputs, strict=True):
        if index is not None:
            old = node.outputs[index]
            value.name, value.type, value.shape = old.name, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return new


def _drop_unused_branch_outputs(graph: ir.Graph) -> None:
    """Remove the outputs of every If that nothing reads."""
    for node in list(graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _drop_unused_branch_outputs(attribute.as_graph())
        used = [index for index, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
        if node.op_type != "If" or node.domain not in ("", "ai.onnx") or not used or len(used) == len(node.outputs):
            continue
        for attribute in node.attributes.values():
            branch = attribute.as_graph()
            kept = [branch.outputs[index] for index in used]
            branch.outputs.clear()
            branch.outputs.extend(kept)
        _rebuild(graph, node, list(node.inputs), used)
