"""The rule for RotaryEmbedding of `com.microsoft`: the heads may be merged, and a part of each head may be rotated."""

from __future__ import annotations

from ryzen_compile.ir.analysis.constants import int_attribute
from ryzen_compile.ir.edit.builder import replace_value
from ryzen_compile.ir.patterns import Match, MatchFailure, NodePattern, RewriteRule
from ryzen_passes.legalize_msft.contrib_writer import MSFT_DOMAIN, ContribWriter


class LegalizeRotaryEmbedding(RewriteRule[ContribWriter, None]):
    """RotaryEmbedding over (batch, seq, heads * size) or (batch, heads, seq, size) becomes the standard op of that name.

    Its tables have half the rotary dim as their last dim: the head size, or less for a partial rotation.
    """

    pattern = NodePattern("RotaryEmbedding", ("value", "positions", "cos", "sin"), domain=MSFT_DOMAIN)

    def check(self, match: Match, context: ContribWriter) -> MatchFailure | None:
        """The sequences must not be packed, and the head size must be known."""
        if int_attribute(match.node, "is_packed_batching", 0):
            return MatchFailure.at("takes sequences packed into one row (`is_packed_batching`)", match.node)
        if context.last_dim(match["cos"]) is None:
            return MatchFailure.at("has a cosine table of unknown width", match.node)
        if self._has_merged_heads(match, context) and self._head_size(match, context) is None:
            return MatchFailure.at("has an unknown head size: set `num_heads`", match.node)
        return None

    def rewrite(self, match: Match, context: ContribWriter) -> None:
        """Split the heads if they are merged, and rotate them."""
        node, value = match.node, match["value"]
        head_size, is_merged = self._head_size(match, context), self._has_merged_heads(match, context)
        if is_merged and head_size is not None:
            value = context.split_heads(node, value, head_size)
        tables, interleaved = (match["cos"], match["sin"]), int_attribute(node, "interleaved", 0)
        value = context.rotate(node, value, tables, match["positions"], interleaved=interleaved, head_size=head_size)
        replace_value(node.outputs[0], context.merge_heads(node, value) if is_merged else value)

    def _has_merged_heads(self, match: Match, context: ContribWriter) -> bool:
        return context.shapes.rank(match["value"]) in (3, None)

    def _head_size(self, match: Match, context: ContribWriter) -> int | None:
        """Return the head size, or None if it is unknown; a partial rotation states the number of heads."""
        width, heads = context.last_dim(match["value"]), int_attribute(match.node, "num_heads", 0)
        if not self._has_merged_heads(match, context):
            return width
        if heads and width is not None:
            return width // heads
        half = context.last_dim(match["cos"])
        return None if half is None or int_attribute(match.node, "rotary_embedding_dim", 0) else 2 * half
