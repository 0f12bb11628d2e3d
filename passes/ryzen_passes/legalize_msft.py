"""Operators of ONNX Runtime's own, as its GenAI model builder writes them, said in ONNX's: attention, RoPE, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import Sizes, attribute, constant
from ryzen_compile.ir.edit.builder import Known, Writer, remove_dead, take_over
from ryzen_passes.opset import raise_opset

DOMAIN = "com.microsoft"
_OPSET = 24
_INT64, _BOOL = ir.DataType.INT64, ir.DataType.BOOL
_ROWS = 2
_FARTHEST = 16
_KEEPS_COLUMNS = frozenset({"Reshape", "Transpose", "RotaryEmbedding", "RMSNormalization", "SimplifiedLayerNormalization"})
"""Ops between a projection and its attention that give as many elements a token as they take."""


class Foreign(Exception):
    """What an operator does that cannot be said in ONNX's; the node is named."""

    def __init__(self, node: ir.Node, says: str) -> None:
        super().__init__(f"{node.op_type} of `{node.domain or 'ai.onnx'}` {says}")
        self.where = node.name or node.op_type


def standardise(model: ir.Model) -> None:
    """Put ONNX's operators in the place of those of `com.microsoft` that decoders are written with, in place.

    Masks are causal afterwards and hide no padding: GroupQueryAttention takes from its mask no more than how long each row is.
    Raises Foreign where an operator does more than can be said.
    """
    found = [node for node in model.graph if _rule(node) is not None]
    if not found:
        return
    if (reason := raise_opset(model, _OPSET)) is not None:
        raise Foreign(found[0], f"needs opset {_OPSET}: {reason}")
    known = Known(model)
    writer = _Standard(Writer(model.graph, known), known.sizes)
    for node in found:
        rule = _rule(node)
        if rule is not None:
            rule(writer, node)
            remove_dead([node])
    _settle_caches(model.graph, Sizes())


def _settle_caches(graph: ir.Graph, sizes: Sizes) -> None:
    """Let the sizes of a head that follow from what caches are joined to be numbers in their shapes, before and after."""
    for node in graph:
        past = node.inputs[0] if node.op_type == "Concat" and attribute(node, "axis", 0) % 4 == _ROWS else None
        found = sizes.dims(node.outputs[0]) if past is not None and past.is_graph_input() else None
        for value in (past, node.outputs[0]):
            if found is not None and value is not None and value.shape is not None and len(value.shape) == len(found) == 4:
                size = found[3] if isinstance(found[3], int) else value.shape[3]
                value.shape = ir.Shape([*value.shape.dims[:3], size])


def _rule(node: ir.Node) -> Callable[[_Standard, ir.Node], None] | None:
    if node.op_type == "SimplifiedLayerNormalization" and node.domain in ("", DOMAIN):
        return _Standard.norm
    return _RULES.get(node.op_type) if node.domain == DOMAIN else None


class _Standard:
    def __init__(self, write: Writer, sizes: Sizes) -> None:
        self.write, self.sizes = write, sizes

    def op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **how: Any
    ) -> ir.Value:
        return self.write.op(before, op, inputs, how, dtype=dtype)

    def norm(self, node: ir.Node) -> None:
        """SimplifiedLayerNormalization."""
        if any(output.uses() for output in node.outputs[1:]):
            raise Foreign(node, "gives more than its result")
        self._norm(node, _input(node, 0), _input(node, 1))

    def skip_norm(self, node: ir.Node) -> None:
        """SkipSimplifiedLayerNormalization: the norm of a sum, and the sum."""
        total = self.op(node, "Add", [_input(node, 0), _input(node, 1)])
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            total = self.op(node, "Add", [total, node.inputs[3]])
        if any(output.uses() for output in node.outputs[1:3]):
            raise Foreign(node, "gives its statistics")
        if len(node.outputs) > 3:
            take_over(node.outputs[3], total)
        self._norm(node, total, _input(node, 2))

    def _norm(self, node: ir.Node, value: ir.Value, weight: ir.Value) -> None:
        epsilon = node.attributes.get("epsilon")
        least = epsilon.as_float() if epsilon is not None else 1e-5
        axis = attribute(node, "axis", -1)
        take_over(node.outputs[0], self.op(node, "RMSNormalization", [value, weight], axis=axis, epsilon=least))

    def rotary(self, node: ir.Node) -> None:
        """RotaryEmbedding over (batch, seq, heads * size) or (batch, heads, seq, size)."""
        value, positions, cos, sin = (_input(node, at) for at in range(4))
        if attribute(node, "is_packed_batching", 0):
            raise Foreign(node, "takes sequences packed into one row")
        flat = value.shape is None or len(value.shape) == 3
        size = self._size(node, cos)
        if flat:
            value = self._apart(node, value, size)
        value = self._turn(
            node, value, cos, sin, positions, attribute(node, "interleaved", 0), attribute(node, "rotary_embedding_dim", 0)
        )
        take_over(node.outputs[0], self._flat(node, value) if flat else value)

    def _turn(
        self, node: ir.Node, value: ir.Value, cos: ir.Value, sin: ir.Value, at: ir.Value, interleaved: int, dim: int
    ) -> ir.Value:
        how: dict[str, Any] = {"interleaved": interleaved} | ({"rotary_embedding_dim": dim} if dim else {})
        return self.op(node, "RotaryEmbedding", [value, cos, sin, at], **how)

    def _size(self, node: ir.Node, cos: ir.Value) -> int:
        """Return the size of a head, of which the table of cosines has half."""
        tensor = constant(cos)
        if tensor is None:
            raise Foreign(node, "has a table of cosines that is computed")
        return attribute(node, "rotary_embedding_dim", 0) or 2 * int(tensor.numpy().shape[1])

    def _apart(self, node: ir.Node, value: ir.Value, size: int) -> ir.Value:
        """Return (batch, heads, seq, size) of (batch, seq, heads * size)."""
        rows = self.op(node, "Reshape", [value, self.write.integers(0, 0, -1, size)])
        return self.op(node, "Transpose", [rows], perm=(0, 2, 1, 3))

    def _flat(self, node: ir.Node, value: ir.Value) -> ir.Value:
        rows = self.op(node, "Transpose", [value], perm=(0, 2, 1, 3))
        return self.op(node, "Reshape", [rows, self.write.integers(0, 0, -1)])

    def grouped(self, node: ir.Node) -> None:
        """GroupQueryAttention: the caches join in it, and RoPE may be in it."""
        inputs = [*node.inputs, *[None] * (14 - len(node.inputs))]
        heads, groups = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
        cap = node.attributes.get("softcap")
        if (
            (cap is not None and cap.as_float())
            or attribute(node, "smooth_softmax", 0)
            or any(one is not None for one in inputs[10:])
        ):
            raise Foreign(node, "caps its scores, or has a bias, a sink or quantised caches")
        query, key, value, past_key, past_value = inputs[:5]
        cos, sin, positions = inputs[7:10]
        if query is None or past_key is None or past_value is None:
            raise Foreign(node, "has no cache")
        size = self._head_size(node, query, cos, heads, groups, packed=key is None)
        if key is None or value is None:
            query, key, value = self._unpacked(node, query, [heads * size, groups * size, groups * size])
        query, key, value = (self._apart(node, one, size) for one in (query, key, value))
        if attribute(node, "do_rotary", 0):
            if cos is None or sin is None:
                raise Foreign(node, "turns its keys by no table")
            at = positions if positions is not None else self._positions(node, past_key, query)
            interleaved = attribute(node, "rotary_interleaved", 0)
            query, key = (self._turn(node, one, cos, sin, at, interleaved, 0) for one in (query, key))
        whole = [self._joined(node, past, new, at) for past, new, at in ((past_key, key, 1), (past_value, value, 2))]
        window = attribute(node, "local_window_size", -1)
        seen = self._causal(node, past_key, query, window)
        scale = node.attributes.get("scale")
        factor = scale.as_float() if scale is not None and scale.as_float() else float(size) ** -0.5
        output = self.op(node, "Attention", [query, *whole, seen], scale=factor)
        take_over(node.outputs[0], self._flat(node, output))

    def multi_head(self, node: ir.Node) -> None:
        """MultiHeadAttention over (batch, rows, heads * size), with what is added to its scores, and caches or none."""
        inputs = [*node.inputs, *[None] * (10 - len(node.inputs))]
        query, key, value, bias, padding, added, past_key, past_value = inputs[:8]
        if query is None or key is None or value is None or bias is not None:
            raise Foreign(node, "splits one tensor into queries, keys and values, or adds to them")
        scores = [out for out in node.outputs[3:] if out.uses() or out.is_graph_output()]
        if padding is not None or scores or any(one is not None for one in inputs[8:]):
            raise Foreign(node, "masks its keys by their number, shares its caches' memory, or gives its scores")
        heads = attribute(node, "num_heads", 0)
        if not heads or any(self.sizes.rank(one) != 3 for one in (query, key, value)):
            raise Foreign(node, "has no queries, keys and values (batch, rows, heads * size)")
        if (past_key is not None or past_value is not None) and (None in (past_key, past_value) or len(node.outputs) < 3):
            raise Foreign(node, "has caches that it does not give back")
        size, wide = (self._width(node, one) // heads for one in (query, value))
        query, key, value = (
            self._parted(node, one, heads, width) for one, width in ((query, size), (key, size), (value, wide))
        )
        whole = [key, value]
        for at, past in ((0, past_key), (1, past_value)):
            if past is not None:
                whole[at] = self.op(node, "Concat", [past, whole[at]], axis=_ROWS)
            if len(node.outputs) > at + 1:
                take_over(node.outputs[at + 1], whole[at])
        masks = [added] if added is not None else []
        how: dict[str, Any] = {}
        if attribute(node, "unidirectional", 0):
            if past_key is not None or added is not None:
                raise Foreign(node, "is causal, and has a cache or a bias")
            how["is_causal"] = 1
        scale = node.attributes.get("scale")
        how["scale"] = scale.as_float() if scale is not None and scale.as_float() else float(size) ** -0.5
        take_over(node.outputs[0], self._flat(node, self.op(node, "Attention", [query, *whole, *masks], **how)))

    def _width(self, node: ir.Node, value: ir.Value) -> int:
        """Return the last size of `value`."""
        dims = self.sizes.dims(value)
        if not dims or not isinstance(dims[-1], int):
            raise Foreign(node, "has heads of a size that is not known")
        return dims[-1]

    def _parted(self, node: ir.Node, value: ir.Value, heads: int, size: int) -> ir.Value:
        """Return (batch, heads, rows, size) of `value`, which may have been that before its axes were joined."""
        rows = value.producer()
        turn = (
            rows.inputs[0].producer() if rows is not None and rows.op_type == "Reshape" and rows.inputs[0] is not None else None
        )
        perm = turn.attributes.get("perm") if turn is not None and turn.op_type == "Transpose" else None
        before = turn.inputs[0] if turn is not None and perm is not None and tuple(perm.as_ints()) == (0, 2, 1, 3) else None
        dims, joined = self.sizes.dims(before) if before is not None else None, self.sizes.dims(value)
        if before is None or dims is None or len(dims) != 4 or joined is None:
            return self._apart(node, value, size)
        return before if dims[1] == heads and joined[:2] == (dims[0], dims[2]) else self._apart(node, value, size)

    def _head_size(self, node: ir.Node, query: ir.Value, cos: ir.Value | None, heads: int, groups: int, *, packed: bool) -> int:
        if cos is not None:
            return self._size(node, cos)
        width = query.shape[2] if query.shape is not None and len(query.shape) == 3 else None
        if not isinstance(width, int):
            width = self._columns(query)
        if width is None:
            raise Foreign(node, "has heads of a size that is not known")
        return width // (heads + 2 * groups if packed else heads)

    def _columns(self, value: ir.Value | None) -> int | None:
        """Return the last size of `value`, followed back to the weights that it is a product with."""
        for _ in range(_FARTHEST):
            node = value.producer() if value is not None else None
            if node is None or not (node.op_type in ("MatMul", "Add") or node.op_type in _KEEPS_COLUMNS):
                return None
            tensor = constant(node.inputs[1]) if node.op_type in ("MatMul", "Add") else None
            if tensor is not None and tensor.shape.rank():
                return int(tensor.shape.numpy()[-1])
            if node.op_type == "MatMul":
                return None
            value = node.inputs[0]
        return None

    def _unpacked(self, node: ir.Node, packed: ir.Value, widths: list[int]) -> list[ir.Value]:
        ends = np.cumsum([0, *widths])
        integers = self.write.integers
        return [
            self.op(node, "Slice", [packed, integers(int(start)), integers(int(end)), integers(2)])
            for start, end in zip(ends[:-1], ends[1:], strict=True)
        ]

    def _joined(self, node: ir.Node, past: ir.Value, new: ir.Value, at: int) -> ir.Value:
        whole = self.op(node, "Concat", [past, new], axis=_ROWS)
        take_over(node.outputs[at], whole)
        return whole

    def _length(self, node: ir.Node, value: ir.Value) -> ir.Value:
        size = self.op(node, "Shape", [value], _INT64, start=_ROWS, end=_ROWS + 1)
        return self.op(node, "Squeeze", [size])

    def _count(self, node: ir.Node, to: ir.Value) -> ir.Value:
        zero, one = self.write.number(0, _INT64), self.write.number(1, _INT64)
        return self.op(node, "Range", [zero, to, one])

    def _positions(self, node: ir.Node, past: ir.Value, query: ir.Value) -> ir.Value:
        """Return (batch, seq): where the tokens of the step stand."""
        tokens = self._count(node, self._length(node, query))
        at = self.op(node, "Add", [tokens, self._length(node, past)])
        batch = self.op(node, "Shape", [query], _INT64, start=0, end=1)
        rows = self.op(node, "Shape", [query], _INT64, start=_ROWS, end=_ROWS + 1)
        return self.op(node, "Expand", [at, self.op(node, "Concat", [batch, rows], axis=0)])

    def _causal(self, node: ir.Node, past: ir.Value, query: ir.Value, window: int) -> ir.Value:
        """Return (1, 1, seq, past+seq) bool: which keys a query sees."""
        before, new = self._length(node, past), self._length(node, query)
        key = self._count(node, self.op(node, "Add", [before, new]))
        at = self.op(node, "Unsqueeze", [self.op(node, "Add", [self._count(node, new), before]), self.write.integers(-1)])
        seen = self.op(node, "LessOrEqual", [key, at], _BOOL)
        if window > 0:
            since = self.op(node, "Sub", [at, self.write.number(window, _INT64)])
            seen = self.op(node, "And", [seen, self.op(node, "Greater", [key, since], _BOOL)])
        return self.op(node, "Unsqueeze", [seen, self.write.integers(0, 1)])


_RULES: dict[str, Callable[[_Standard, ir.Node], None]] = {
    "GroupQueryAttention": _Standard.grouped,
    "MultiHeadAttention": _Standard.multi_head,
    "RotaryEmbedding": _Standard.rotary,
    "SkipSimplifiedLayerNormalization": _Standard.skip_norm,
}


def _input(node: ir.Node, at: int) -> ir.Value:
    value = node.inputs[at] if at < len(node.inputs) else None
    if value is None:
        raise Foreign(node, f"lacks its input {at}")
    return value
