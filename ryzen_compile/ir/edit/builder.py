"""Writing nodes into a graph, in front of a node that stands there."""

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
    """What is known of the tensors of a model while it is rewritten."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.shapes = ShapeInference()

    @functools.cached_property
    def types(self) -> ElementTypes:
        """The element type of every tensor."""
        return element_types(self.model)

    @functools.cached_property
    def names(self) -> NameAllocator:
        """The names that are taken."""
        return NameAllocator(self.model)


class NodeBuilder:
    """Adds nodes of one output to one graph; every tensor that it makes has a new name and an element type."""

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
        """Insert a node in front of `before` and return its output, of the type of the first input unless `dtype` is given.

        With `name` it is to take the place of a node of that name, and is not counted among those `written`. Without, its name
        begins with `stem`, or with that of `before`.
        """
        if name is None:
            name = self.names.allocate(f"{name_prefix or before.name or 'attention'}_{op_type.lower()}")
            self.inserted.append(name)
        node = ir.node(op_type, inputs, attributes, domain=domain, name=name)
        self.graph.insert_before(before, node)
        first = inputs[0] if inputs else None
        made = node.outputs[0]
        made.name, made.shape = self.names.allocate(f"{name}_output"), shape
        found = dtype if dtype is not None else self.types.get(first) if first is not None else None
        if found is not None:
            made.type = ir.TensorType(found)
            self.types[made] = found
        return made

    def insert_node(self, before: ir.Node, node: ir.Node, dtypes: Sequence[ir.DataType]) -> Sequence[ir.Value]:
        """Insert `node`, of any number of outputs, in front of `before` and return them, named and of the types `dtypes`."""
        self.graph.insert_before(before, node)
        self.inserted.append(node.name or "")
        for value, dtype in zip(node.outputs, dtypes, strict=True):
            value.name = self.names.allocate(f"{node.name}_output")
            value.type = ir.TensorType(dtype)
            self.types[value] = dtype
        return node.outputs

    def split(self, before: ir.Node, value: ir.Value, sizes: Sequence[int], *, axis: int = 1) -> list[ir.Value]:
        """Return the parts of `value`, of these sizes along `axis`; `value` itself where there is but one."""
        if len(sizes) == 1:
            return [value]
        name = self.names.allocate(f"{before.name or 'attention'}_split")
        node = ir.node("Split", [value, self.int64_vector(*sizes)], {"axis": axis}, num_outputs=len(sizes), name=name)
        parts = list(self.insert_node(before, node, [self.types[value]] * len(sizes)))
        for part, size in zip(parts, sizes, strict=True):
            if value.shape is not None:
                part.shape = ir.Shape((*value.shape.dims[:axis], size, *value.shape.dims[axis + 1 :]))
        return parts

    def constant(self, array: np.ndarray[Any, Any], dtype: ir.DataType) -> ir.Value:
        """Return an initializer that holds `array` as `dtype`."""
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
        """Return a scalar."""
        return self.constant(np.array(value), dtype)

    def int64_vector(self, *values: int) -> ir.Value:
        """Return a vector of int64."""
        return self.constant(np.array(values, np.int64), ir.DataType.INT64)


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand wherever `old` did, under its name; what makes `old` is then dead."""
    name, old_name = old.name, f"{old.name}_was"
    new.shape = old.shape if old.shape is not None else new.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = old_name
    new.name = name


def remove_dead_nodes(candidates: Sequence[ir.Node]) -> list[str]:
    """Remove those of `start` that nothing uses, and the nodes and weights that only they used; return the nodes' names."""
    removed, queue = [], list(candidates)
    while queue:
        node = queue.pop()
        if node.graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        removed.append(node.name or node.op_type)
        node.graph.remove(node, safe=True)
        for value in inputs:
            holder, maker = value.graph, value.producer()
            if maker is not None:
                queue.append(maker)
            elif (
                holder is not None
                and value.is_initializer()
                and not (value.uses() or value.is_graph_input() or value.is_graph_output())
            ):
                del holder.initializers[value.name]  # type: ignore[arg-type]
    return removed


def replace_model(model: ir.Model, replacement: ir.Model) -> None:
    """Let `model` be what its clone `copy` was made."""
    model.graph = replacement.graph
    model.ir_version = replacement.ir_version
    model.functions.clear()
    model.functions.update(replacement.functions)
    model.metadata_props.clear()
    model.metadata_props.update(replacement.metadata_props)
