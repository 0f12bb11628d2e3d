"""Mask recognition: attention biases of a hand-written decoder with one layer are recognized as ALiBi or refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.ort_session import run_as_written
from support.step_runner import StepRunner

from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.kv.static import KvStatic

CONTEXT = PassContext(backend="onnxruntime")
MODEL = """
<ir_version: 10, opset_import: ["" : 23]>
decoder (int64[batch,seq] input_ids,
         float[batch,2,past,4] "past_key_values.0.key", float[batch,2,past,4] "past_key_values.0.value")
  => (float[batch,seq,8] logits, float[batch,2,total,4] "present.0.key", float[batch,2,total,4] "present.0.value")
<float[8,8] emb = {{{emb}}}, float[8,8] wq = {{{wq}}}, float[8,8] wk = {{{wk}}}, float[8,8] wv = {{{wv}}}> {{
    x = Gather (emb, input_ids)  q0 = MatMul (x, wq)  k0 = MatMul (x, wk)  v0 = MatMul (x, wv)
    heads = Constant <value_ints=[0,0,2,4]> ()
    q1 = Reshape (q0, heads)  k1 = Reshape (k0, heads)  v1 = Reshape (v0, heads)
    q = Transpose <perm=[0,2,1,3]> (q1)  k = Transpose <perm=[0,2,1,3]> (k1)  v = Transpose <perm=[0,2,1,3]> (v1)
    "present.0.key" = Concat <axis=2> ("past_key_values.0.key", k)
    "present.0.value" = Concat <axis=2> ("past_key_values.0.value", v)
    ps = Shape <start=2,end=3> ("past_key_values.0.key")  ss = Shape <start=1,end=2> (input_ids)  ts = Add (ps, ss)
    at0 = Constant <value_ints=[0]> ()  at1 = Constant <value_ints=[1]> ()
    zero = Constant <value_int=0> ()  one = Constant <value_int=1> ()  p = Squeeze (ps, at0)  t = Squeeze (ts, at0)
    query0 = Range (p, t, one)  query = Unsqueeze (query0, at1)  key = Range (zero, t, one)
    seen = LessOrEqual (key, query)  back = Sub (key, query)  dist = Cast <to=1> (back)
    steep = Constant <value = float[2,1,1] {{1.0, 0.25}}> ()
    low = Constant <value = float {{-100000.0}}> ()  none = Constant <value = float {{0.0}}> ()
    {bias}
    m = Where (seen, bias, low)  mask = Unsqueeze (m, at0)
    attend = Attention (q, "present.0.key", "present.0.value", mask)  y = Transpose <perm=[0,2,1,3]> (attend)
    flat = Constant <value_ints=[0,0,-1]> ()  logits = Reshape (y, flat) }}
"""
SUPPORTED = {
    "none": "bias = Identity (none)",
    "a slope per head": "bias = Mul (dist, steep)",
    "a slope over the key position": "at = Cast <to=1> (key)  bias = Mul (at, steep)",
    "a constant": "half = Constant <value = float {0.5}> ()  bias = Identity (half)",
}
FAR = "far = Constant <value_int=-20> ()  is_far = Less (back, far)  less = Constant <value = float {-3.0}> ()"
REFUSED = {
    "a lower bias beyond 20 tokens": (f"{FAR}  bias = Where (is_far, less, none)", "no slope"),
    "a slope and a lower bias beyond 20 tokens": (
        f"{FAR}  s = Mul (dist, steep)  f = Where (is_far, less, none)  bias = Add (s, f)",
        "no slope",
    ),
    "a slope that ends at 16": (
        "least = Constant <value = float {-16.0}> ()  cut = Max (dist, least)  bias = Mul (cut, steep)",
        "no slope",
    ),
    "a window in one head": (
        "end = Constant <value = int64[2,1,1] {-4000000, -12}> ()  gone = Less (back, end)  bias = Where (gone, low, none)",
        "heads attend to different keys",
    ),
}


def decoder(bias: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {name: ",".join(f"{weight:.4f}" for weight in rng.normal(size=64)) for name in ("emb", "wq", "wk", "wv")}
    return onnx.parser.parse_model(MODEL.format(bias=bias, **weights))


@pytest.mark.parametrize("bias", SUPPORTED)
def test_slopes_and_constant_biases_are_preserved(bias: str) -> None:
    proto, ids = decoder(SUPPORTED[bias]), np.random.default_rng(1).integers(0, 8, (1, 60))
    model = ir.from_proto(proto)
    assert isinstance(KvStatic(capacity=60).rewrite(model, CONTEXT), Change)
    empty = np.zeros((1, 2, 0, 4), np.float32)
    expected = run_as_written(proto, {"input_ids": ids, "past_key_values.0.key": empty, "past_key_values.0.value": empty})[0]
    stepper = StepRunner(model, 1)
    logits = np.concatenate(
        [
            stepper.step(ids[:, start : start + size])["logits"]
            for start, size in ((0, 30), *((start, 1) for start in range(30, 60)))
        ],
        axis=1,
    )
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", REFUSED)
def test_biases_without_a_constant_slope_are_refused(bias: str) -> None:
    nodes, message = REFUSED[bias]
    outcome = KvStatic(capacity=60).rewrite(ir.from_proto(decoder(nodes)), CONTEXT)
    assert isinstance(outcome, Refusal)
    assert message in outcome.reason


def test_an_unnamed_attention_node_gets_a_name() -> None:
    proto = decoder(SUPPORTED["a slope per head"])
    for node in proto.graph.node:
        node.ClearField("name")
    model = ir.from_proto(proto)
    assert isinstance(KvStatic(capacity=60).rewrite(model, CONTEXT), Change)
    assert all(node.name for node in model.graph if node.op_type == "Attention")
