"""Dropping what no output needs: nodes, initializers, functions, opset imports."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common

from ryzen_passes.fold.node_inputs import subgraphs
from ryzen_passes.fold.stats import FoldStats, node_label


def eliminate_dead_nodes(model: ir.Model, stats: FoldStats) -> None:
    """Drop the nodes and initializers of `model` that no output needs. Inputs stay, used or not."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        _eliminate_dead_nodes(graph, stats)


def eliminate_unused_declarations(model: ir.Model, stats: FoldStats) -> None:
    """Drop the functions that nothing calls and the opset imports that nothing needs."""
    functions = set(model.functions)
    if functions:
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    for domain, name, _ in functions - set(model.functions):
        stats.record_removed(f"function {domain}::{name}")
    for function in model.functions.values():
        _remove_unused_imports(function.opset_imports, {node.domain for node in function.all_nodes()}, stats)
    # A runtime that inlines a function looks for the domains of its body among those of the model.
    needed = {domain for function in model.functions.values() for domain in (function.domain, *function.opset_imports)}
    _remove_unused_imports(model.graph.opset_imports, needed | {node.domain for node in model.graph.all_nodes()}, stats)


def _remove_unused_imports(imports: dict[str, int], needed: set[str], stats: FoldStats) -> None:
    for domain in sorted(set(imports) - needed - {"", "ai.onnx"}):
        del imports[domain]
        stats.record_removed(f"opset import {domain}")


def _eliminate_dead_nodes(graph: ir.Graph, stats: FoldStats) -> None:
    dead: dict[ir.Node, None] = {}  # not a set: the order goes into the record
    for node in reversed(graph):
        inner = subgraphs(node)
        if all(_is_unused(output, dead) for output in node.outputs):
            dead[node] = None
            for user in (user for graph_ in inner for user in graph_.all_nodes()):
                user.resize_inputs(0)  # what it took from around it may now be unused
        else:
            for graph_ in inner:
                _eliminate_dead_nodes(graph_, stats)
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
