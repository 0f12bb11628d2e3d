"""Legalization of ONNX Runtime contrib ops: equal outputs, and an error that names the node of an unsupported op."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.ort_session import run_as_written

from ryzen_compile.ir.edit.builder import replace_value
from ryzen_compile.ir.patterns import Match, MatchFailure, NodePattern, RewriteRule, RuleSet
from ryzen_passes.legalize_msft import CONTRIB_RULES, MSFT_DOMAIN, UnsupportedContribOp, legalize_contrib_ops
from ryzen_passes.legalize_msft.contrib_writer import ContribWriter

HEADS, HEAD_SIZE = 4, 8
MODEL = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
decoder (float[B,S,32] x, {inputs}) => (float[B,S,32] y{outputs})
<float[32,32] wq = {{{wq}}}, float[32,32] wk = {{{wk}}}> {{
    q = MatMul (x, wq)  k = MatMul (x, wk)
    {body} }}
"""
PAST = "float[B,4,P,8] past_k, float[B,4,P,8] past_v"
VARIANTS = {
    "a KV cache and an attention bias": (
        f"float[B,1,S,T] bias, {PAST}",
        ", float[B,4,T,8] next_k, float[B,4,T,8] next_v",
        "y, next_k, next_v = com.microsoft.MultiHeadAttention <num_heads=4> (q, k, x, , , bias, past_k, past_v)",
    ),
    "no cache, causal, with a scale": (
        "float[1] unused",
        "",
        "y = com.microsoft.MultiHeadAttention <num_heads=4, scale=0.7, unidirectional=1> (q, k, x)",
    ),
    "a larger value head size": (
        "float[1] unused",
        "",
        "two = Concat <axis=2> (x, x)  y2 = com.microsoft.MultiHeadAttention <num_heads=4> (q, k, two)  "
        "first = Constant <value_ints=[0]> ()  end = Constant <value_ints=[32]> ()  at = Constant <value_ints=[2]> ()  "
        "y = Slice (y2, first, end, at)",
    ),
    "present outputs without past": (
        "float[1] unused",
        ", float[B,4,S,8] next_k, float[B,4,S,8] next_v",
        "y, next_k, next_v = com.microsoft.MultiHeadAttention <num_heads=4> (q, k, x)",
    ),
    "no cache, no mask": ("float[1] unused", "", "y = com.microsoft.MultiHeadAttention <num_heads=4> (q, k, x)"),
}
UNSUPPORTED = {
    "sums": "y = com.microsoft.MultiHeadAttention <num_heads=4> (q, k, x, sums)",
    "hidden": "y = com.microsoft.MultiHeadAttention <num_heads=4> (q, k, x, , hidden)",
    "x": "y = com.microsoft.MultiHeadAttention <num_heads=4> (q, k, k, , , bias, past_k, past_v, length)",
    "past_k": "y = com.microsoft.MultiHeadAttention <num_heads=4> (q, past_k, past_v)",
    "past_v": "y = com.microsoft.MultiHeadAttention <num_heads=4> (q, k, x, , , bias, past_k, past_v)",
    "q": "rows = Constant <value_ints=[0,0,-1]> ()  t = Transpose (q)  r = Reshape (t, rows)  "
    "y = com.microsoft.MultiHeadAttention <num_heads=1> (r, r, r)",
    "bias": "y, nk, nv = com.microsoft.MultiHeadAttention <num_heads=4, unidirectional=1> (q, k, x, , , , past_k, past_v)",
}
MORE_INPUTS = f"float[96] sums, int32[B,T] hidden, float[B,1,S,T] bias, int32[1] length, {PAST}"


def make_model(inputs: str, outputs: str, body: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {name: ",".join(f"{number:.4f}" for number in rng.normal(size=32 * 32) / 6) for name in ("wq", "wk")}
    return onnx.parser.parse_model(MODEL.format(inputs=inputs, outputs=outputs, body=body, **weights))


@pytest.mark.parametrize("variant", VARIANTS)
def test_legalized_multi_head_attention_computes_the_same(variant: str) -> None:
    before = make_model(*VARIANTS[variant])
    changed = ir.from_proto(before)
    legalize_contrib_ops(changed)
    assert not [node for node in changed.graph if node.domain == MSFT_DOMAIN]
    assert sum(node.op_type == "Attention" for node in changed.graph) == 1
    after = ir.to_proto(changed)
    onnx.checker.check_model(after, full_check=True)
    rng = np.random.default_rng(1)
    for batch, seq, past in ((2, 3, 5), (1, 1, 4)):
        sizes = {"B": batch, "S": seq, "P": past, "T": past + seq}
        inputs = {}
        for graph_input in before.graph.input:
            dims = [dim.dim_value or sizes[dim.dim_param] for dim in graph_input.type.tensor_type.shape.dim]
            inputs[graph_input.name] = rng.normal(size=dims).astype(np.float32)
        if "bias" in inputs:
            inputs["bias"][0, :, 0] = np.finfo(np.float32).min
        for actual, expected in zip(run_as_written(after, inputs), run_as_written(before, inputs), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_an_unsupported_op_is_reported_with_its_node(case: str) -> None:
    proto = make_model(MORE_INPUTS, "", UNSUPPORTED[case])
    proto.graph.node[-1].name = "attend"
    with pytest.raises(UnsupportedContribOp, match="MultiHeadAttention") as error:
        legalize_contrib_ops(ir.from_proto(proto))
    assert error.value.location == "attend"


TABLES = "float[64,{width}] cos, float[64,{width}] sin"
"""Cosines and sines of half the rotary dim; the rest of each head is not rotated."""
GROUP_QUERY_INPUTS = (
    f"int32[B] lengths, int32[1] total, {TABLES.format(width=8)}, float[B,1,P,32] past_k, float[B,1,P,32] past_v"
)
GROUP_QUERY_CALL = """com.microsoft.GroupQueryAttention <num_heads=1, kv_num_heads=1, do_rotary=1>
    ({query}, past_k, past_v, lengths, total, cos, sin)"""
PARTIAL_ROTATIONS = {
    "separate inputs": "y, nk, nv = " + GROUP_QUERY_CALL.format(query="q, k, x"),
    "a bias of one element": "one = Constant <value_floats=[0.5]> ()  qb = Add (q, one)  y, nk, nv = "
    + GROUP_QUERY_CALL.format(query="qb, k, x"),
    "packed QKV": "packed = Concat <axis=2> (q, k, x)  y, nk, nv = " + GROUP_QUERY_CALL.format(query="packed, , "),
}


def run_both(before: onnx.ModelProto, sizes: dict[str, int], **inputs: np.ndarray) -> None:
    """Check that the legalized model computes the same as ONNX Runtime computes for the contrib ops."""
    changed = ir.from_proto(before)
    legalize_contrib_ops(changed)
    assert not [node for node in changed.graph if node.domain == MSFT_DOMAIN]
    rng = np.random.default_rng(1)
    for graph_input in before.graph.input:
        dims = [dim.dim_value or sizes[dim.dim_param] for dim in graph_input.type.tensor_type.shape.dim]
        inputs.setdefault(graph_input.name, rng.normal(size=dims).astype(np.float32))
    for actual, expected in zip(run_as_written(changed, inputs), run_as_written(before, inputs), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", PARTIAL_ROTATIONS)
def test_grouped_query_attention_may_rotate_a_part_of_each_head(case: str) -> None:
    proto = make_model(GROUP_QUERY_INPUTS, ", float[B,1,T,32] nk, float[B,1,T,32] nv", PARTIAL_ROTATIONS[case])
    batch, seq, past = 1, 1, 6
    angles = np.arange(64)[:, None] * 0.3 ** np.arange(8)
    run_both(
        proto,
        {"B": batch, "S": seq, "P": past, "T": past + seq},
        lengths=np.full(batch, past + seq - 1, np.int32),
        total=np.array([past + seq], np.int32),
        cos=np.cos(angles).astype(np.float32),
        sin=np.sin(angles).astype(np.float32),
    )


@pytest.mark.parametrize(
    "attributes", ["num_heads=4, rotary_embedding_dim=4", "num_heads=4, rotary_embedding_dim=4, interleaved=1"]
)
def test_a_rotary_embedding_may_rotate_a_part_of_each_head(attributes: str) -> None:
    body = f"y = com.microsoft.RotaryEmbedding <{attributes}> (q, positions, cos, sin)"
    proto = make_model(f"int64[B,S] positions, {TABLES.format(width=2)}", "", body)
    run_both(proto, {"B": 2, "S": 3}, positions=np.array([[3, 4, 5], [9, 10, 11]], np.int64))


def test_a_partial_rotation_without_the_number_of_heads_is_refused() -> None:
    body = "y = com.microsoft.RotaryEmbedding <rotary_embedding_dim=4> (q, positions, cos, sin)"
    with pytest.raises(UnsupportedContribOp, match="num_heads"):
        legalize_contrib_ops(ir.from_proto(make_model(f"int64[B,S] positions, {TABLES.format(width=2)}", "", body)))


UNSUPPORTED_GROUP_QUERY = {
    "has an attention bias": ("", ", , bias"),
    "has an attention sink": ("", ", , , sink"),
    "has norms of its queries and keys": ("", ", , , , , , sink"),
    "has an unknown input 16": ("", ", , , , , , , , sink"),
    "has an attention sink (`smooth_softmax`)": (", smooth_softmax=1", ""),
    "attends to later tokens (`causal` is 0)": (", causal=0", ""),
    "has a `sliding_window_cache` without a `local_window_size`": (", sliding_window_cache=1", ""),
    "has the unknown attribute `mode`": (", mode=3", ""),
}


@pytest.mark.parametrize("reason", UNSUPPORTED_GROUP_QUERY)
def test_a_grouped_query_attention_with_other_semantics_is_refused(reason: str) -> None:
    attributes, inputs = UNSUPPORTED_GROUP_QUERY[reason]
    call = GROUP_QUERY_CALL.format(query="q, k, x").replace("do_rotary=1", f"do_rotary=1{attributes}")
    body = "[attend] y, nk, nv = " + call.replace("cos, sin", f"cos, sin{inputs}")
    outputs = ", float[B,1,T,32] nk, float[B,1,T,32] nv"
    proto = make_model(f"{GROUP_QUERY_INPUTS}, float[1,1,S,T] bias, float[1] sink", outputs, body)
    with pytest.raises(UnsupportedContribOp) as error:
        legalize_contrib_ops(ir.from_proto(proto))
    assert error.value.reason == f"GroupQueryAttention of `com.microsoft` {reason}"


def test_scores_as_an_output_of_a_grouped_query_attention_are_refused() -> None:
    body = GROUP_QUERY_CALL.format(query="q, k, x").replace("do_rotary=1", "do_rotary=1, qk_output=1")
    outputs = ", float[B,1,T,32] nk, float[B,1,T,32] nv, float[B,1,S,T] scores"
    proto = make_model(GROUP_QUERY_INPUTS, outputs, f"y, nk, nv, scores = {body}")
    with pytest.raises(UnsupportedContribOp, match="has scores as an output"):
        legalize_contrib_ops(ir.from_proto(proto))


NORMS_OF_SUMS = {
    "SkipLayerNormalization": ("weight, shift", "weight, shift, bias", "weight", "weight, , bias"),
    "SkipSimplifiedLayerNormalization": ("weight", "weight, bias"),
}


@pytest.mark.parametrize("epsilon", ["", " <epsilon=0.01>"])
@pytest.mark.parametrize(("op", "inputs"), [(op, inputs) for op, cases in NORMS_OF_SUMS.items() for inputs in cases])
def test_a_norm_of_a_sum_becomes_a_sum_and_a_norm(op: str, inputs: str, epsilon: str) -> None:
    """The inputs are small, so that the result depends on `epsilon` and its default."""
    body = f"""scale = Constant <value_floats=[0.0001]> ()  xs = Mul (x, scale)  ks = Mul (k, scale)
        y, , , total = com.microsoft.{op}{epsilon} (xs, ks, {inputs})"""
    proto = make_model("float[32] weight, float[32] shift", ", float[B,S,32] total", body)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(32, 1e-4, np.float32), "bias"))
    run_both(proto, {"B": 2, "S": 3})


def test_statistics_of_a_norm_of_a_sum_are_refused() -> None:
    proto = make_model(
        "float[32] weight", ", float[B,S,1] mean", "y, mean = com.microsoft.SkipLayerNormalization (x, k, weight)"
    )
    with pytest.raises(UnsupportedContribOp, match="has statistics outputs that are used"):
        legalize_contrib_ops(ir.from_proto(proto))


class LegalizeQuickGelu(RewriteRule[ContribWriter, None]):
    """A rule for one more op: x * sigmoid(alpha * x)."""

    pattern = NodePattern("QuickGelu", ("x",), domain=MSFT_DOMAIN)

    def check(self, match: Match, context: ContribWriter) -> MatchFailure | None:
        return None if "alpha" in match.node.attributes else MatchFailure.at("has no `alpha`", match.node)

    def rewrite(self, match: Match, context: ContribWriter) -> None:
        alpha = context.nodes.scalar(match.node.attributes["alpha"].as_float(), ir.DataType.FLOAT)
        scaled = context.op(match.node, "Mul", [match["x"], alpha])
        product = context.op(match.node, "Mul", [match["x"], context.op(match.node, "Sigmoid", [scaled])])
        replace_value(match.node.outputs[0], product)


def test_a_rule_for_another_op_is_one_class() -> None:
    rules = RuleSet(*CONTRIB_RULES, LegalizeQuickGelu())
    before = make_model("float[1] unused", "", "y = com.microsoft.QuickGelu <alpha=1.7> (q)")
    changed = ir.from_proto(before)
    legalize_contrib_ops(changed, rules)
    assert [node.op_type for node in changed.graph][-3:] == ["Mul", "Sigmoid", "Mul"]
    inputs = {"x": np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32), "unused": np.zeros(1, np.float32)}
    np.testing.assert_allclose(run_as_written(changed, inputs)[0], run_as_written(before, inputs)[0], rtol=0, atol=1e-5)
    without_alpha = ir.from_proto(make_model("float[1] unused", "", "[gelu] y = com.microsoft.QuickGelu (q)"))
    with pytest.raises(UnsupportedContribOp, match="QuickGelu of `com.microsoft` has no `alpha`") as error:
        legalize_contrib_ops(without_alpha, rules)
    assert error.value.location == "gelu"
