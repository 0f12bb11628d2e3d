"""knorm: the negative norm of the key."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scoring import Scorer, StaticCacheLayer, TorchScorer

if TYPE_CHECKING:
    import torch


class _TorchKeyNorm(TorchScorer):
    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return -keys.float().norm(dim=-1)


class KeyNormScorer(Scorer):
    """Score -|k|: the negative Euclidean norm of the key k (head_size,), as attention reads it.

    A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430: keys with a small norm receive
    much attention.
    """

    name: ClassVar[str] = "knorm"
    description: ClassVar[str] = "keeps keys with a small norm"
    paper: ClassVar[str] = "Devoto et al. 2024, arXiv 2406.11430"
    torch_form: ClassVar[type[TorchScorer]] = _TorchKeyNorm

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the negative norms of the step's keys."""
        return self.context.op(before, "Neg", [self.context.norm(before, layer.key.update)])
