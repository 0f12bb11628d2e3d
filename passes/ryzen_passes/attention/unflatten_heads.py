"""Axes that were made one: attention whose batch and heads are one axis is given both back, so that it reads as any other.

Products of three axes, (batch*heads, rows, size), stand between Reshapes that join the axes and such that part them. What lies
between two of these is written anew with four; joins and parts fall away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import Size, int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value

_ELEMENTWISE_OPS = frozenset("Add Cast Div Identity Max Min Mul Neg Sub Tanh Where".split())


@dataclass(frozen=True)
class _UnflattenedTensor:
    """A tensor (batch*heads, rows, size) with its axes apart."""

    dims: tuple[Size, ...]
    """(batch, heads, rows, size)."""
    emit: Callable[[], ir.Value]
    is_view: bool = False
    """Whether it is only another view of a tensor whose axes are apart."""
    emitted: list[ir.Value] = field(default_factory=list)
    """What was written; empty as long as nothing asked for it."""

    def materialize(self) -> ir.Value:
        """Write it, once."""
        if not self.emitted:
            self.emitted.append(self.emit())
        return self.emitted[0]


class HeadUnflattener:
    """Gives the axes of one graph back."""

    def __init__(self, graph: ir.Graph, model_info: ModelInfo) -> None:
        """Read nothing yet."""
        self.graph, self.shapes, self.types = graph, model_info.shapes, model_info.types
        self.writer = NodeBuilder(graph, model_info)
        self.removed: list[str] = []
        self._unflattened: dict[ir.Value, _UnflattenedTensor] = {}
        self._unflatten_nodes: dict[ir.Node, _UnflattenedTensor] = {}
        self._inner_cache: dict[ir.Value, bool] = {}

    def may_apply(self) -> bool:
        """Whether there may be something to do: a product of three axes, and Reshapes of four to three."""
        ops = {
            (node.op_type, self.shapes.rank(node.outputs[0])) for node in self.graph if node.op_type in ("MatMul", "Reshape")
        }
        return {("MatMul", 3), ("Reshape", 3), ("Reshape", 4)} <= ops

    def run(self) -> None:
        """Rewrite in place what lies between joins and parts; a graph without such is left as it is."""
        for node in self.graph:
            if node.domain == "" and node.inputs and node.inputs[0] is not None:
                self._record_node(node, node.inputs[0])
        done = [
            node
            for node in self._unflatten_nodes
            if all(self._is_read_unflattened_only(one) for one in self._unflattened_producers(node.inputs[0]))
        ]
        for node in done:
            old, new = node.outputs[0], self._unflatten_nodes[node].materialize()
            old.shape = new.shape if new.shape is not None else old.shape
            replace_value(old, new)
        for value, held in self._unflattened.items():
            if held.emitted and not held.is_view:
                done += self._rewrite_shape_reads(value, held.emitted[0])
        self.removed = remove_dead_nodes(done)

    # Reading

    def _record_node(self, node: ir.Node, first: ir.Value) -> None:
        """Note what `node` gives with its axes apart, or that it parts them."""
        out, held = node.outputs[0], self._unflattened.get(first)
        if node.op_type == "Tile":
            self._record_tile(node, first)
        elif node.op_type == "Reshape" and held is None:
            self._record_flatten(node, first)
        elif node.op_type == "Reshape" and held is not None:
            before, after = self.shapes.dims(first), self.shapes.dims(out)
            if before is not None and after is not None and len(after) == 4 and after[:2] == held.dims[:2]:
                # No element is lost: one of the other two sizes tells both.
                self._unflatten_nodes |= {node: held} if before[1] == after[2] or before[2] == after[3] else {}
        elif (dims := self._unflattened_dims(node)) is not None:
            self._unflattened[out] = _UnflattenedTensor(dims, lambda: self._write_unflattened(node, dims))

    def _record_flatten(self, node: ir.Node, source: ir.Value) -> None:
        """Note a Reshape (batch, heads, rows, size) to (batch*heads, rows, size), or (batch, heads, size) to one row each."""
        out = node.outputs[0]
        before, after = self.shapes.dims(source), self.shapes.dims(out)
        if before is None or after is None or len(after) != 3 or not isinstance(before[1], int):
            return
        if len(before) == 4 and before[2:] == after[1:]:
            self._unflattened[out] = _UnflattenedTensor(before, lambda: _first_input(node), is_view=True)
        elif len(before) == 3 and after[1] == 1 and before[2] == after[2] and before[1] != 1:
            dims = (*before[:2], 1, before[2])

            def widened() -> ir.Value:
                return self.writer.op(
                    node, "Unsqueeze", [_first_input(node), self.writer.int64_vector(2)], shape=_shape_of_dims(dims)
                )

            self._unflattened[out] = _UnflattenedTensor(dims, widened, is_view=True)

    def _record_tile(self, node: ir.Node, source: ir.Value) -> None:
        """Note a Tile of (heads, rows, size) to (batch*heads, rows, size)."""
        repeats = node.inputs[1]
        before, times = self.shapes.dims(source), self.shapes.int_values(repeats) if repeats is not None else None
        if before is None or len(before) != 3 or not isinstance(before[0], int) or times is None or times[1:] != (1, 1):
            return
        dims = (times[0], *before)

        def tiled() -> ir.Value:
            wide = self.writer.op(node, "Unsqueeze", [_first_input(node), self.writer.int64_vector(0)])
            four = self.writer.op(node, "Concat", [repeats, self.writer.int64_vector(1)], {"axis": 0})
            return self.writer.op(node, "Tile", [wide, four], shape=_shape_of_dims(dims))

        self._unflattened[node.outputs[0]] = _UnflattenedTensor(dims, tiled, is_view=True)

    def _unflattened_dims(self, node: ir.Node) -> tuple[Size, ...] | None:
        """Return the dims with axes apart of what `node` gives; None where it cannot be written so."""
        found = [self._unflattened[one].dims for one in node.inputs if one is not None and one in self._unflattened]
        if not found or len({dims[:2] for dims in found}) > 1:
            return None
        lead = found[0][:2]
        if node.op_type == "MatMul":
            return (*lead, found[0][2], found[1][3]) if len(found) == 2 else None
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            return (*lead, found[0][3], found[0][2]) if perm and tuple(perm.as_ints()) == (0, 2, 1) else None
        if node.op_type == "Softmax":
            return found[0] if int_attribute(node, "axis", -1) in (-1, 2) else None
        if node.op_type not in _ELEMENTWISE_OPS:
            return None
        rest = [self.shapes.dims(one) for one in node.inputs if one is not None and one not in self._unflattened]
        after = self.shapes.dims(node.outputs[0])
        if after is None or len(after) != 3 or any(dims is None or len(dims) > 1 or set(dims) - {1} for dims in rest):
            return None
        return (*lead, *after[1:])

    # Writing

    def _unflattened_producers(self, value: ir.Value | None) -> list[ir.Value]:
        """Return `value`, which is to be written apart, and what is written with it."""
        found: dict[ir.Value, None] = {}
        waiting = [value]
        while waiting:
            one = waiting.pop()
            held = self._unflattened.get(one) if one is not None else None
            if one is None or held is None or held.is_view or one in found:
                continue
            found[one] = None
            maker = one.producer()
            waiting += maker.inputs if maker is not None else ()
        return [*found]

    def _is_read_unflattened_only(self, value: ir.Value) -> bool:
        """Whether nothing but what is written apart reads `value`, so that it is computed once."""
        if value not in self._inner_cache:
            self._inner_cache[value] = not value.is_graph_output() and all(
                node in self._unflatten_nodes
                or node.op_type == "Shape"
                or (node.outputs[0] in self._unflattened and self._is_read_unflattened_only(node.outputs[0]))
                for node in value.consumers()
            )
        return self._inner_cache[value]

    def _write_unflattened(self, node: ir.Node, dims: tuple[Size, ...]) -> ir.Value:
        """Write `node` with axes apart."""
        inputs = [
            self._unflattened[one].materialize() if one is not None and one in self._unflattened else one for one in node.inputs
        ]
        attributes: dict[str, object] = {name: one.value for name, one in node.attributes.items()}
        if node.op_type == "Transpose":
            attributes = {"perm": (0, 1, 3, 2)}
        elif node.op_type == "Softmax":
            attributes = {"axis": -1}
        return self.writer.op(
            node, node.op_type, inputs, attributes, dtype=self.types.get(node.outputs[0]), shape=_shape_of_dims(dims)
        )

    def _rewrite_shape_reads(self, flattened: ir.Value, unflattened: ir.Value) -> list[ir.Node]:
        """Let what reads the shape of `joined` read that of `apart`; return the nodes that did."""
        found = [use.node for use in flattened.uses() if use.node.op_type == "Shape"]
        for node in found:
            whole = self.writer.op(node, "Shape", [unflattened], dtype=ir.DataType.INT64, shape=ir.Shape((4,)))
            lead, rest = self.writer.split(node, whole, (2, 2), axis=0)
            one = self.writer.op(node, "ReduceProd", [lead], {"keepdims": 1}, shape=ir.Shape((1,)))
            both = self.writer.op(node, "Concat", [one, rest], {"axis": 0}, shape=ir.Shape((3,)))
            ends = int_attribute(node, "start", 0), int_attribute(node, "end", 3)
            if ends != (0, 3):
                both = self.writer.op(node, "Slice", [both, *(self.writer.int64_vector(end) for end in ends)])
            replace_value(node.outputs[0], both)
        return found


def _first_input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _shape_of_dims(dims: tuple[Size, ...]) -> ir.Shape | None:
    """Return the shape that `dims` are, where they are numbers and names."""
    return ir.Shape(dims) if all(isinstance(size, (int, str)) for size in dims) else None  # type: ignore[arg-type]
