"""Attention written out in MatMul and Softmax, with all that ONNX lets it do."""

from __future__ import annotations

import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import ShapeInference, int_attribute
from ryzen_compile.ir.edit.builder import NodeBuilder
from ryzen_passes.attention.masks import Mask, MaskBuilder


class AttentionDecomposer:
    """Writes attentions of one graph out."""

    def __init__(self, writer: NodeBuilder, masks: MaskBuilder, shapes: ShapeInference) -> None:
        self.writer, self.masks, self.shapes = writer, masks, shapes

    def decompose(
        self, node: ir.Node, query: ir.Value, key: ir.Value, value: ir.Value, masks: tuple[Mask, ...], dtype: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """Write the Attention `node` in front of it, over 4-D tensors and a scaled query.

        Returns the output (B, H, S, Dv) and the scores (B, H, S, N) of the stage that the node's `qk_matmul_output_mode` asks
        for.
        """
        op = self.writer.op
        turned = op(node, "Transpose", [self._repeat_kv(node, key, query)], {"perm": (0, 1, 3, 2)})
        stages = [op(node, "MatMul", [query, turned])]
        cap = node.attributes.get("softcap")
        scores = stages[0]
        if cap is not None and cap.as_float():
            limit = self.writer.scalar(cap.as_float(), dtype)
            scores = op(node, "Mul", [op(node, "Tanh", [op(node, "Div", [scores, limit])]), limit])
        stages.append(scores)
        if masks:
            scores = op(node, "Add", [scores, self.masks.additive_mask(masks, dtype, node)])
        stages.append(scores)
        weights = self._softmax(node, scores, dtype)
        visible = self.masks.nonempty_rows(masks, node)
        if visible is not None:
            weights = op(node, "Where", [visible, weights, self.writer.scalar(0.0, dtype)], dtype=dtype)
        stages.append(weights)
        output = op(node, "MatMul", [weights, self._repeat_kv(node, value, query)])
        return output, stages[int_attribute(node, "qk_matmul_output_mode", 0)]

    def _softmax(self, node: ir.Node, scores: ir.Value, dtype: ir.DataType) -> ir.Value:
        precision = ir.DataType(int_attribute(node, "softmax_precision", int(dtype)))
        if precision == dtype:
            return self.writer.op(node, "Softmax", [scores], {"axis": -1})
        wide = self.writer.op(node, "Cast", [scores], {"to": int(precision)}, dtype=precision)
        weights = self.writer.op(node, "Softmax", [wide], {"axis": -1})
        return self.writer.op(node, "Cast", [weights], {"to": int(dtype)}, dtype=dtype)

    def _repeat_kv(self, node: ir.Node, key_or_value: ir.Value, query: ir.Value) -> ir.Value:
        """Return `shared` (B, G, N, D) with each head as often as query heads read it: (B, H, N, D)."""
        have, want = self.shapes.dims(key_or_value), self.shapes.dims(query)
        heads = int_attribute(node, "q_num_heads", 0) or (want[1] if want else 0)
        groups = int_attribute(node, "kv_num_heads", 0) or (have[1] if have else 0)
        if heads == groups or not isinstance(heads, int) or not isinstance(groups, int):
            return key_or_value
        apart = self.writer.op(node, "Unsqueeze", [key_or_value, self.writer.int64_vector(2)])
        many = self.writer.op(node, "Expand", [apart, self.writer.int64_vector(1, 1, heads // groups, 1, 1)])
        shape = self.writer.op(node, "Shape", [key_or_value], {"start": 2, "end": 4}, dtype=ir.DataType.INT64)
        target = self.writer.op(node, "Concat", [self.writer.int64_vector(0, heads), shape], {"axis": 0})
        return self.writer.op(node, "Reshape", [many, target])
