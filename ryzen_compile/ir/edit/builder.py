"""Construction of nodes in an existing graph, replacement of values, and removal of dead nodes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import ElementTypes, element_types
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.edit.insertion import NameAllocator


class ModelInfo:
    """Lazily computed shapes, element types and names of a model while it is rewritten."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.shapes = ShapeInference()

    @functools.cached_property
    def types(self) -> ElementTypes:
        """The element type of every tensor."""
        return element_types(self.model)

    @functools.cached_property
    def names(self) -> NameAllocator:
        """The names in use."""
        return NameAllocator(self.model)


class NodeBuilder:
    """Adds nodes to a graph; every new tensor gets a unique name and an element type."""

    def __init__(self, graph: ir.Graph, model_info: ModelInfo) -> None:
        self.graph, self.types, self.names = graph, model_info.types, model_info.names
        self.inserted: list[str] = []
        self._constants: dict[tuple[bytes, ir.DataType, tuple[int, ...]], ir.Value] = {}

    def op(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        name: str | None = None,
        name_prefix: str | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Insert a node with one output before `before` and return the output.

        The output has the element type of the first input unless `dtype` is given. With `name`, the node replaces a node of
        that name and is not added to `inserted`. Without `name`, the node has a unique name that begins with `name_prefix` or
        with the name of `before`; with its op type if it has no name.
        """
        if name is None:
            name = self.names.allocate(f"{name_prefix or before.name or before.op_type.lower()}_{op_type.lower()}")
            self.inserted.append(name)
        node = ir.node(op_type, inputs, attributes, domain=domain, name=name)
        self.graph.insert_before(before, node)
        first_input = inputs[0] if inputs else None
        output = node.outputs[0]
        output.name, output.shape = self.names.allocate(f"{name}_output"), shape
        output_dtype = dtype if dtype is not None else self.types.get(first_input) if first_input is not None else None
        if output_dtype is not None:
            output.type = ir.TensorType(output_dtype)
            self.types[output] = output_dtype
        return output

    def insert_node(self, before: ir.Node, node: ir.Node, dtypes: Sequence[ir.DataType]) -> Sequence[ir.Value]:
        """Insert `node` before `before`, give each output a unique name and its type in `dtypes`, and return the outputs."""
        self.graph.insert_before(before, node)
        self.inserted.append(node.name or "")
        for value, dtype in zip(node.outputs, dtypes, strict=True):
            value.name = self.names.allocate(f"{node.name}_output")
            value.type = ir.TensorType(dtype)
            self.types[value] = dtype
        return node.outputs

    def soft_cap(
        self, before: ir.Node, scores: ir.Value, limit: float, dtype: ir.DataType, *, name_prefix: str | None = None
    ) -> ir.Value:
        """Insert the nodes of limit * tanh(scores / limit), computed in `dtype`, before `before` and return their result."""
        bound = self.scalar(limit, dtype)
        ratio = self.op(before, "Div", [scores, bound], name_prefix=name_prefix)
        tanh = self.op(before, "Tanh", [ratio], name_prefix=name_prefix)
        return self.op(before, "Mul", [tanh, bound], name_prefix=name_prefix)

    def split(self, before: ir.Node, value: ir.Value, sizes: Sequence[int], *, axis: int = 1) -> list[ir.Value]:
        """Split `value` into parts of these `sizes` along `axis`; return `[value]` for one part."""
        if len(sizes) == 1:
            return [value]
        name = self.names.allocate(f"{before.name or before.op_type.lower()}_split")
        node = ir.node("Split", [value, self.int64_vector(*sizes)], {"axis": axis}, num_outputs=len(sizes), name=name)
        parts = list(self.insert_node(before, node, [self.types[value]] * len(sizes)))
        for part, size in zip(parts, sizes, strict=True):
            if value.shape is not None:
                part.shape = ir.Shape((*value.shape.dims[:axis], size, *value.shape.dims[axis + 1 :]))
        return parts

    def constant(self, array: np.ndarray[Any, Any], dtype: ir.DataType) -> ir.Value:
        """Return an initializer with the values of `array` as `dtype`; equal constants share one initializer."""
        tensor = ir.Tensor(array.astype(dtype.numpy()), dtype=dtype)
        key = (tensor.tobytes(), dtype, array.shape)
        if key not in self._constants:
            name = self.names.allocate(f"{'x'.join(map(str, array.reshape(-1)[:4]))}_{dtype.name.lower()}")
            value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape(array.shape))
            self.graph.register_initializer(value)
            self.types[value] = dtype
            self._constants[key] = value
        return self._constants[key]

    def scalar(self, value: float, dtype: ir.DataType) -> ir.Value:
        """Return an initializer of rank 0."""
        return self.constant(np.array(value), dtype)

    def int64_vector(self, *values: int) -> ir.Value:
        """Return an int64 initializer of rank 1."""
        return self.constant(np.array(values, np.int64), ir.DataType.INT64)


def next_node(graph: ir.Graph, node: ir.Node | None) -> ir.Node:
    """Return the node after `node` in the order of the graph, or the first node if `node` is None."""
    nodes = list(graph)
    return nodes[nodes.index(node) + 1 if node is not None else 0]


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Replace all uses of `old` with `new` and give `new` its name; the producer of `old` is then dead."""
    name = old.name
    new.shape = old.shape if old.shape is not None else new.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = ""  # an output that is not used
    new.name = name


def remove_dead_nodes(candidates: Sequence[ir.Node]) -> list[str]:
    """Remove the unused nodes among `candidates`, and the nodes and weights that only they used; return the nodes' names."""
    removed, pending = [], list(candidates)
    while pending:
        node = pending.pop()
        if node.graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        removed.append(node.name or node.op_type)
        node.graph.remove(node, safe=True)
        for value in inputs:
            graph, producer = value.graph, value.producer()
            if producer is not None:
                pending.append(producer)
            elif (
                graph is not None
                and value.is_initializer()
                and not (value.uses() or value.is_graph_input() or value.is_graph_output())
            ):
                del graph.initializers[value.name]  # type: ignore[arg-type]
    return removed
