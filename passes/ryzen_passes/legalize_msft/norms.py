"""Rules for SimplifiedLayerNormalization and SkipSimplifiedLayerNormalization, which are RMS norms."""

from __future__ import annotations

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import float_attribute, int_attribute
from ryzen_compile.ir.edit.builder import replace_value
from ryzen_compile.ir.patterns import Match, MatchFailure, NodePattern, RewriteRule
from ryzen_passes.legalize_msft.contrib_writer import MSFT_DOMAIN, ContribWriter


def _write_rms_norm(writer: ContribWriter, node: ir.Node, value: ir.Value, weight: ir.Value) -> None:
    axis, epsilon = int_attribute(node, "axis", -1), float_attribute(node, "epsilon", 1e-5)
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
        _write_rms_norm(context, match.node, match["value"], match["weight"])


class LegalizeContribSimplifiedLayerNorm(LegalizeSimplifiedLayerNorm):
    """The same op in the domain `com.microsoft`."""

    pattern = NodePattern("SimplifiedLayerNormalization", ("value", "weight", "*"), domain=MSFT_DOMAIN)


class LegalizeSkipSimplifiedLayerNorm(RewriteRule[ContribWriter, None]):
    """SkipSimplifiedLayerNormalization becomes a sum, and the RMSNormalization of the sum."""

    pattern = NodePattern("SkipSimplifiedLayerNormalization", ("value", "skip", "weight", "bias?", "*"), domain=MSFT_DOMAIN)

    def check(self, match: Match, context: ContribWriter) -> MatchFailure | None:
        """Mean and inverse deviation, outputs 1 and 2, must not be used."""
        if any(output.uses() for output in match.node.outputs[1:3]):
            return MatchFailure.at("has statistics outputs that are used", match.node)
        return None

    def rewrite(self, match: Match, context: ContribWriter) -> None:
        """Write the sum, which is output 3, and its norm."""
        node, bias = match.node, match.get("bias")
        total = context.op(node, "Add", [match["value"], match["skip"]])
        if bias is not None:
            total = context.op(node, "Add", [total, bias])
        if len(node.outputs) > 3:
            replace_value(node.outputs[3], total)
        _write_rms_norm(context, node, total, match["weight"])
