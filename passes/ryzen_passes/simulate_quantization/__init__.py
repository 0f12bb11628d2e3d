"""The pass `simulate-quantization`: compute 8-bit arithmetic with zero points in float32, for backends without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from ryzen_compile.backends.traits import BackendTraits
from ryzen_compile.spec.fidelity import Fidelity, Tolerance
from ryzen_compile.spec.legalization_pass import GraphContents, LegalizationPass
from ryzen_compile.spec.passes import Change, PassContext, PassEstimate, Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

_OPS = frozenset(
    f"::{name}"
    for name in (
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "QLinearMatMul",
        "QLinearConv",
    )
)

_HINT = "for GPUs, build the model before it was quantized"


@dataclass(frozen=True, kw_only=True)
class SimulateQuantization(LegalizationPass):
    """Replace quantized arithmetic that the backend lacks by float32 arithmetic on the same integers.

    TensorRT computes QuantizeLinear and DequantizeLinear of int8 without zero points. It refuses zero points,
    DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime's `quantize_dynamic` writes, and reads uint8 as int8, which
    saturates at 127. Where one of several connected nodes is such a node, all of them are rewritten: integers become float32
    tensors of integral values, QuantizeLinear rounds and clips, and constants are dequantized once. The results are those of
    the integers, up to the rounding of sums above 2^24 (simulated quantization, Jacob et al. 2018, section 3).

    Quantized nodes in subgraphs and functions are not rewritten.
    """

    name: ClassVar[str] = "simulate-quantization"

    @classmethod
    def for_backend(cls, traits: BackendTraits, contents: GraphContents) -> Self | None:
        """Return the pass if the backend lacks 8-bit arithmetic with zero points and the graph is quantized."""
        return cls() if not traits.quantizes_asymmetrically and _OPS & set(contents.ops) else None

    def reason(self, backend: str) -> str:
        """Return why the pass is added."""
        return f"the model is quantized, and {backend} computes int8 without zero points only"

    @property
    def fidelity(self) -> Fidelity:
        """Within the criteria of fp32."""
        return Tolerance()

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Estimate weight bytes: the quantized constants of the nodes that are rewritten become float32."""
        from ryzen_passes.simulate_quantization.quantized_regions import find_regions

        regions, _ = find_regions(model)
        constants = {value for region in regions for node in region for value in node.inputs if value is not None}
        tensors = [value.const_value for value in constants if value.is_initializer()]
        growth = sum(
            4 * tensor.size - tensor.nbytes for tensor in tensors if tensor is not None and tensor.dtype.bitwidth <= 16
        )
        return PassEstimate(weight_bytes=growth, reason="quantized constants become float32")

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite `model` in place."""
        from ryzen_passes.simulate_quantization.float_rewriter import FloatRewriter
        from ryzen_passes.simulate_quantization.quantized_regions import find_regions

        regions, notes = find_regions(model)
        nodes = [node for region in regions for node in region]
        if not nodes:
            return Change(summary=f"no quantized node needs to be rewritten for {context.backend}", notes=tuple(notes))
        names = [node.name or node.op_type for node in nodes]
        rewriter = FloatRewriter(model)
        for region in regions:
            rewriter.rewrite(region)
        removed = rewriter.remove_dead_nodes(nodes)
        return Change(
            inserted=tuple(rewriter.inserted),
            removed=tuple(removed),
            summary=f"{len(names)} quantized nodes computed in float32",
            notes=tuple(notes),
            warnings=(
                f"{context.backend} computes the quantized part in float32: the engine has the accuracy of 8 bits without "
                f"their speed; {_HINT}",
            ),
            unmet_hint=_HINT,
        )
