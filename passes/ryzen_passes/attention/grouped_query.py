"""Attention over a cache of fixed size, written out for ONNX Runtime: the query heads that share keys are rows of one product.

ONNX Runtime's own Attention repeats shared keys and copies them; over a cache that lies still, two plain products are faster
(1.35 to 1.5 times on a CPU, one query of 32 heads over 8, 4,096 slots, batch 1 and 8). Where no heads share keys they are
slower (0.8 times, 8 heads), and Attention stays.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.spec.kv_cache import read_kv_cache_spec
from ryzen_compile.spec.passes import Change
from ryzen_passes.attention.masks import Mask, MaskBuilder
from ryzen_passes.attention.match import AttentionMatcher


def decompose_grouped_query(model_info: ModelInfo, change: Change) -> Change:
    """Write out every Attention over the fixed caches of a decoder whose heads share keys; add to `change` what that took.

    No other: one over a mask that hides every key of a row gives zero there, which the products do not.
    """
    graph, told = model_info.model.graph, read_kv_cache_spec(model_info.model)
    cached = {layer.attention_node for layer in told.layers} if told is not None else set()
    write = NodeBuilder(graph, model_info)
    grouper = _GroupedQueryDecomposer(write, model_info)
    done: list[str] = []
    removed = [*change.removed]
    for node in [node for node in graph if node.op_type == "Attention" and node.name in cached]:
        if grouper.decompose(node):
            done.append(node.name or "")
            removed += remove_dead_nodes([node])
    if not done:
        return change
    passing = {*write.inserted, *change.inserted} & {*removed}
    says = f"{len(done)} written out over caches of fixed size"
    return dataclasses.replace(
        change,
        inserted=tuple(name for name in (*change.inserted, *write.inserted) if name not in passing),
        removed=tuple(name for name in removed if name not in passing),
        summary=f"{change.summary}, {says}" if change else says,
    )


class _GroupedQueryDecomposer:
    def __init__(self, writer: NodeBuilder, model_info: ModelInfo) -> None:
        self.writer, self.shapes, self.types = writer, model_info.shapes, model_info.types
        self.matcher = AttentionMatcher(model_info.shapes)
        self.masks = MaskBuilder(writer, model_info.shapes)
        self._mask_biases: dict[tuple[ir.Value, int, ir.DataType], ir.Value] = {}

    def decompose(self, node: ir.Node) -> bool:
        """Put two products in the place of `node`; return whether that could be done."""
        inputs = [*node.inputs, *[None] * (4 - len(node.inputs))]
        query, key, value, mask = inputs[:4]
        extra = any(one is not None for one in inputs[4:]) or any(output.uses() for output in node.outputs[1:])
        plain = not any(int_attribute(node, name, 0) for name in ("is_causal", "softmax_precision", "q_num_heads"))
        cap = node.attributes.get("softcap")
        if query is None or key is None or value is None or extra or not plain or (cap is not None and cap.as_float()):
            return False
        have, rows, width = (self.shapes.dims(one) for one in (query, key, value))
        if have is None or rows is None or width is None or len(have) != 4 or not isinstance(rows[2], int):
            return False
        heads, groups, size, wide = have[1], rows[1], have[3], width[3]
        if not all(isinstance(one, int) for one in (heads, groups, size, wide)):
            return False
        if heads == groups:
            return False
        dtype = self.types.get(query, ir.DataType.FLOAT)
        scale = node.attributes.get("scale")
        factor = scale.as_float() if scale is not None else float(size) ** -0.5  # type: ignore[arg-type]
        op, integers = self.writer.op, self.writer.int64_vector
        times = heads // groups  # type: ignore[operator]
        scaled = op(node, "Mul", [query, self.writer.scalar(factor, dtype)])
        scaled = op(node, "Reshape", [scaled, integers(0, groups, -1, size)])  # type: ignore[arg-type]
        turned = op(node, "Transpose", [key], {"perm": (0, 1, 3, 2)})
        scores = op(node, "MatMul", [scaled, turned])
        one_row = have[2] == 1
        if mask is not None:
            bias = self._mask_bias(mask, groups, dtype, node)  # type: ignore[arg-type]
            if not one_row:
                scores = op(node, "Reshape", [scores, integers(0, groups, times, -1, rows[2])])  # type: ignore[arg-type]
                bias = op(node, "Unsqueeze", [bias, integers(2)])
            scores = op(node, "Add", [scores, bias])
        weights = op(node, "Softmax", [scores], {"axis": -1})
        if mask is not None and not one_row:
            weights = op(node, "Reshape", [weights, integers(0, groups, -1, rows[2])])  # type: ignore[arg-type]
        output = op(node, "MatMul", [weights, value])
        output = op(node, "Reshape", [output, integers(0, heads, -1, wide)])  # type: ignore[arg-type]
        replace_value(node.outputs[0], output)
        return True

    def _mask_bias(self, mask: ir.Value, groups: int, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return what is added to the scores: (batch, 1 or groups, seq, rows)."""
        if (mask, groups, dtype) not in self._mask_biases:
            narrow = self.matcher.before_repeat_kv(mask)
            dims = self.shapes.dims(narrow) if narrow is not None else None
            source = narrow if narrow is not None and dims is not None and dims[1] == groups else mask
            hidden = self.types.get(source) == ir.DataType.BOOL
            one = Mask(source, float("-inf")) if hidden else Mask(source)
            self._mask_biases[mask, groups, dtype] = self.masks.finite_additive_mask((one,), dtype, before)
        return self._mask_biases[mask, groups, dtype]
