"""Splicing: nodes put behind a value, and values given new names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

_FALLBACK_OPSET = 13
"""An opset that any reader of models knows, and in which all types can be cast."""


def insert_after(value: ir.Value, nodes: Sequence[ir.Node], graph: ir.Graph) -> None:
    """Put `nodes` right behind where `value` is made: its node, or the start of `graph` where it has none."""
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
    elif (first := next(iter(graph), None)) is not None:
        graph.insert_before(first, nodes)
    else:
        graph.extend(nodes)


class NameAllocator:
    """The names that a model has, so that new ones differ from all of them."""

    def __init__(self, model: ir.Model) -> None:
        self.used: set[str] = set()
        self.counts: dict[str, int] = {}
        for function in (model.graph, *(function.graph for function in model.functions.values())):
            for graph in (function, *function.subgraphs()):
                values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
                self.used.update(value.name or "" for value in values)
                self.used.update(node.name or "" for node in graph)

    def allocate(self, name: str) -> str:
        """Return `name`, with a number behind it where it is taken, and take it."""
        found = name
        while found in self.used:
            self.counts[name] = self.counts.get(name, 1) + 1
            found = f"{name}_{self.counts[name]}"
        self.used.add(found)
        return found


def ensure_standard_opset(model: ir.Model) -> None:
    """Let `model` hold ops of ONNX's default domain, where it holds none so far."""
    if not model.graph.opset_imports.keys() & {"", "ai.onnx"}:
        model.graph.opset_imports[""] = _FALLBACK_OPSET


def make_cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    """Return a new node that casts `value` to `dtype`; it and what it gives are called `name`."""
    node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=name)
    given = node.outputs[0]
    given.name, given.shape, given.type = name, value.shape, ir.TensorType(dtype)
    return node


def remove_noop_casts(graph: ir.Graph, nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """Remove those of `nodes` that cast a tensor of `graph` to the type that it has, and return them."""
    dropped = []
    for node in nodes:
        if node.op_type != "Cast" or node.domain not in ("", "ai.onnx") or node.graph is not graph:
            continue
        given, made = node.inputs[0], node.outputs[0]
        if given is not None and given.dtype is not None and given.dtype == made.dtype and not made.is_graph_output():
            made.replace_all_uses_with(given)
            graph.remove(node, safe=True)
            dropped.append(node)
    return dropped
