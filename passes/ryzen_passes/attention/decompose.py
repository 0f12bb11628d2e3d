"""Attention written out in MatMul and Softmax, with all that ONNX lets it do."""

from __future__ import annotations

import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import Sizes, attribute
from ryzen_compile.ir.edit.builder import Writer
from ryzen_passes.attention.masks import Mask, Masks


class Expander:
    """Writes attentions of one graph out."""

    def __init__(self, write: Writer, masks: Masks, sizes: Sizes) -> None:
        self.write, self.masks, self.sizes = write, masks, sizes

    def write_out(
        self, node: ir.Node, query: ir.Value, key: ir.Value, value: ir.Value, masks: tuple[Mask, ...], dtype: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """Write the Attention `node` in front of it, over 4-D tensors and a scaled query.

        Returns the output (B, H, S, Dv) and the scores (B, H, S, N) of the stage that the node's `qk_matmul_output_mode` asks
        for.
        """
        op = self.write.op
        turned = op(node, "Transpose", [self._repeated(node, key, query)], {"perm": (0, 1, 3, 2)})
        stages = [op(node, "MatMul", [query, turned])]
        cap = node.attributes.get("softcap")
        scores = stages[0]
        if cap is not None and cap.as_float():
            limit = self.write.number(cap.as_float(), dtype)
            scores = op(node, "Mul", [op(node, "Tanh", [op(node, "Div", [scores, limit])]), limit])
        stages.append(scores)
        if masks:
            scores = op(node, "Add", [scores, self.masks.added(masks, dtype, node)])
        stages.append(scores)
        weights = self._softmax(node, scores, dtype)
        visible = self.masks.visible(masks, node)
        if visible is not None:
            weights = op(node, "Where", [visible, weights, self.write.number(0.0, dtype)], dtype=dtype)
        stages.append(weights)
        output = op(node, "MatMul", [weights, self._repeated(node, value, query)])
        return output, stages[attribute(node, "qk_matmul_output_mode", 0)]

    def _softmax(self, node: ir.Node, scores: ir.Value, dtype: ir.DataType) -> ir.Value:
        precision = ir.DataType(attribute(node, "softmax_precision", int(dtype)))
        if precision == dtype:
            return self.write.op(node, "Softmax", [scores], {"axis": -1})
        wide = self.write.op(node, "Cast", [scores], {"to": int(precision)}, dtype=precision)
        weights = self.write.op(node, "Softmax", [wide], {"axis": -1})
        return self.write.op(node, "Cast", [weights], {"to": int(dtype)}, dtype=dtype)

    def _repeated(self, node: ir.Node, shared: ir.Value, query: ir.Value) -> ir.Value:
        """Return `shared` (B, G, N, D) with each head as often as query heads read it: (B, H, N, D)."""
        have, want = self.sizes.dims(shared), self.sizes.dims(query)
        heads = attribute(node, "q_num_heads", 0) or (want[1] if want else 0)
        groups = attribute(node, "kv_num_heads", 0) or (have[1] if have else 0)
        if heads == groups or not isinstance(heads, int) or not isinstance(groups, int):
            return shared
        apart = self.write.op(node, "Unsqueeze", [shared, self.write.integers(2)])
        many = self.write.op(node, "Expand", [apart, self.write.integers(1, 1, heads // groups, 1, 1)])
        shape = self.write.op(node, "Shape", [shared], {"start": 2, "end": 4}, dtype=ir.DataType.INT64)
        target = self.write.op(node, "Concat", [self.write.integers(0, heads), shape], {"axis": 0})
        return self.write.op(node, "Reshape", [many, target])
