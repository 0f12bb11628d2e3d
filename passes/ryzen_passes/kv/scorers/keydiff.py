"""keydiff: the negative cosine of the key and the mean direction of all keys so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from ryzen_passes.kv.scoring import Scorer, ScoringContext, StaticCacheLayer, StaticCacheView, Statistics, TorchScorer
from ryzen_passes.kv.scoring.scorer import FLOAT

if TYPE_CHECKING:
    import torch

_EPSILON = 1e-12
"""Minimum norm by which a key is divided."""


class _TorchKeyDiff(TorchScorer):
    _anchor: torch.Tensor | None = None
    """(batch, kv_heads, head_size)"""

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import normalize

        increment = normalize(keys.float(), dim=-1).sum(dim=2)
        self._anchor = increment if self._anchor is None else self._anchor + increment
        return self.rescore(keys, 0)

    def rescore(self, keys: torch.Tensor, seen_tokens: int) -> torch.Tensor:
        from torch.nn.functional import cosine_similarity

        assert self._anchor is not None
        return -cosine_similarity(keys.float(), self._anchor[:, :, None], dim=-1, eps=1e-12)

    def reset(self) -> None:
        super().reset()
        self._anchor = None


class KeyDiffScorer(Scorer):
    """Score -cos(k, a): k (head_size,) is the key, the anchor a (head_size,) is the sum of k / |k| over all tokens so far.

    KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained Environments, arXiv
    2504.15364. In the paper the anchor is the mean over the kept tokens. The sum over all tokens is one state vector per head,
    needs no key of an evicted token, and has a constant cost per step.
    """

    name: ClassVar[str] = "keydiff"
    description: ClassVar[str] = "keeps keys whose direction differs from the mean direction"
    paper: ClassVar[str] = "Park et al. 2025, arXiv 2504.15364"
    torch_form: ClassVar[type[TorchScorer]] = _TorchKeyDiff
    time_dependent: ClassVar[bool] = True

    def __init__(self, context: ScoringContext) -> None:
        super().__init__(context)
        self._layer_anchors: list[ir.Value] = []
        self._updated_anchors: list[ir.Value] = []

    @classmethod
    def problem(cls, view: StaticCacheView, statistics: Statistics | None) -> str | None:
        """Return a message if layers differ in their head sizes, else None."""
        sizes = sorted({layer.spec.key.head_size for layer in view.layers})
        return f"`keydiff` needs keys of one head size in all layers (got sizes {sizes})" if len(sizes) > 1 else None

    def begin(self) -> None:
        """Add the anchors of all layers as one state (batch, layers * kv_heads, head_size) float32."""
        context = self.context
        heads = [layer.spec.kv_heads for layer in context.layers]
        shape = ir.Shape((context.batch, sum(heads), context.layers[0].spec.key.head_size))
        self._anchor = context.states.add_input(f"anchor{context.state_suffix}", FLOAT, shape)
        self._layer_anchors = context.writer.split(context.insertion_point, self._anchor, heads)

    def score_new_tokens(self, before: ir.Node, layer: StaticCacheLayer) -> ir.Value:
        """Return the scores relative to the anchor that includes the tokens of the step."""
        context, int64_vector = self.context, self.context.writer.int64_vector
        unit = self._normalize(before, context.to_float32(before, layer.key.update))
        is_token = context.op(before, "Unsqueeze", [context.token_mask, int64_vector(1, 3)])
        counted = context.op(before, "Where", [is_token, unit, context.writer.scalar(0.0, FLOAT)], FLOAT)
        increment = context.op(before, "ReduceSum", [counted, int64_vector(2)], keepdims=0)
        anchor = context.op(before, "Add", [self._layer_anchors[len(self._updated_anchors)], increment])
        self._updated_anchors.append(anchor)
        return self._score(before, unit, anchor)

    def rescore(self, keys: ir.Value, positions: ir.Value) -> ir.Value:
        """Return the scores relative to the anchor before the step."""
        return self._score(self.context.insertion_point, self._normalize(self.context.insertion_point, keys), self._anchor)

    def end(self, last: ir.Node) -> None:
        """Write the updated anchors to the state output."""
        anchors = (
            self._updated_anchors[0]
            if len(self._updated_anchors) == 1
            else self.context.op(last, "Concat", self._updated_anchors, axis=1)
        )
        self.context.states.set_output(f"anchor{self.context.state_suffix}", anchors)

    def _normalize(self, before: ir.Node, keys: ir.Value) -> ir.Value:
        context = self.context
        norm = context.op(before, "Max", [context.norm(before, keys, keepdims=True), context.writer.scalar(_EPSILON, FLOAT)])
        return context.op(before, "Div", [keys, norm])

    def _score(self, before: ir.Node, unit: ir.Value, anchor: ir.Value) -> ir.Value:
        context = self.context
        column = context.op(before, "Unsqueeze", [self._normalize(before, anchor), context.writer.int64_vector(3)])
        cosine = context.op(before, "Squeeze", [context.op(before, "MatMul", [unit, column]), context.writer.int64_vector(3)])
        return context.op(before, "Neg", [cosine])
