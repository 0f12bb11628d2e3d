"""Attention: write attention that is spelled out as one node, in a form that the backend can fuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ryzen_compile.spec.passes import Change, Context, Estimate, Pass, Refusal
from ryzen_compile.spec.properties import Fact
from ryzen_passes.properties import KV_FIXED

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
    breaks: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED})

    to: Literal["auto", "onnx", "tensorrt"] = "auto"
    """`onnx`: ONNX Attention. `tensorrt`: TRT_Attention, and every ONNX Attention legalised. `auto`: `tensorrt` for its
    backends; elsewhere `onnx`, and only where heads share keys, which are then no longer repeated: other attention is as fast
    on a CPU when it is written out."""
    strict: bool = False
    """Whether a build by TensorRT is to fail where it has no fused kernel for an attention, in place of decomposing it, and
    attention that no node of TensorRT can say is refused, in place of writing it out."""

    def estimate(self, model: ir.Model, context: Context) -> Estimate:
        """Count the softmaxes: an attention that is found takes the place of about six nodes."""
        softmaxes = sum(node.op_type == "Softmax" for node in model.graph.all_nodes())
        return Estimate(nodes=-5 * softmaxes, why=f"{softmaxes} softmaxes, in each attention about six nodes become one")

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        """Raise and legalise in place."""
        tensorrt = self.to == "tensorrt" or (self.to == "auto" and context.backend.startswith("tensorrt"))
        from ryzen_compile.ir.edit.builder import Known, adopt
        from ryzen_passes.attention.fuse import raise_all
        from ryzen_passes.attention.grouped_query import write_grouped
        from ryzen_passes.attention.legalize import legalise

        if not tensorrt:
            known = Known(model)
            change = raise_all(known, ONNX_OPSET, only_shared=self.to == "auto")
            return change if self.to == "onnx" else write_grouped(known, change)
        # What is strict may refuse when half is done.
        known = Known(model.clone() if self.strict else model)
        outcome = legalise(known, raise_all(known, TENSORRT_OPSET), strict=self.strict)
        if self.strict and isinstance(outcome, Change):
            adopt(model, known.model)
        return outcome
