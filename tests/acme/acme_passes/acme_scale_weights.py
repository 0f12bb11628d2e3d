"""acme-scale-weights: a defective pass that declares to be exact and scales weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class ScaleWeights(Pass):
    """Multiply every weight matrix by 1.001."""

    name: ClassVar[str] = "acme-scale-weights"

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Return an empty estimate."""
        return PassEstimate()

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Scale in place."""
        import numpy as np
        import onnx_ir as ir

        changed = []
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2:
                value.const_value = ir.Tensor(tensor.numpy() * np.float32(1.001), name=value.name)
                changed.append(value.name or "")
        return Change(changed=tuple(changed), summary="weights scaled")
