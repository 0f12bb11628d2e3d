"""Insertion of nodes behind a value, allocation of unique names, and insertion and removal of Cast nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from ryzen_compile.ir.traversal import all_graphs

_FALLBACK_OPSET = 13
"""An opset that all runtimes support and in which Cast supports all types."""


def insert_after(value: ir.Value, nodes: Sequence[ir.Node], graph: ir.Graph) -> None:
    """Insert `nodes` directly after the producer of `value`, or at the start of `graph` if it has no producer."""
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
    elif (first := next(iter(graph), None)) is not None:
        graph.insert_before(first, nodes)
    else:
        graph.extend(nodes)


class NameAllocator:
    """Allocates names that are unique in a model."""

    def __init__(self, model: ir.Model) -> None:
        self.used: set[str] = set()
        self.counts: dict[str, int] = {}
        for graph in all_graphs(model):
            values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
            self.used.update(value.name or "" for value in values)
            self.used.update(node.name or "" for node in graph)

    def allocate(self, name: str) -> str:
        """Return `name`, with a number appended if it is in use, and mark the result as used."""
        unique = name
        while unique in self.used:
            self.counts[name] = self.counts.get(name, 1) + 1
            unique = f"{name}_{self.counts[name]}"
        self.used.add(unique)
        return unique


def ensure_standard_opset(model: ir.Model) -> None:
    """Add an opset import of the default ONNX domain to `model` if it has none."""
    if not model.graph.opset_imports.keys() & {"", "ai.onnx"}:
        model.graph.opset_imports[""] = _FALLBACK_OPSET


def make_cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    """Return a new node that casts `value` to `dtype`; the node and its output are named `name`."""
    node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=name)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(dtype)
    return node


def remove_noop_casts(graph: ir.Graph, nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """Remove and return those of `nodes` that cast a tensor of `graph` to its own element type."""
    removed = []
    for node in nodes:
        if node.op_type != "Cast" or node.domain not in ("", "ai.onnx") or node.graph is not graph:
            continue
        source, output = node.inputs[0], node.outputs[0]
        if source is not None and source.dtype is not None and source.dtype == output.dtype and not output.is_graph_output():
            output.replace_all_uses_with(source)
            graph.remove(node, safe=True)
            removed.append(node)
    return removed
