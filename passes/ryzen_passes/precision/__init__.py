"""Precision: compute in half precision where that is safe, and in fp32 where it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import TYPES_FLOAT32

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class ConvertPrecision(Pass):
    """Give tensors the element type `to`.

    TensorRT computes a graph in the types that it is written in. With `fp16` or `bf16` every node goes to half precision but
    those that a rule holds back: sums, exponentials, positions, constants out of range and so on, and where there
    are calibration samples whatever came near the end of the type's range. Cheap nodes between those stay fp32 with them where
    that saves casts. With `fp32` a half-precision model becomes one that computes in fp32 throughout.

    Keys and values that live across steps in fixed shapes, as kv-static leaves them, change type with the node that writes
    them: they are the engine's own, and a step reads and writes half the bytes. Other states keep theirs.

    Subgraphs of control flow, local functions that no declared op stands for, and ops of unknown domains keep their types.
    """

    name: ClassVar[str] = "precision"
    needs_calibration: ClassVar[bool] = True
    invalidates: ClassVar[frozenset[Property]] = frozenset({TYPES_FLOAT32})

    to: Literal["fp16", "bf16", "fp32"]
    """The element type to compute in."""
    keep: tuple[str, ...] = ()
    """Nodes that stay fp32, by their names or op types; `*` and `?` stand for any characters and for any one."""
    force: tuple[str, ...] = ()
    """Nodes that no rule holds back, likewise: for models known to stay in range."""
    io: bool = False
    """Whether inputs and outputs change type too."""
    range_margin: float = 4.0
    """How many times what was measured must fit into the type, at least 1."""

    @property
    def depends_on_node_names(self) -> bool:
        """Whether nodes are named."""
        return bool(self.keep or self.force)

    def __post_init__(self) -> None:
        if not self.range_margin >= 1:
            raise ValueError(f"headroom is {self.range_margin:g}, it takes 1 or more")
        if self.to == "fp32":
            object.__setattr__(self, "ensures", frozenset({TYPES_FLOAT32}))
            object.__setattr__(self, "invalidates", frozenset())

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Halve the fp32 weights, or double the half ones."""
        import onnx_ir as ir

        widens = self.to == "fp32"
        old = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16} if widens else {ir.DataType.FLOAT}
        tensors = [value.const_value for value in model.graph.initializers.values()]
        held = sum(tensor.nbytes for tensor in tensors if tensor is not None and tensor.dtype in old)
        return PassEstimate(weight_bytes=held if widens else -held // 2, reason=f"{held} bytes of weights change type")

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Retype `model` in place."""
        from ryzen_compile.ir.analysis.element_types import HALF_TYPES
        from ryzen_passes.precision.rules import HALF_TYPES_BY_NAME
        from ryzen_passes.precision.to_fp32 import to_fp32
        from ryzen_passes.precision.to_half import to_half

        if self.to == "fp32":
            return to_fp32(model, HALF_TYPES, io=self.io)
        return to_half(
            model,
            context,
            HALF_TYPES_BY_NAME[self.to],
            keep=self.keep,
            force=self.force,
            io=self.io,
            range_margin=self.range_margin,
        )
