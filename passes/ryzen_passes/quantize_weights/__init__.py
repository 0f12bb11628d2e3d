"""The pass `quantize-weights`: store weights as integers or floats of 8 or 4 bits with scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ryzen_compile.backends.traits import find_traits
from ryzen_compile.spec.fidelity import Fidelity, Lossy
from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_passes.quantize_weights.rewrite import WeightFormat

_FLOORS = {"int8": 0.99, "fp8": 0.97, "int4": 0.8}


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Round the weights of matrix products, convolutions and embeddings to codes, with a scale for each block.

    A block is `block` consecutive elements of the axis over which a product sums, or all of that axis; its scale is the largest
    magnitude of the block divided by the largest code (Jacob et al. 2018, without zero points), or one that `algorithm` finds.
    Activations keep their type. An embedding, also one that is tied to the output projection, looks up rows of codes.

    A graph for TensorRT reads codes through DequantizeLinear. ONNX Runtime computes the weights once when it loads the graph,
    so that it runs as fast as before the pass: the file is smaller, and the memory is not.

    Weights in subgraphs, and weights with fewer than 4,096 elements, are left.
    """

    name: ClassVar[str] = "quantize-weights"

    format: Literal["int8", "int4", "fp8"] = "int8"
    """The type of the codes: integers in [-127, 127] or [-7, 7], or float8_e4m3fn. With negative scales, which ONNX Runtime
    takes, integers of 4 bits are in [-8, 7]. Embeddings have int8 instead of fp8, and
    convolutions no int4."""
    block: int = 0
    """The elements that share a scale; 0: 32 for int4, else all elements that a product sums over."""
    algorithm: Literal["rtn", "search", "gptq"] = "rtn"
    """`rtn`: the scale represents the largest magnitude, and elements are rounded to nearest. `search`: of 11 scales down to a
    half of that one, the one with the smallest squared error. `gptq`: as `search`, and the error of each rounded element is
    compensated in the elements after it, with the second moments of the activations on samples; weights that are only looked
    up, and those of convolutions, are rounded as with `search`."""
    skip: tuple[str, ...] = ()
    """Nodes whose weights are left: patterns of node names or op types; `*` matches any characters, `?` matches one."""
    floor: float | None = None
    """The smallest accepted cosine similarity of an output vector with that of the source; default: 0.99 for int8, 0.97 for
    fp8, 0.8 for int4."""

    def __post_init__(self) -> None:
        if self.block < 0:
            raise ValueError(f"`block` must be at least 1, or 0 for the default (got {self.block})")
        Lossy("cosine", self.floor)  # raises ValueError for a floor out of range

    @property
    def needs_calibration(self) -> bool:
        """Whether the algorithm measures activations."""
        return self.algorithm == "gptq"

    @property
    def depends_on_node_names(self) -> bool:
        """Whether `skip` selects nodes, possibly by name."""
        return bool(self.skip)

    @property
    def fidelity(self) -> Fidelity:
        """Lossy: the cosine similarity of the outputs."""
        return Lossy("cosine", self.floor if self.floor is not None else _FLOORS[self.format])

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate | Refusal:
        """Return the exact change of the weight bytes."""
        from ryzen_passes.quantize_weights.rewrite import plan_weights

        plans, _ = plan_weights(model, self._weight_format(context), self.skip)
        if isinstance(plans, Refusal):
            return plans
        return PassEstimate(weight_bytes=-sum(item.saved_bytes for item in plans), reason=f"{len(plans)} weights")

    def search_space(self, model: ir.Model, context: PassContext) -> Mapping[str, Sequence[Any]]:
        """Return the formats."""
        return {"format": ("int8", "int4")}

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Quantize the weights of `model` in place."""
        from ryzen_passes.quantize_weights.rewrite import quantize_weights

        return quantize_weights(model, self._weight_format(context), self.skip, context)

    def _weight_format(self, context: PassContext) -> WeightFormat:
        from ryzen_passes.quantize_weights.codes import FORMATS, SIGNED_INT4
        from ryzen_passes.quantize_weights.rewrite import WeightFormat

        folds = not find_traits(context.backend).keeps_weights_quantized
        code_format = SIGNED_INT4 if self.format == "int4" and folds else FORMATS[self.format]
        return WeightFormat(code_format=code_format, block=self.block, algorithm=self.algorithm, folds=folds)
