"""Traversal of the graphs of a model: the main graph, the bodies of its functions, and the subgraphs of control flow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

GRAPH_ATTRIBUTE_TYPES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


def attribute_graphs(attr: ir.Attr) -> Sequence[ir.Graph]:
    """Return the graphs that an attribute of a type in `GRAPH_ATTRIBUTE_TYPES` holds; empty for a reference attribute."""
    if attr.is_ref():
        return ()
    return (attr.value,) if attr.type == ir.AttributeType.GRAPH else tuple(attr.value)


def node_subgraphs(node: ir.Node) -> list[ir.Graph]:
    """Return the graphs that the attributes of `node` hold, without the subgraphs of their nodes."""
    return [
        graph
        for attribute in node.attributes.values()
        if attribute.type in GRAPH_ATTRIBUTE_TYPES
        for graph in attribute_graphs(attribute)
    ]


def nested_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """Yield `graph`, then its subgraphs at any depth."""
    yield graph
    yield from graph.subgraphs()


def top_level_graphs(model: ir.Model) -> tuple[ir.Graph, ...]:
    """Return the main graph of `model` and the body of each function, without subgraphs."""
    return (model.graph, *(function.graph for function in model.functions.values()))


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield every graph of `model`: each top-level graph, followed by its subgraphs at any depth."""
    for graph in top_level_graphs(model):
        yield from nested_graphs(graph)
