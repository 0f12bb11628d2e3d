"""Decompose grouped-query attention over static KV caches for ONNX Runtime: query heads that share keys become MatMul rows.

The Attention of ONNX Runtime repeats and copies shared keys. Over a static cache, two MatMuls are 1.35 to 1.5 times as fast
(on a CPU; 1 query token, 32 query heads, 8 KV heads, 4,096 slots, batch sizes 1 and 8). Without shared keys they are slower
(0.8 times as fast, 8 heads), so such Attention nodes stay.
"""

from __future__ import annotations

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import float_attribute, int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_compile.spec.kv_cache import read_kv_cache_spec
from ryzen_compile.spec.passes import Change
from ryzen_passes.attention_fusion import AttentionMatcher, Mask, MaskBuilder


def decompose_grouped_query(model_info: ModelInfo, change: Change) -> Change:
    """Decompose every grouped-query Attention over a static KV cache; return `change` extended by these edits.

    Other Attention nodes stay: Attention returns zero for a row whose keys are all masked, the decomposition does not.
    """
    graph, spec = model_info.model.graph, read_kv_cache_spec(model_info.model)
    cached = {layer.attention_node for layer in spec.layers} if spec is not None else set()
    writer = NodeBuilder(graph, model_info)
    decomposer = _GroupedQueryDecomposer(writer, model_info)
    decomposed: list[str] = []
    removed: list[str] = []
    for node in [node for node in graph if node.op_type == "Attention" and node.name in cached]:
        if decomposer.decompose(node):
            decomposed.append(node.name or "")
            removed += remove_dead_nodes([node])
    if not decomposed:
        return change
    summary = f"{len(decomposed)} decomposed over static KV caches"
    return change.then(Change(inserted=tuple(writer.inserted), removed=tuple(removed), summary=summary))


class _GroupedQueryDecomposer:
    def __init__(self, writer: NodeBuilder, model_info: ModelInfo) -> None:
        self.writer, self.shapes, self.types = writer, model_info.shapes, model_info.types
        self.matcher = AttentionMatcher(model_info.shapes)
        self.masks = MaskBuilder(writer, model_info.shapes)
        self._mask_biases: dict[tuple[ir.Value, int, ir.DataType], ir.Value] = {}

    def decompose(self, node: ir.Node) -> bool:
        """Replace `node` by two MatMuls; return False, with the graph unchanged, if `node` is not supported."""
        inputs = [*node.inputs, *[None] * (4 - len(node.inputs))]
        query, key, value, mask = inputs[:4]
        has_extra = any(tensor is not None for tensor in inputs[4:]) or any(output.uses() for output in node.outputs[1:])
        is_plain = not any(int_attribute(node, name, 0) for name in ("is_causal", "softmax_precision", "q_num_heads"))
        if query is None or key is None or value is None or has_extra or not is_plain:
            return False
        query_dims, key_dims, value_dims = (self.shapes.dims(tensor) for tensor in (query, key, value))
        if (
            query_dims is None
            or key_dims is None
            or value_dims is None
            or len(query_dims) != 4
            or not isinstance(key_dims[2], int)
        ):
            return False
        heads, kv_heads, head_size, value_head_size = query_dims[1], key_dims[1], query_dims[3], value_dims[3]
        if not all(isinstance(tensor, int) for tensor in (heads, kv_heads, head_size, value_head_size)):
            return False
        if heads == kv_heads:
            return False
        dtype = self.types.get(query, ir.DataType.FLOAT)
        scale_value = float_attribute(node, "scale", float(head_size) ** -0.5)  # type: ignore[arg-type]
        op, integers = self.writer.op, self.writer.int64_vector
        group_size = heads // kv_heads  # type: ignore[operator]
        scaled = op(node, "Mul", [query, self.writer.scalar(scale_value, dtype)])
        scaled = op(node, "Reshape", [scaled, integers(0, kv_heads, -1, head_size)])  # type: ignore[arg-type]
        key_transposed = op(node, "Transpose", [key], {"perm": (0, 1, 3, 2)})
        scores = op(node, "MatMul", [scaled, key_transposed])
        if softcap := float_attribute(node, "softcap", 0.0):
            scores = self.writer.soft_cap(node, scores, softcap, dtype)
        single_query = query_dims[2] == 1
        if mask is not None:
            bias = self._mask_bias(mask, kv_heads, dtype, node)  # type: ignore[arg-type]
            if not single_query:
                scores = op(node, "Reshape", [scores, integers(0, kv_heads, group_size, -1, key_dims[2])])  # type: ignore[arg-type]
                bias = op(node, "Unsqueeze", [bias, integers(2)])
            scores = op(node, "Add", [scores, bias])
        weights = op(node, "Softmax", [scores], {"axis": -1})
        if mask is not None and not single_query:
            weights = op(node, "Reshape", [weights, integers(0, kv_heads, -1, key_dims[2])])  # type: ignore[arg-type]
        output = op(node, "MatMul", [weights, value])
        output = op(node, "Reshape", [output, integers(0, heads, -1, value_head_size)])  # type: ignore[arg-type]
        replace_value(node.outputs[0], output)
        return True

    def _mask_bias(self, mask: ir.Value, kv_heads: int, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return the additive mask of the scores, (batch, 1 or KV heads, seq, slots)."""
        if (mask, kv_heads, dtype) not in self._mask_biases:
            unrepeated = self.matcher.before_repeat_kv(mask)
            dims = self.shapes.dims(unrepeated) if unrepeated is not None else None
            source = unrepeated if unrepeated is not None and dims is not None and dims[1] == kv_heads else mask
            is_boolean = self.types.get(source) == ir.DataType.BOOL
            term = Mask(source, float("-inf")) if is_boolean else Mask(source)
            self._mask_biases[mask, kv_heads, dtype] = self.masks.finite_additive_mask((term,), dtype, before)
        return self._mask_biases[mask, kv_heads, dtype]
