"""Decompose an ONNX Attention into MatMul and Softmax, with masks, soft-capping and all other options of the op."""

from __future__ import annotations

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import float_attribute, int_attribute
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.edit.builder import NodeBuilder
from ryzen_passes.attention_fusion import Mask, MaskBuilder


class AttentionDecomposer:
    """Decomposes the Attention nodes of one graph."""

    def __init__(self, writer: NodeBuilder, masks: MaskBuilder, shapes: ShapeInference) -> None:
        self.writer, self.masks, self.shapes = writer, masks, shapes

    def decompose(
        self, node: ir.Node, query: ir.Value, key: ir.Value, value: ir.Value, masks: tuple[Mask, ...], dtype: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """Insert the decomposition of the Attention `node` before it.

        `query` (B, H, S, D) is scaled already; `key` is (B, G, N, D), `value` is (B, G, N, Dv). B: batch, H: query heads,
        G: KV heads, S: queries, N: keys, D: head size, Dv: head size of the values.

        Return the output (B, H, S, Dv), and the scores (B, H, S, N) at the stage given by the attribute
        `qk_matmul_output_mode` of the node.
        """
        op = self.writer.op
        key_transposed = op(node, "Transpose", [self._repeat_kv(node, key, query)], {"perm": (0, 1, 3, 2)})
        stages = [op(node, "MatMul", [query, key_transposed])]
        scores = stages[0]
        if softcap := float_attribute(node, "softcap", 0.0):
            scores = self.writer.soft_cap(node, scores, softcap, dtype)
        stages.append(scores)
        if masks:
            scores = op(node, "Add", [scores, self.masks.additive_mask(masks, dtype, node)])
        stages.append(scores)
        weights = self._softmax(node, scores, dtype)
        nonempty = self.masks.nonempty_rows(masks, node)
        if nonempty is not None:
            weights = op(node, "Where", [nonempty, weights, self.writer.scalar(0.0, dtype)], dtype=dtype)
        stages.append(weights)
        output = op(node, "MatMul", [weights, self._repeat_kv(node, value, query)])
        return output, stages[int_attribute(node, "qk_matmul_output_mode", 0)]

    def _softmax(self, node: ir.Node, scores: ir.Value, dtype: ir.DataType) -> ir.Value:
        precision = ir.DataType(int_attribute(node, "softmax_precision", int(dtype)))
        if precision == dtype:
            return self.writer.op(node, "Softmax", [scores], {"axis": -1})
        scores_cast = self.writer.op(node, "Cast", [scores], {"to": int(precision)}, dtype=precision)
        weights = self.writer.op(node, "Softmax", [scores_cast], {"axis": -1})
        return self.writer.op(node, "Cast", [weights], {"to": int(dtype)}, dtype=dtype)

    def _repeat_kv(self, node: ir.Node, key_or_value: ir.Value, query: ir.Value) -> ir.Value:
        """Repeat each KV head of `key_or_value` (B, G, N, D) for the query heads that share it; return (B, H, N, D)."""
        kv_dims, query_dims = self.shapes.dims(key_or_value), self.shapes.dims(query)
        heads = int_attribute(node, "q_num_heads", 0) or (query_dims[1] if query_dims else 0)
        kv_heads = int_attribute(node, "kv_num_heads", 0) or (kv_dims[1] if kv_dims else 0)
        if heads == kv_heads or not isinstance(heads, int) or not isinstance(kv_heads, int):
            return key_or_value
        unsqueezed = self.writer.op(node, "Unsqueeze", [key_or_value, self.writer.int64_vector(2)])
        expanded = self.writer.op(node, "Expand", [unsqueezed, self.writer.int64_vector(1, 1, heads // kv_heads, 1, 1)])
        seq_and_size = self.writer.op(node, "Shape", [key_or_value], {"start": 2, "end": 4}, dtype=ir.DataType.INT64)
        target = self.writer.op(node, "Concat", [self.writer.int64_vector(0, heads), seq_and_size], {"axis": 0})
        return self.writer.op(node, "Reshape", [expanded, target])
