"""The pass `attention`: fuse decomposed attention into one node, and legalize attention nodes for the backend."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ryzen_compile.backends.traits import find_traits
from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import KV_STATIC, TYPES_NO_FLOAT64

if TYPE_CHECKING:
    import onnx_ir as ir

ONNX_OPSET = 23
"""The opset that introduced Attention."""
TENSORRT_OPSET = 24
"""The opset of the function body of TRT_Attention."""


@dataclass(frozen=True, kw_only=True)
class Attention(Pass):
    """Fuse MatMul, scale, mask, Softmax, MatMul into one attention node, and legalize attention for the backend.

    For TensorRT, every attention becomes a TRT_Attention that the parser accepts and the builder builds: with a fused kernel if
    there is one, else decomposed by the builder. Attention that no TensorRT attention computes is decomposed into other ops.
    """

    name: ClassVar[str] = "attention"
    invalidates: ClassVar[frozenset[Property]] = frozenset({KV_STATIC, TYPES_NO_FLOAT64})

    to: Literal["auto", "onnx", "tensorrt"] = "auto"
    """`onnx`: fuse into ONNX Attention. `tensorrt`: fuse into TRT_Attention, and legalize every ONNX Attention. `auto`:
    `tensorrt` for the TensorRT backends; for other backends `onnx`, for grouped-query attention only (it saves the repeated
    keys and values): on a CPU, other attention is as fast decomposed."""
    strict: bool = False
    """Whether the TensorRT build fails if there is no fused kernel for an attention (else the builder decomposes it), and the
    pass is refused if TRT_Attention cannot express an attention (else the pass decomposes it)."""

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Estimate the node count from the Softmax nodes: one fused attention replaces about six nodes."""
        ops = Counter(node.op_type for node in model.graph.all_nodes())
        softmaxes, fused = ops["Softmax"], ops["Attention"] + ops["GroupQueryAttention"] + ops["MultiHeadAttention"]
        return PassEstimate(
            nodes=-5 * softmaxes,
            reason=f"{softmaxes} softmaxes, of which one attention node replaces about six nodes; {fused} attention nodes, "
            "which are legalized",
        )

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Fuse and legalize the attention of `model` in place; on a refusal `model` is unchanged."""
        from ryzen_compile.ir.edit.builder import ModelInfo
        from ryzen_compile.ir.edit.transaction import transaction
        from ryzen_passes.attention.grouped_query import decompose_grouped_query
        from ryzen_passes.attention.legalize import legalize_attention
        from ryzen_passes.attention_fusion import fuse_attention

        native = "ryzen::TRT_Attention" in find_traits(context.backend).native_ops
        if not (self.to == "tensorrt" or (self.to == "auto" and native)):
            model_info = ModelInfo(model)
            change = fuse_attention(model_info, ONNX_OPSET, only_grouped_query=self.to == "auto")
            return change if self.to == "onnx" else decompose_grouped_query(model_info, change)

        def rewrite_for_tensorrt(model: ir.Model) -> Change | Refusal:
            model_info = ModelInfo(model)
            return legalize_attention(model_info, fuse_attention(model_info, TENSORRT_OPSET), strict=self.strict)

        # With `strict`, a refusal can come after some nodes are rewritten.
        return transaction(model, rewrite_for_tensorrt) if self.strict else rewrite_for_tensorrt(model)
