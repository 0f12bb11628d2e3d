"""Legalize ONNX Runtime contrib ops: replace `com.microsoft` attention, RoPE and norm ops by standard ONNX ops.

The ops are those that the model builder of ONNX Runtime GenAI writes. Each has one rule in `CONTRIB_RULES`; to support another
op, add its rule.
"""

from __future__ import annotations

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.edit.builder import ModelInfo, remove_dead_nodes
from ryzen_compile.ir.patterns import PatternNotMatched, RuleSet
from ryzen_passes.legalize_msft.attention import (
    LegalizeGroupQueryAttention,
    LegalizeMultiHeadAttention,
    declare_full_caches,
)
from ryzen_passes.legalize_msft.contrib_writer import MSFT_DOMAIN, SEQ_AXIS, ContribWriter
from ryzen_passes.legalize_msft.norms import (
    LegalizeContribSimplifiedLayerNorm,
    LegalizeSimplifiedLayerNorm,
    LegalizeSkipLayerNorm,
    LegalizeSkipSimplifiedLayerNorm,
)
from ryzen_passes.legalize_msft.rotary import LegalizeRotaryEmbedding
from ryzen_passes.opset import raise_opset

__all__ = ["CONTRIB_RULES", "MSFT_DOMAIN", "UnsupportedContribOp", "legalize_contrib_ops"]

_OPSET = 24

CONTRIB_RULES: RuleSet[ContribWriter, None] = RuleSet(
    LegalizeSimplifiedLayerNorm(),
    LegalizeContribSimplifiedLayerNorm(),
    LegalizeSkipSimplifiedLayerNorm(),
    LegalizeSkipLayerNorm(),
    LegalizeRotaryEmbedding(),
    LegalizeGroupQueryAttention(),
    LegalizeMultiHeadAttention(),
)
"""The rules, one per op."""


class UnsupportedContribOp(PatternNotMatched):
    """A contrib op that has no equivalent in standard ONNX ops; `location` is the name of the node."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(f"{node.op_type} of `{node.domain or 'ai.onnx'}` {reason}", node)


def legalize_contrib_ops(model: ir.Model, rules: RuleSet[ContribWriter, None] = CONTRIB_RULES) -> None:
    """Replace the contrib ops of the main graph of `model` that have a rule by standard ONNX ops, in place.

    GroupQueryAttention gets a causal mask that does not mask padding: the op reads only the length of each row from its mask.
    Caches of window size become caches of all tokens.
    Raises UnsupportedContribOp if an op has no equivalent in standard ONNX ops; the nodes before it are rewritten then.
    """
    contrib_nodes = [node for node in model.graph if rules.has_rule_for(node)]
    if not contrib_nodes:
        return
    if (reason := raise_opset(model, _OPSET)) is not None:
        raise UnsupportedContribOp(contrib_nodes[0], f"needs opset {_OPSET}: {reason}")
    declare_full_caches(model.graph, ShapeInference())
    writer = ContribWriter(model.graph, ModelInfo(model))
    for node in contrib_nodes:
        outcome = rules.apply(node, writer)
        if outcome.applied is None:
            raise UnsupportedContribOp(node, outcome.failures[-1].reason)
        remove_dead_nodes([node])
    _resolve_cache_head_sizes(model.graph, ShapeInference())


def _resolve_cache_head_sizes(graph: ir.Graph, shapes: ShapeInference) -> None:
    """Write an inferred static head size into the shapes of each past cache and of the Concat output that extends it."""
    for node in graph:
        past = node.inputs[0] if node.op_type == "Concat" and int_attribute(node, "axis", 0) % 4 == SEQ_AXIS else None
        dims = shapes.dims(node.outputs[0]) if past is not None and past.is_graph_input() else None
        for value in (past, node.outputs[0]):
            if dims is not None and value is not None and value.shape is not None and len(value.shape) == len(dims) == 4:
                head_size = dims[3] if isinstance(dims[3], int) else value.shape[3]
                value.shape = ir.Shape([*value.shape.dims[:3], head_size])
