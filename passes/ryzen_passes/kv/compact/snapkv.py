"""snapkv: the attention that the last queries of a step give to the token; tokens appended later have higher scores.

kv-compact applies it. It reads the queries of a step, which scores of kv-evict do not, so it is not a value of `score`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scoring import Scorer, StaticCacheLayer, TorchScorer
from ryzen_passes.kv.scoring.scorer import FLOAT

if TYPE_CHECKING:
    import torch

_APPENDED_SCORE_OFFSET = 2
"""Puts appended tokens above attention scores, which are mean probabilities and at most 1."""


class TorchSnapKv(TorchScorer):
    """The same score in PyTorch."""

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the scores (batch, kv_heads, seq) of the step's tokens as appended tokens."""
        return positions.float()[:, None].expand(keys.shape[:3]) + 2

    def score_prompt(
        self, attention: torch.Tensor, positions: torch.Tensor, in_window: torch.Tensor, pooling: int
    ) -> torch.Tensor:
        """Return the scores (batch, kv_heads, rows) of slots and tokens; the parameters are as in `SnapKvScorer`."""
        from torch.nn.functional import avg_pool1d

        pooled = avg_pool1d(attention.masked_fill(in_window, 0.0), pooling, stride=1, padding=pooling // 2)
        return pooled.where(~in_window, positions.float() + 2)


class SnapKvScorer(Scorer):
    """Score of a prompt, for slots from before the step and the step's tokens, in each head independently.

        p      = softmax over slots and tokens of the last `window` queries of the row, masked as in attention
        a      = mean of p over these queries and the query heads that share the kv-head; 0 for the tokens of the window
        score  = mean of a over `pooling` neighbors, in memory order of slots and tokens, with zero padding;
                 position + 2 for the tokens of the window

    The score of tokens that are appended after a prompt is the position + 2 in float32, exact up to 2^24.

    SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469.
    """

    name: ClassVar[str] = "snapkv"
    description: ClassVar[str] = "keeps prompt tokens that the last prompt queries attend to, and later tokens"
    paper: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469"
    torch_form: ClassVar[type[TorchScorer]] = TorchSnapKv

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores of the step's tokens as appended tokens."""
        context = self.context
        return context.expand_to_heads(before, self._appended_score(before, context.position_score(before)), layer)

    def score_prompt(
        self, before: ir.Node, attention: ir.Value, positions: ir.Value, in_window: ir.Value, pooling: int
    ) -> ir.Value:
        """Return the scores (batch, kv_heads, rows) float32 of slots and tokens.

        `attention` (batch, kv_heads, rows) float32 is the mean of p, `positions` (batch, kv_heads, rows) int32, and `in_window`
        (batch, kv_heads, rows) bool is true for the tokens of the window. `pooling` is odd.
        """
        op = self.context.op
        score = op(before, "Where", [in_window, self.context.writer.scalar(0.0, FLOAT), attention], FLOAT)
        if pooling > 1:
            pads = [pooling // 2, pooling // 2]
            score = op(before, "AveragePool", [score], kernel_shape=[pooling], pads=pads, count_include_pad=1)
        appended = self._appended_score(before, op(before, "Cast", [positions], FLOAT, to=int(FLOAT)))
        return op(before, "Where", [in_window, appended, score], FLOAT)

    def _appended_score(self, before: ir.Node, position: ir.Value) -> ir.Value:
        return self.context.op(before, "Add", [position, self.context.writer.scalar(_APPENDED_SCORE_OFFSET, FLOAT)])
