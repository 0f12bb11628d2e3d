"""Attention: write attention that is spelled out as one node, in a form that the backend can fuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import KV_STATIC

if TYPE_CHECKING:
    import onnx_ir as ir

ONNX_OPSET = 23
"""The opset that Attention came with."""
TENSORRT_OPSET = 24
"""The opset of TRT_Attention's body."""


@dataclass(frozen=True, kw_only=True)
class Attention(Pass):
    """Turn MatMul - scale - mask - Softmax - MatMul into one attention, and legalise attention for the backend.

    For TensorRT every attention becomes a TRT_Attention that its parser takes and that builds: fused where there is a kernel
    for it, decomposed by the builder where there is none. What no attention of TensorRT computes is written out in other ops.
    """

    name: ClassVar[str] = "attention"
    invalidates: ClassVar[frozenset[Property]] = frozenset({KV_STATIC})

    to: Literal["auto", "onnx", "tensorrt"] = "auto"
    """`onnx`: ONNX Attention. `tensorrt`: TRT_Attention, and every ONNX Attention legalised. `auto`: `tensorrt` for its
    backends; elsewhere `onnx`, and only where heads share keys, which are then no longer repeated: other attention is as fast
    on a CPU when it is written out."""
    strict: bool = False
    """Whether a build by TensorRT is to fail where it has no fused kernel for an attention, in place of decomposing it, and
    attention that no node of TensorRT can say is refused, in place of writing it out."""

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Count the softmaxes: an attention that is found takes the place of about six nodes."""
        softmaxes = sum(node.op_type == "Softmax" for node in model.graph.all_nodes())
        return PassEstimate(nodes=-5 * softmaxes, reason=f"{softmaxes} softmaxes, in each attention about six nodes become one")

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Raise and legalise in place."""
        tensorrt = self.to == "tensorrt" or (self.to == "auto" and context.backend.startswith("tensorrt"))
        from ryzen_compile.ir.edit.builder import ModelInfo, replace_model
        from ryzen_passes.attention.fuse import fuse_attention
        from ryzen_passes.attention.grouped_query import decompose_grouped_query
        from ryzen_passes.attention.legalize import legalize_attention

        if not tensorrt:
            known = ModelInfo(model)
            change = fuse_attention(known, ONNX_OPSET, only_grouped_query=self.to == "auto")
            return change if self.to == "onnx" else decompose_grouped_query(known, change)
        # What is strict may refuse when half is done.
        known = ModelInfo(model.clone() if self.strict else model)
        outcome = legalize_attention(known, fuse_attention(known, TENSORRT_OPSET), strict=self.strict)
        if self.strict and isinstance(outcome, Change):
            replace_model(model, known.model)
        return outcome
