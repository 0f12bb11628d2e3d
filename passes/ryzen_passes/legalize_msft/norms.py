"""Rules for the norms: SimplifiedLayerNormalization, which is an RMS norm, and the norms of sums (`Skip...`)."""

from __future__ import annotations

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import float_attribute, int_attribute
from ryzen_compile.ir.edit.builder import replace_value
from ryzen_compile.ir.patterns import Match, MatchFailure, NodePattern, RewriteRule
from ryzen_passes.legalize_msft.contrib_writer import MSFT_DOMAIN, ContribWriter

_EPSILON, _SKIP_EPSILON = 1e-5, 1e-12
"""The default `epsilon` of the norms of a tensor, and of those of a sum."""


def _write_rms_norm(writer: ContribWriter, node: ir.Node, value: ir.Value, weight: ir.Value, *, default_epsilon: float) -> None:
    axis, epsilon = int_attribute(node, "axis", -1), float_attribute(node, "epsilon", default_epsilon)
    replace_value(node.outputs[0], writer.op(node, "RMSNormalization", [value, weight], axis=axis, epsilon=epsilon))


class LegalizeSimplifiedLayerNorm(RewriteRule[ContribWriter, None]):
    """SimplifiedLayerNormalization, which ONNX Runtime registers in the standard domain, becomes RMSNormalization."""

    pattern = NodePattern("SimplifiedLayerNormalization", ("value", "weight", "*"))

    def check(self, match: Match, context: ContribWriter) -> MatchFailure | None:
        """Only the normalized tensor may be used."""
        if any(output.uses() for output in match.node.outputs[1:]):
            return MatchFailure.at("has outputs besides the normalized tensor that are used", match.node)
        return None

    def rewrite(self, match: Match, context: ContribWriter) -> None:
        """Write the RMSNormalization."""
        _write_rms_norm(context, match.node, match["value"], match["weight"], default_epsilon=_EPSILON)


class LegalizeContribSimplifiedLayerNorm(LegalizeSimplifiedLayerNorm):
    """The same op in the domain `com.microsoft`."""

    pattern = NodePattern("SimplifiedLayerNormalization", ("value", "weight", "*"), domain=MSFT_DOMAIN)


class LegalizeSkipSimplifiedLayerNorm(RewriteRule[ContribWriter, None]):
    """SkipSimplifiedLayerNormalization becomes a sum, and the RMSNormalization of the sum."""

    pattern = NodePattern("SkipSimplifiedLayerNormalization", ("value", "skip", "weight", "bias?", "*"), domain=MSFT_DOMAIN)

    def check(self, match: Match, context: ContribWriter) -> MatchFailure | None:
        """Mean and inverse deviation, outputs 1 and 2, must not be used."""
        return _check_statistics(match.node)

    def rewrite(self, match: Match, context: ContribWriter) -> None:
        """Write the sum, which is output 3, and its norm."""
        total = _write_sum(context, match)
        _write_rms_norm(context, match.node, total, match["weight"], default_epsilon=_SKIP_EPSILON)


class LegalizeSkipLayerNorm(RewriteRule[ContribWriter, None]):
    """SkipLayerNormalization becomes a sum, and the LayerNormalization of the sum over the last axis."""

    pattern = NodePattern("SkipLayerNormalization", ("value", "skip", "weight", "shift?", "bias?", "*"), domain=MSFT_DOMAIN)

    def check(self, match: Match, context: ContribWriter) -> MatchFailure | None:
        """Mean and inverse deviation, outputs 1 and 2, must not be used."""
        return _check_statistics(match.node)

    def rewrite(self, match: Match, context: ContribWriter) -> None:
        """Write the sum, which is output 3, and its norm."""
        node, shift = match.node, match.get("shift")
        total = _write_sum(context, match)
        inputs = [total, match["weight"], *([shift] if shift is not None else [])]
        epsilon = float_attribute(node, "epsilon", _SKIP_EPSILON)
        replace_value(node.outputs[0], context.op(node, "LayerNormalization", inputs, axis=-1, epsilon=epsilon))


def _check_statistics(node: ir.Node) -> MatchFailure | None:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:3]):
        return MatchFailure.at("has statistics outputs that are used", node)
    return None


def _write_sum(context: ContribWriter, match: Match) -> ir.Value:
    """Write the sum of the inputs `value` and `skip`, and of `bias` if there is one; it replaces output 3."""
    node, bias = match.node, match.get("bias")
    total = context.op(node, "Add", [match["value"], match["skip"]])
    if bias is not None:
        total = context.op(node, "Add", [total, bias])
    if len(node.outputs) > 3:
        replace_value(node.outputs[3], total)
    return total
