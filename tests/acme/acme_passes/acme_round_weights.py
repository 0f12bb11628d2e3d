"""acme-round-weights: a lossy pass that rounds weights to a few levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ryzen_compile.spec.fidelity import Fidelity, Lossy
from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch


@dataclass(frozen=True, kw_only=True)
class RoundWeights(Pass):
    """Round every weight matrix to `levels` values between its extremes."""

    name: ClassVar[str] = "acme-round-weights"

    levels: int
    """Number of values, at least 2."""
    floor: float
    """The smallest accepted cosine similarity with the source."""

    @property
    def fidelity(self) -> Fidelity:
        """Lossy by the smallest cosine similarity of an output vector."""
        return Lossy("cosine", self.floor)

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Return an empty estimate: the element types stay as they are."""
        return PassEstimate(reason="no change of size")

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Round in place."""
        import onnx_ir as ir

        changed = []
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
                continue
            value.const_value = ir.Tensor(self._round(tensor.numpy()), name=value.name)
            changed.append(value.name or "")
        return Change(changed=tuple(changed), summary=f"{len(changed)} weights rounded to {self.levels} levels")

    def torch_equivalent(self, module: torch.nn.Module) -> torch.nn.Module:
        """Round the same matrices in PyTorch."""
        import torch

        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(torch.from_numpy(self._round(parameter.numpy(force=True))))
        return module

    def _round(self, weight: np.ndarray) -> np.ndarray:
        import numpy as np

        step = np.float32((weight.max() - weight.min()) / (self.levels - 1))
        rounded: np.ndarray = np.rint(weight / step).astype(np.float32) * step
        return rounded
