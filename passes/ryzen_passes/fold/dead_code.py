"""Dead code elimination: remove nodes, initializers, functions and opset imports that no output needs."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common

from ryzen_compile.ir.traversal import node_subgraphs, top_level_graphs
from ryzen_passes.fold.stats import FoldStats, node_label


def eliminate_dead_nodes(model: ir.Model, stats: FoldStats) -> None:
    """Remove the nodes and initializers of `model` that no output needs; graph inputs stay."""
    for graph in top_level_graphs(model):
        _eliminate_dead_nodes(graph, stats)


def eliminate_unused_declarations(model: ir.Model, stats: FoldStats) -> None:
    """Remove the functions that no node calls and the opset imports that no node needs."""
    functions = set(model.functions)
    if functions:
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    for domain, name, _ in functions - set(model.functions):
        stats.record_removed(f"function {domain}::{name}")
    for function in model.functions.values():
        _remove_unused_imports(function.opset_imports, {node.domain for node in function.all_nodes()}, stats)
    # A runtime that inlines a function resolves the domains of its body in the opset imports of the model.
    needed = {domain for function in model.functions.values() for domain in (function.domain, *function.opset_imports)}
    _remove_unused_imports(model.graph.opset_imports, needed | {node.domain for node in model.graph.all_nodes()}, stats)


def _remove_unused_imports(imports: dict[str, int], needed: set[str], stats: FoldStats) -> None:
    for domain in sorted(set(imports) - needed - {"", "ai.onnx"}):
        del imports[domain]
        stats.record_removed(f"opset import {domain}")


def _eliminate_dead_nodes(graph: ir.Graph, stats: FoldStats) -> None:
    dead: dict[ir.Node, None] = {}  # not a set: the pass log lists the nodes in this order
    for node in reversed(graph):
        inner_graphs = node_subgraphs(node)
        if all(_is_unused(output, dead) for output in node.outputs):
            dead[node] = None
            for inner_node in (inner_node for inner_graph in inner_graphs for inner_node in inner_graph.all_nodes()):
                inner_node.resize_inputs(0)  # its values from the outer scope may be unused now
        else:
            for inner_graph in inner_graphs:
                _eliminate_dead_nodes(inner_graph, stats)
    for node in reversed(dead):
        stats.record_removed(node_label(node))
    if dead:
        graph.remove(dead, safe=True)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]
            stats.record_removed(f"initializer {name}")


def _is_unused(value: ir.Value, dead: Mapping[ir.Node, None]) -> bool:
    return not value.is_graph_output() and all(use.node in dead for use in value.uses())
