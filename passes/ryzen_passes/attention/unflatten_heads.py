"""Axes that were made one: attention whose batch and heads are one axis is given both back, so that it reads as any other.

Products of three axes, (batch*heads, rows, size), stand between Reshapes that join the axes and such that part them. What lies
between two of these is written anew with four; joins and parts fall away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import Size, attribute
from ryzen_compile.ir.edit.builder import Known, Writer, remove_dead, take_over

_ELEMENTWISE = frozenset("Add Cast Div Identity Max Min Mul Neg Sub Tanh Where".split())


@dataclass(frozen=True)
class _Apart:
    """A tensor (batch*heads, rows, size) with its axes apart."""

    dims: tuple[Size, ...]
    """(batch, heads, rows, size)."""
    write: Callable[[], ir.Value]
    is_join: bool = False
    """Whether it is only another view of a tensor whose axes are apart."""
    made: list[ir.Value] = field(default_factory=list)
    """What was written; empty as long as nothing asked for it."""

    def make(self) -> ir.Value:
        """Write it, once."""
        if not self.made:
            self.made.append(self.write())
        return self.made[0]


class Lifter:
    """Gives the axes of one graph back."""

    def __init__(self, graph: ir.Graph, known: Known) -> None:
        """Read nothing yet."""
        self.graph, self.sizes, self.types = graph, known.sizes, known.types
        self.write = Writer(graph, known)
        self.removed: list[str] = []
        self._apart: dict[ir.Value, _Apart] = {}
        self._parts: dict[ir.Node, _Apart] = {}
        self._inner: dict[ir.Value, bool] = {}

    def has_joined(self) -> bool:
        """Whether there may be something to do: a product of three axes, and Reshapes of four to three."""
        ops = {(node.op_type, self.sizes.rank(node.outputs[0])) for node in self.graph if node.op_type in ("MatMul", "Reshape")}
        return {("MatMul", 3), ("Reshape", 3), ("Reshape", 4)} <= ops

    def run(self) -> None:
        """Rewrite in place what lies between joins and parts; a graph without such is left as it is."""
        for node in self.graph:
            if node.domain == "" and node.inputs and node.inputs[0] is not None:
                self._read(node, node.inputs[0])
        done = [node for node in self._parts if all(self._is_inner(one) for one in self._behind(node.inputs[0]))]
        for node in done:
            old, new = node.outputs[0], self._parts[node].make()
            old.shape = new.shape if new.shape is not None else old.shape
            take_over(old, new)
        for value, held in self._apart.items():
            if held.made and not held.is_join:
                done += self._measure(value, held.made[0])
        self.removed = remove_dead(done)

    # Reading

    def _read(self, node: ir.Node, first: ir.Value) -> None:
        """Note what `node` gives with its axes apart, or that it parts them."""
        out, held = node.outputs[0], self._apart.get(first)
        if node.op_type == "Tile":
            self._tile(node, first)
        elif node.op_type == "Reshape" and held is None:
            self._join(node, first)
        elif node.op_type == "Reshape" and held is not None:
            before, after = self.sizes.dims(first), self.sizes.dims(out)
            if before is not None and after is not None and len(after) == 4 and after[:2] == held.dims[:2]:
                # No element is lost: one of the other two sizes tells both.
                self._parts |= {node: held} if before[1] == after[2] or before[2] == after[3] else {}
        elif (dims := self._dims_apart(node)) is not None:
            self._apart[out] = _Apart(dims, lambda: self._again(node, dims))

    def _join(self, node: ir.Node, source: ir.Value) -> None:
        """Note a Reshape (batch, heads, rows, size) to (batch*heads, rows, size), or (batch, heads, size) to one row each."""
        out = node.outputs[0]
        before, after = self.sizes.dims(source), self.sizes.dims(out)
        if before is None or after is None or len(after) != 3 or not isinstance(before[1], int):
            return
        if len(before) == 4 and before[2:] == after[1:]:
            self._apart[out] = _Apart(before, lambda: _first(node), is_join=True)
        elif len(before) == 3 and after[1] == 1 and before[2] == after[2] and before[1] != 1:
            dims = (*before[:2], 1, before[2])

            def widened() -> ir.Value:
                return self.write.op(node, "Unsqueeze", [_first(node), self.write.integers(2)], shape=_shape(dims))

            self._apart[out] = _Apart(dims, widened, is_join=True)

    def _tile(self, node: ir.Node, source: ir.Value) -> None:
        """Note a Tile of (heads, rows, size) to (batch*heads, rows, size)."""
        repeats = node.inputs[1]
        before, times = self.sizes.dims(source), self.sizes.vector(repeats) if repeats is not None else None
        if before is None or len(before) != 3 or not isinstance(before[0], int) or times is None or times[1:] != (1, 1):
            return
        dims = (times[0], *before)

        def tiled() -> ir.Value:
            wide = self.write.op(node, "Unsqueeze", [_first(node), self.write.integers(0)])
            four = self.write.op(node, "Concat", [repeats, self.write.integers(1)], {"axis": 0})
            return self.write.op(node, "Tile", [wide, four], shape=_shape(dims))

        self._apart[node.outputs[0]] = _Apart(dims, tiled, is_join=True)

    def _dims_apart(self, node: ir.Node) -> tuple[Size, ...] | None:
        """Return the dims with axes apart of what `node` gives; None where it cannot be written so."""
        found = [self._apart[one].dims for one in node.inputs if one is not None and one in self._apart]
        if not found or len({dims[:2] for dims in found}) > 1:
            return None
        lead = found[0][:2]
        if node.op_type == "MatMul":
            return (*lead, found[0][2], found[1][3]) if len(found) == 2 else None
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            return (*lead, found[0][3], found[0][2]) if perm and tuple(perm.as_ints()) == (0, 2, 1) else None
        if node.op_type == "Softmax":
            return found[0] if attribute(node, "axis", -1) in (-1, 2) else None
        if node.op_type not in _ELEMENTWISE:
            return None
        rest = [self.sizes.dims(one) for one in node.inputs if one is not None and one not in self._apart]
        after = self.sizes.dims(node.outputs[0])
        if after is None or len(after) != 3 or any(dims is None or len(dims) > 1 or set(dims) - {1} for dims in rest):
            return None
        return (*lead, *after[1:])

    # Writing

    def _behind(self, value: ir.Value | None) -> list[ir.Value]:
        """Return `value`, which is to be written apart, and what is written with it."""
        found: dict[ir.Value, None] = {}
        waiting = [value]
        while waiting:
            one = waiting.pop()
            held = self._apart.get(one) if one is not None else None
            if one is None or held is None or held.is_join or one in found:
                continue
            found[one] = None
            maker = one.producer()
            waiting += maker.inputs if maker is not None else ()
        return [*found]

    def _is_inner(self, value: ir.Value) -> bool:
        """Whether nothing but what is written apart reads `value`, so that it is computed once."""
        if value not in self._inner:
            self._inner[value] = not value.is_graph_output() and all(
                node in self._parts
                or node.op_type == "Shape"
                or (node.outputs[0] in self._apart and self._is_inner(node.outputs[0]))
                for node in value.consumers()
            )
        return self._inner[value]

    def _again(self, node: ir.Node, dims: tuple[Size, ...]) -> ir.Value:
        """Write `node` with axes apart."""
        inputs = [self._apart[one].make() if one is not None and one in self._apart else one for one in node.inputs]
        attributes: dict[str, object] = {name: one.value for name, one in node.attributes.items()}
        if node.op_type == "Transpose":
            attributes = {"perm": (0, 1, 3, 2)}
        elif node.op_type == "Softmax":
            attributes = {"axis": -1}
        return self.write.op(node, node.op_type, inputs, attributes, dtype=self.types.get(node.outputs[0]), shape=_shape(dims))

    def _measure(self, joined: ir.Value, apart: ir.Value) -> list[ir.Node]:
        """Let what reads the shape of `joined` read that of `apart`; return the nodes that did."""
        found = [use.node for use in joined.uses() if use.node.op_type == "Shape"]
        for node in found:
            whole = self.write.op(node, "Shape", [apart], dtype=ir.DataType.INT64, shape=ir.Shape((4,)))
            lead, rest = self.write.split(node, whole, (2, 2), axis=0)
            one = self.write.op(node, "ReduceProd", [lead], {"keepdims": 1}, shape=ir.Shape((1,)))
            both = self.write.op(node, "Concat", [one, rest], {"axis": 0}, shape=ir.Shape((3,)))
            ends = attribute(node, "start", 0), attribute(node, "end", 3)
            if ends != (0, 3):
                both = self.write.op(node, "Slice", [both, *(self.write.integers(end) for end in ends)])
            take_over(node.outputs[0], both)
        return found


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _shape(dims: tuple[Size, ...]) -> ir.Shape | None:
    """Return the shape that `dims` are, where they are numbers and names."""
    return ir.Shape(dims) if all(isinstance(size, (int, str)) for size in dims) else None  # type: ignore[arg-type]
