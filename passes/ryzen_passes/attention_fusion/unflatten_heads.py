"""Unflatten batch and head axes: rewrite attention over (batch*heads, rows, size) as attention over (batch, heads, rows, size).

Exporters write 3-D MatMuls between Reshapes that flatten the two axes and Reshapes that unflatten them. The nodes in between
are rewritten with 4-D tensors, and these Reshapes are removed. The matcher then finds the attention like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute, ints_attribute
from ryzen_compile.ir.analysis.dims import SymbolicDims
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value

_ELEMENTWISE_OPS = frozenset("Add Cast Div Identity Max Min Mul Neg Sub Tanh Where".split())


@dataclass(frozen=True)
class _UnflattenedTensor:
    """The 4-D form of a tensor (batch*heads, rows, size)."""

    dims: SymbolicDims
    """(batch, heads, rows, size)."""
    emit: Callable[[], ir.Value]
    """Insert the nodes that compute it; return the 4-D value."""
    is_view: bool = False
    """Whether it is a view of an existing tensor with separate batch and head axes."""
    emitted: list[ir.Value] = field(default_factory=list)
    """The value that `emit` returned; empty before the first call of `materialize`."""

    def materialize(self) -> ir.Value:
        """Return the 4-D value; the first call inserts its nodes."""
        if not self.emitted:
            self.emitted.append(self.emit())
        return self.emitted[0]


class HeadUnflattener:
    """Unflattens the batch and head axes in one graph."""

    def __init__(self, graph: ir.Graph, model_info: ModelInfo) -> None:
        self.graph, self.shapes, self.types = graph, model_info.shapes, model_info.types
        self.writer = NodeBuilder(graph, model_info)
        self.removed: list[str] = []
        self._unflattened: dict[ir.Value, _UnflattenedTensor] = {}
        self._unflatten_nodes: dict[ir.Node, _UnflattenedTensor] = {}
        self._found: list[ir.Node] = []
        self._inner_cache: dict[ir.Value, bool] = {}

    def find(self) -> bool:
        """Find the pairs of flattening and unflattening Reshapes; return whether there are any. The graph is unchanged."""
        if not self._may_apply():
            return False
        for node in self.graph:
            if node.domain == "" and node.inputs and node.inputs[0] is not None:
                self._record_node(node, node.inputs[0])
        self._found = [
            node
            for node in self._unflatten_nodes
            if all(self._is_read_unflattened_only(value) for value in self._unflattened_producers(node.inputs[0]))
        ]
        return bool(self._found)

    def _may_apply(self) -> bool:
        """Return whether the graph has a 3-D MatMul, a 3-D Reshape and a 4-D Reshape, without which there are no pairs."""
        ops = {
            (node.op_type, self.shapes.rank(node.outputs[0])) for node in self.graph if node.op_type in ("MatMul", "Reshape")
        }
        return {("MatMul", 3), ("Reshape", 3), ("Reshape", 4)} <= ops

    def run(self) -> None:
        """Rewrite the nodes between the pairs that `find` found, in place."""
        unflatten_nodes = [*self._found]
        for node in unflatten_nodes:
            old, new = node.outputs[0], self._unflatten_nodes[node].materialize()
            old.shape = new.shape if new.shape is not None else old.shape
            replace_value(old, new)
        for value, unflattened in self._unflattened.items():
            if unflattened.emitted and not unflattened.is_view:
                unflatten_nodes += self._rewrite_shape_reads(value, unflattened.emitted[0])
        self.removed = remove_dead_nodes(unflatten_nodes)

    # Analysis

    def _record_node(self, node: ir.Node, first: ir.Value) -> None:
        """Record the 4-D form of the output of `node`, or that `node` is a Reshape that unflattens."""
        output, unflattened = node.outputs[0], self._unflattened.get(first)
        if node.op_type == "Tile":
            self._record_tile(node, first)
        elif node.op_type == "Reshape" and unflattened is None:
            self._record_flatten(node, first)
        elif node.op_type == "Reshape" and unflattened is not None:
            input_dims, output_dims = self.shapes.dims(first), self.shapes.dims(output)
            if (
                input_dims is not None
                and output_dims is not None
                and len(output_dims) == 4
                and output_dims[:2] == unflattened.dims[:2]
            ):
                # The element count is equal, so if one of the last two dims matches, the other matches too.
                self._unflatten_nodes |= (
                    {node: unflattened} if input_dims[1] == output_dims[2] or input_dims[2] == output_dims[3] else {}
                )
        elif (dims := self._unflattened_dims(node)) is not None:
            self._unflattened[output] = _UnflattenedTensor(dims, lambda: self._write_unflattened(node, dims))

    def _record_flatten(self, node: ir.Node, source: ir.Value) -> None:
        """Record a Reshape of (batch, heads, rows, size), or (batch, heads, size) with 1 row, to (batch*heads, rows, size)."""
        output = node.outputs[0]
        input_dims, output_dims = self.shapes.dims(source), self.shapes.dims(output)
        if input_dims is None or output_dims is None or len(output_dims) != 3 or not isinstance(input_dims[1], int):
            return
        if len(input_dims) == 4 and input_dims[2:] == output_dims[1:]:
            self._unflattened[output] = _UnflattenedTensor(input_dims, lambda: _first_input(node), is_view=True)
        elif len(input_dims) == 3 and output_dims[1] == 1 and input_dims[2] == output_dims[2] and input_dims[1] != 1:
            dims = (*input_dims[:2], 1, input_dims[2])

            def emit_unsqueezed() -> ir.Value:
                return self.writer.op(
                    node, "Unsqueeze", [_first_input(node), self.writer.int64_vector(2)], shape=self.shapes.shape_of(dims)
                )

            self._unflattened[output] = _UnflattenedTensor(dims, emit_unsqueezed, is_view=True)

    def _record_tile(self, node: ir.Node, source: ir.Value) -> None:
        """Record a Tile of (heads, rows, size) to (batch*heads, rows, size)."""
        repeats = node.inputs[1]
        input_dims, repeat_counts = self.shapes.dims(source), self.shapes.int_values(repeats) if repeats is not None else None
        if (
            input_dims is None
            or len(input_dims) != 3
            or not isinstance(input_dims[0], int)
            or repeat_counts is None
            or repeat_counts[1:] != (1, 1)
        ):
            return
        dims = (repeat_counts[0], *input_dims)

        def emit_tiled() -> ir.Value:
            unsqueezed = self.writer.op(node, "Unsqueeze", [_first_input(node), self.writer.int64_vector(0)])
            repeats_4d = self.writer.op(node, "Concat", [repeats, self.writer.int64_vector(1)], {"axis": 0})
            return self.writer.op(node, "Tile", [unsqueezed, repeats_4d], shape=self.shapes.shape_of(dims))

        self._unflattened[node.outputs[0]] = _UnflattenedTensor(dims, emit_tiled, is_view=True)

    def _unflattened_dims(self, node: ir.Node) -> SymbolicDims | None:
        """Return the 4-D dims of the output of `node`; None if `node` cannot be rewritten with 4-D tensors."""
        operand_dims = [
            self._unflattened[value].dims for value in node.inputs if value is not None and value in self._unflattened
        ]
        if not operand_dims or len({dims[:2] for dims in operand_dims}) > 1:
            return None
        batch_heads = operand_dims[0][:2]
        if node.op_type == "MatMul":
            return (*batch_heads, operand_dims[0][2], operand_dims[1][3]) if len(operand_dims) == 2 else None
        if node.op_type == "Transpose":
            is_swap = ints_attribute(node, "perm") == (0, 2, 1)
            return (*batch_heads, operand_dims[0][3], operand_dims[0][2]) if is_swap else None
        if node.op_type == "Softmax":
            return operand_dims[0] if int_attribute(node, "axis", -1) in (-1, 2) else None
        if node.op_type not in _ELEMENTWISE_OPS:
            return None
        other_dims = [self.shapes.dims(value) for value in node.inputs if value is not None and value not in self._unflattened]
        output_dims = self.shapes.dims(node.outputs[0])
        if (
            output_dims is None
            or len(output_dims) != 3
            or any(dims is None or len(dims) > 1 or set(dims) - {1} for dims in other_dims)
        ):
            return None
        return (*batch_heads, *output_dims[1:])

    # Rewrite

    def _unflattened_producers(self, value: ir.Value | None) -> list[ir.Value]:
        """Return `value` and the values it derives from that must be rewritten with it."""
        producers: dict[ir.Value, None] = {}
        worklist = [value]
        while worklist:
            current = worklist.pop()
            unflattened = self._unflattened.get(current) if current is not None else None
            if current is None or unflattened is None or unflattened.is_view or current in producers:
                continue
            producers[current] = None
            producer = current.producer()
            worklist += producer.inputs if producer is not None else ()
        return [*producers]

    def _is_read_unflattened_only(self, value: ir.Value) -> bool:
        """Return whether all consumers of `value` are rewritten too, so that it is not computed twice."""
        if value not in self._inner_cache:
            self._inner_cache[value] = not value.is_graph_output() and all(
                node in self._unflatten_nodes
                or node.op_type == "Shape"
                or (node.outputs[0] in self._unflattened and self._is_read_unflattened_only(node.outputs[0]))
                for node in value.consumers()
            )
        return self._inner_cache[value]

    def _write_unflattened(self, node: ir.Node, dims: SymbolicDims) -> ir.Value:
        """Insert the 4-D form of `node`; return its output."""
        inputs = [
            self._unflattened[value].materialize() if value is not None and value in self._unflattened else value
            for value in node.inputs
        ]
        attributes: dict[str, object] = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.op_type == "Transpose":
            attributes = {"perm": (0, 1, 3, 2)}
        elif node.op_type == "Softmax":
            attributes = {"axis": -1}
        return self.writer.op(
            node, node.op_type, inputs, attributes, dtype=self.types.get(node.outputs[0]), shape=self.shapes.shape_of(dims)
        )

    def _rewrite_shape_reads(self, flattened: ir.Value, unflattened: ir.Value) -> list[ir.Node]:
        """Rewrite Shape nodes of `flattened` to read the shape of `unflattened`; return the replaced nodes."""
        shape_nodes = [use.node for use in flattened.uses() if use.node.op_type == "Shape"]
        for node in shape_nodes:
            dims_4d = self.writer.op(node, "Shape", [unflattened], dtype=ir.DataType.INT64, shape=ir.Shape((4,)))
            batch_heads, rest = self.writer.split(node, dims_4d, (2, 2), axis=0)
            flattened_dim = self.writer.op(node, "ReduceProd", [batch_heads], {"keepdims": 1}, shape=ir.Shape((1,)))
            dims_3d = self.writer.op(node, "Concat", [flattened_dim, rest], {"axis": 0}, shape=ir.Shape((3,)))
            bounds = int_attribute(node, "start", 0), int_attribute(node, "end", 3)
            if bounds != (0, 3):
                dims_3d = self.writer.op(node, "Slice", [dims_3d, *(self.writer.int64_vector(bound) for bound in bounds)])
            replace_value(node.outputs[0], dims_3d)
        return shape_nodes


def _first_input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
