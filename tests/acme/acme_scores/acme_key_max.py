"""acme-key-max: the negative largest magnitude of the key."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scoring import Scorer, StaticCacheLayer, TorchScorer

if TYPE_CHECKING:
    import torch


class TorchKeyMax(TorchScorer):
    """The same score in PyTorch."""

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the scores (batch, kv_heads, seq) of keys (batch, kv_heads, seq, head_size)."""
        return -keys.float().abs().amax(dim=-1)


class KeyMaxScorer(Scorer):
    """Score -max |k_i|: the negative maximum norm of the key k (head_size,), as attention reads it."""

    name: ClassVar[str] = "acme-key-max"
    description: ClassVar[str] = "keeps keys without large elements"
    torch_form: ClassVar[type[TorchScorer]] = TorchKeyMax

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Insert the nodes that score the step's tokens of a layer; return the scores (batch, kv_heads, seq) float32."""
        context = self.context
        magnitudes = context.op(before, "Abs", [context.to_float32(before, layer.key.update)])
        largest = context.op(before, "ReduceMax", [magnitudes, context.writer.int64_vector(-1)], keepdims=0)
        return context.op(before, "Neg", [largest])
