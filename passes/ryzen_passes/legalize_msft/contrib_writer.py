"""`ContribWriter` inserts nodes for the rules of contrib ops: sizes, and reshapes between merged and separate heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder
from ryzen_passes.attention_fusion import MaskBuilder

MSFT_DOMAIN = "com.microsoft"
"""The domain of the contrib ops of ONNX Runtime."""
SEQ_AXIS = 2
"""The axis of tokens in (batch, heads, seq, head_size)."""
INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL


class ContribWriter:
    """Writes standard ONNX ops into one graph."""

    def __init__(self, graph: ir.Graph, model_info: ModelInfo) -> None:
        self.nodes, self.shapes = NodeBuilder(graph, model_info), model_info.shapes
        self.masks = MaskBuilder(self.nodes, self.shapes)

    def op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """Insert a node before `before` and return its output, of type `dtype` or else of that of the first input."""
        return self.nodes.op(before, op, inputs, attributes, dtype=dtype)

    def last_dim(self, value: ir.Value | None) -> int | None:
        """Return the last dim of `value`, or None if it is not a known number."""
        dims = self.shapes.dims(value) if value is not None else None
        return dims[-1] if dims and isinstance(dims[-1], int) else None

    def split_heads(self, node: ir.Node, value: ir.Value, size: int) -> ir.Value:
        """Reshape `value` (batch, seq, heads * size) to (batch, heads, seq, size)."""
        unmerged = self.op(node, "Reshape", [value, self.nodes.int64_vector(0, 0, -1, size)])
        return self.op(node, "Transpose", [unmerged], perm=(0, 2, 1, 3))

    def merge_heads(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Reshape `value` (batch, heads, seq, size) to (batch, seq, heads * size)."""
        transposed = self.op(node, "Transpose", [value], perm=(0, 2, 1, 3))
        return self.op(node, "Reshape", [transposed, self.nodes.int64_vector(0, 0, -1)])

    def rotate(
        self,
        node: ir.Node,
        value: ir.Value,
        tables: tuple[ir.Value, ir.Value],
        positions: ir.Value,
        *,
        interleaved: int,
        head_size: int | None,
    ) -> ir.Value:
        """Insert a RotaryEmbedding of `value` (batch, heads, seq, head_size).

        `tables` are cosines and sines (positions, rotary_dim / 2). If rotary_dim is less than the head size, the other elements
        of each head are not rotated. An unknown `head_size` is assumed to be rotary_dim.
        """
        attributes: dict[str, Any] = {"interleaved": interleaved}
        half = self.last_dim(tables[0])
        if half is not None and head_size is not None and 2 * half < head_size:
            attributes["rotary_embedding_dim"] = 2 * half
        return self.op(node, "RotaryEmbedding", [value, *tables, positions], **attributes)

    def seq_length(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return the number of tokens of `value` (batch, heads, seq, size), a scalar."""
        size = self.op(node, "Shape", [value], INT64, start=SEQ_AXIS, end=SEQ_AXIS + 1)
        return self.op(node, "Squeeze", [size])

    def arange(self, node: ir.Node, stop: ir.Value) -> ir.Value:
        """Return 0, 1, ..., `stop` - 1."""
        zero, one = self.nodes.scalar(0, INT64), self.nodes.scalar(1, INT64)
        return self.op(node, "Range", [zero, stop, one])
