"""The pass `token-merge`: merge similar tokens between the attention and the MLP of encoder blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ryzen_compile.spec.fidelity import Fidelity, Lossy
from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class TokenMerge(Pass):
    """Merge similar tokens of an encoder step by step, so that later blocks compute fewer of them.

    A step follows the attention of a block (ToMe, Bolya et al. 2022, arXiv:2210.09461). The tokens are divided alternately into
    two lists; each token of the first is paired with the token of the second with the largest cosine similarity of their hidden
    states, and the most similar pairs become their mean, weighted by the number of tokens that each stands for. Later
    attentions add the logarithm of that number to the scores of a key. Padding is merged first, and never with tokens. After
    the last block every token has the row of the merged token that stands for it, so that outputs keep their shape.

    The number of merged tokens is computed from the length of the sequence, with padding, when the model runs. The graph must
    be folded, and its attention not yet fused into TRT_Attention. Decoders are refused. Which tokens are paired depends on
    small differences: passes that round, such as `precision`, run before this one.
    """

    name: ClassVar[str] = "token-merge"

    ratio: float = 0.5
    """The share of the tokens that all steps together remove, in (0, 1)."""
    schedule: Literal["increasing", "uniform", "decreasing"] = "increasing"
    """How the steps divide `ratio`: in proportion to the number of the block, counted from 0; equally; or reversed."""
    protect: int = 1
    """The number of tokens at the start that are not merged, such as a class token."""
    floor: float = 0.98
    """The smallest accepted cosine similarity of an output vector with that of the source."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"`ratio` must be between 0 and 1 (got {self.ratio:g})")
        if self.protect < 0:
            raise ValueError(f"`protect` must be at least 0 (got {self.protect})")
        Lossy("cosine", self.floor)  # raises ValueError for a floor out of range

    @property
    def fidelity(self) -> Fidelity:
        """Lossy: the cosine similarity of the outputs."""
        return Lossy("cosine", self.floor)

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate | Refusal:
        """Return the share of the tokens that the MLPs of all blocks compute."""
        from ryzen_passes.residual_stream import find_blocks

        blocks = len(find_blocks(model))
        if not blocks:
            return _no_blocks(model)
        shares = self._shares(blocks)
        left = [1 - sum(shares[: index + 1]) for index in range(blocks)]
        return PassEstimate(reason=f"{sum(left) / blocks:.0%} of the tokens in the MLPs of {blocks} blocks")

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Insert the merge steps into `model` in place; on a refusal `model` is unchanged."""
        from ryzen_passes.residual_stream import find_blocks
        from ryzen_passes.token_merge.rewrite import MergeConfig, merge_tokens

        blocks = len(find_blocks(model))
        if not blocks:
            return _no_blocks(model)
        return merge_tokens(model, MergeConfig(shares=self._shares(blocks), protect=self.protect))

    def _shares(self, blocks: int) -> tuple[float, ...]:
        """Return the share of the tokens of the sequence that each block merges."""
        weights = {
            "increasing": [*range(blocks)] if blocks > 1 else [1],
            "uniform": [1] * blocks,
            "decreasing": [*range(blocks - 1, -1, -1)] if blocks > 1 else [1],
        }[self.schedule]
        return tuple(self.ratio * weight / sum(weights) for weight in weights)


def _no_blocks(model: ir.Model) -> Refusal:
    location = model.graph.name or "the graph"
    return Refusal(reason="no blocks of a transformer are found", location=location, hint="fold the graph first")
