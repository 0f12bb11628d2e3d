"""value-norm: the norm of the value."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scoring import Scorer, StaticCacheLayer, TorchScorer

if TYPE_CHECKING:
    import torch


class _TorchValueNorm(TorchScorer):
    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return values.float().norm(dim=-1)


class ValueNormScorer(Scorer):
    """Score |v|: the Euclidean norm of the value v (head_size,).

    Attention Score is Not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also Matters, arXiv
    2406.12335, multiplies attention by the norm |v|_1. This is the norm alone, and Euclidean.
    """

    name: ClassVar[str] = "value-norm"
    description: ClassVar[str] = "keeps values with a large norm"
    paper: ClassVar[str] = "the value norm term of arXiv 2406.12335"
    torch_form: ClassVar[type[TorchScorer]] = _TorchValueNorm

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the norms of the step's values."""
        return self.context.norm(before, layer.value.update)
