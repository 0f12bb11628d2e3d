"""The pass `precision`: convert nodes to fp16 or bf16 if that is numerically safe, or a whole model to fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ryzen_compile.backends.traits import find_traits
from ryzen_compile.spec.dtypes import Precision
from ryzen_compile.spec.fidelity import Exact, Fidelity, Tolerance
from ryzen_compile.spec.passes import Change, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.precision_pass import PrecisionPass
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import TYPES_FLOAT32

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class ConvertPrecision(PrecisionPass):
    """Convert nodes and weights to the element type `to`.

    TensorRT computes a graph in the types of its tensors. With `fp16` or `bf16`, every node is converted to half precision
    except the nodes to which a precision rule applies: sums, exponentials, positions, constants out of range and so on, and
    with calibration samples also nodes whose tensors come close to the range of the type. Cheap nodes between them stay fp32
    too if that saves casts. With `fp32`, a half-precision model is converted to compute in fp32 throughout.

    KV cache states with a static shape, as `kv-static` produces them, change type with the node that writes them: no caller
    sees them, and a step then reads and writes half the bytes. Other states keep their types.

    Subgraphs of control flow, local functions without a declared op, and ops of unknown domains keep their types.
    """

    name: ClassVar[str] = "precision"
    is_default: ClassVar[bool] = True
    invalidates: ClassVar[frozenset[Property]] = frozenset({TYPES_FLOAT32})

    to: Literal["fp16", "bf16", "fp32"]
    """The element type to compute in."""
    keep: tuple[str, ...] = ()
    """Nodes that stay fp32: patterns of node names or op types; `*` matches any characters, `?` matches one."""
    force: tuple[str, ...] = ()
    """Nodes that are converted even if a rule applies, as patterns like those of `keep`; for models known to stay in range."""
    io: bool = False
    """Whether graph inputs and outputs are converted too."""
    range_margin: float = 4.0
    """The factor by which a measured magnitude must stay below the largest value of the type; at least 1."""

    @property
    def output_precision(self) -> Precision:
        """The option `to`."""
        return self.to

    @classmethod
    def with_precision(cls, precision: Precision) -> Self:
        """Return the conversion to `precision`."""
        return cls(to=precision)

    @property
    def needs_calibration(self) -> bool:
        """True: the ranges of tensors decide which nodes stay fp32."""
        return True

    @property
    def fidelity(self) -> Fidelity:
        """Within the criteria of the half-precision type; conversion to fp32 is exact."""
        return Exact() if self.to == "fp32" else Tolerance()

    @property
    def depends_on_node_names(self) -> bool:
        """Whether `keep` or `force` selects nodes, possibly by name."""
        return bool(self.keep or self.force)

    def __post_init__(self) -> None:
        if not self.range_margin >= 1:
            raise ValueError(f"`range-margin` must be at least 1 (got {self.range_margin:g})")
        if self.to == "fp32":
            object.__setattr__(self, "ensures", frozenset({TYPES_FLOAT32}))
            object.__setattr__(self, "invalidates", frozenset())

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Estimate weight bytes: fp32 weights halve, half-precision weights double."""
        import onnx_ir as ir

        to_fp32 = self.to == "fp32"
        source_dtypes = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16} if to_fp32 else {ir.DataType.FLOAT}
        tensors = [value.const_value for value in model.graph.initializers.values()]
        converted_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None and tensor.dtype in source_dtypes)
        return PassEstimate(
            weight_bytes=converted_bytes if to_fp32 else -converted_bytes // 2,
            reason=f"{converted_bytes} bytes of weights change type",
        )

    def search_space(self, model: ir.Model, context: PassContext) -> Mapping[str, Sequence[Any]]:
        """Return the element types to compute in: those that the opset of `model` and the backend of `context` support."""
        from ryzen_passes.opset import standard_opset
        from ryzen_passes.precision.rules import MIN_BF16_OPSET

        if not find_traits(context.backend).computes_half_precision:
            return {}
        return {"to": ("fp32", "fp16", "bf16") if standard_opset(model) >= MIN_BF16_OPSET else ("fp32", "fp16")}

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Convert `model` in place."""
        from ryzen_compile.ir.analysis.element_types import HALF_TYPES
        from ryzen_compile.ir.interface_metadata import record_declared_dtypes
        from ryzen_passes.precision.rules import HALF_TYPES_BY_NAME
        from ryzen_passes.precision.to_half import to_half
        from ryzen_passes.to_fp32 import to_fp32

        change: Change | Refusal
        if self.to == "fp32":
            change = to_fp32(model, HALF_TYPES, io=self.io)
        else:
            change = to_half(
                model,
                context,
                HALF_TYPES_BY_NAME[self.to],
                keep=self.keep,
                force=self.force,
                io=self.io,
                range_margin=self.range_margin,
            )
        if self.io:
            record_declared_dtypes(model)
        return change
