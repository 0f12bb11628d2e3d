"""Legalization of ONNX Runtime contrib ops: equal outputs, and an error that names the node of an unsupported op."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.ort_session import run_as_written

from ryzen_passes.legalize_msft import MSFT_DOMAIN, UnsupportedContribOp, legalize_contrib_ops

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
        for actual, expected in zip(run_as_written(after, inputs), run_as_written(before, inputs), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_an_unsupported_op_is_reported_with_its_node(case: str) -> None:
    proto = make_model(MORE_INPUTS, "", UNSUPPORTED[case])
    proto.graph.node[-1].name = "attend"
    with pytest.raises(UnsupportedContribOp, match="MultiHeadAttention") as error:
        legalize_contrib_ops(ir.from_proto(proto))
    assert error.value.location == "attend"
