"""position: the position of the token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scoring import Scorer, StaticCacheLayer, TorchScorer

if TYPE_CHECKING:
    import torch


class _TorchPosition(TorchScorer):
    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return positions.float()[:, None].expand(keys.shape[:3])


class PositionScorer(Scorer):
    """Score p: the position p of the token in its sequence, from 0, in float32; exact up to 2^24.

    Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453, keeps the same tokens, but attends with their
    positions inside the cache (kv-window). Here keys keep their original positions.
    """

    name: ClassVar[str] = "position"
    description: ClassVar[str] = "keeps the latest tokens: a sliding window after the sinks"
    paper: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"
    torch_form: ClassVar[type[TorchScorer]] = _TorchPosition

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the positions of the step's tokens, for each head."""
        return self.context.expand_to_heads(before, self.context.position_score(before), layer)
