"""Valid models that the fuzzer mutates: small ones of this module, and the models of ONNX's own node tests."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_TEXTS = {
    "linear": "g (float[N, 64] x) => (float[N, 32] y) { [m] h = MatMul (x, w)  [a] y = Add (h, b) }",
    "branches": """
        g (bool c, float[N, 8] x) => (float[N, 8] y, float z) {
           one = Constant <value = float {1.0}> ()  two = local.Twice (x)
           y = If (c) <
              then_branch = yes () => (float[N, 8] yes_out) { inner = Add (two, one)  yes_out = Identity (inner) },
              else_branch = no () => (float[N, 8] no_out) { no_out = Mul (x, one) } >
           z = ReduceSum <keepdims = 0> (y) }
        <domain: "local", opset_import: ["" : 21]> Twice (a) => (b) { b = Add (a, a) }""",
    "loop": """
        g (float[N] x, int64 n) => (float[N] y) {
           yes = Constant <value = bool {1}> ()
           y = Loop (n, yes, x) <body = b (int64 i, bool c, float[N] s) => (bool d, float[N] t) {
              d = Identity (c)  t = Add (s, s) }> }""",
    "scan": """
        g (float[2] start, float[N, 2] x) => (float[2] last, float[N, 2] sums) {
           last, sums = Scan <num_scan_inputs = 1, body = b (float[2] s, float[2] e) => (float[2] t, float[2] o) {
              t = Add (s, e)  o = Identity (t) }> (start, x) }""",
    "sequences": """
        g (float[N, 3] x, string[N] s) => (float[M, 3] y, string[N] t) <string[1] tail = {"!"}, int64 at = {1}> {
           q = SequenceConstruct (x, x)  y = SequenceAt (q, at)  t = StringConcat (s, tail) }""",
    "attention": """
        g (float[B, 2, S, 16] q, float[B, 2, N, 16] k, float[B, 2, N, 16] v, bool[B, 1, S, N] keep) => (float[B, 2, S, 16] y) {
           kt = Transpose <perm = [0, 1, 3, 2]> (k)  scale = Constant <value_float = 0.25> ()
           s0 = MatMul (q, kt)  s = Mul (s0, scale)  zero = Constant <value_float = 0.0> ()
           low = Constant <value_float = -10000.0> ()  bias = Where (keep, zero, low)  m = Add (s, bias)
           p = Softmax <axis = -1> (m)  [attend] y = MatMul (p, v) }""",
    "convolution": """
        g (float[N, 3, 8, 8] x) => (float[N, 4] y) {
           c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, kernel)  r = Relu (c)
           p = GlobalAveragePool (r)  y = Flatten (p) }""",
    "lstm": """
        g (float[T, N, 4] x, int32[N] lengths) => (float[T, 1, N, 3] y) {
           y, h, c = LSTM <hidden_size = 3> (x, wi, wr, bias, lengths) }""",
    "quantized": """
        g (float[N, 8] x) => (float[N, 8] y) <float scale = {0.1}, uint8 zero = {128}, int8 none = {0}> {
           xq = QuantizeLinear (x, scale, zero)  xd = DequantizeLinear (xq, scale, zero)
           wd = DequantizeLinear (wq, scale, none)  y = MatMul (xd, wd) }""",
    "shapes": """
        g (float[N, 6] x) => (float[N, 2, 3] y, float[N, 3, 2] z) {
           shape = Shape (x)  zero = Constant <value_int = 0> ()  n = Gather (shape, zero)  at = Constant <value_ints = [0]> ()
           n1 = Unsqueeze (n, at)  two = Constant <value_ints = [2]> ()  rest = Constant <value_ints = [-1]> ()
           to = Concat <axis = 0> (n1, two, rest)  y = Reshape (x, to)  z = Transpose <perm = [0, 2, 1]> (y) }""",
    "decoder": """
        g (int64[B, S] ids, int64[B, P] mask, float[B, 2, K, 4] past_key, float[B, 2, K, 4] past_value)
        => (float[B, S, 16] logits, float[B, 2, P, 4] present_key, float[B, 2, P, 4] present_value) {
           e = Gather (table, ids)  split = Constant <value_ints = [0, 0, 2, 4]> ()  e4 = Reshape (e, split)
           new = Transpose <perm = [0, 2, 1, 3]> (e4)  present_key = Concat <axis = 2> (past_key, new)
           present_value = Concat <axis = 2> (past_value, new)  kt = Transpose <perm = [0, 1, 3, 2]> (present_key)
           s = MatMul (new, kt)  mf = Cast <to = 1> (mask)  one = Constant <value_float = 1.0> ()  off = Sub (one, mf)
           low = Constant <value_float = -10000.0> ()  drop = Mul (off, low)  axes = Constant <value_ints = [1, 2]> ()
           bias = Unsqueeze (drop, axes)  m = Add (s, bias)  p = Softmax <axis = -1> (m)  o = MatMul (p, present_value)
           back = Transpose <perm = [0, 2, 1, 3]> (o)  joined = Constant <value_ints = [0, 0, 8]> ()
           o3 = Reshape (back, joined)
           logits = MatMul (o3, head) }""",
    "contrib": """
        g (float[B, S, 8] q, float[B, S, 8] k, float[B, S, 8] v) => (float[B, S, 8] y) {
           a = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v)
           y = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> (a, q, gamma) }""",
    "classifier": """
        g (float[N, 4] x) => (string[N] label, float[N, 3] scores) {
           label, scores = ai.onnx.ml.LinearClassifier <classlabels_strings = ["a", "b", "c"], coefficients = [
              0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2], intercepts = [0.0, 0.1, 0.2]> (x) }""",
    "half": "g (float16[N, 8] x) => (float16[N, 8] y) { h = MatMul (x, wh)  y = Gelu (h) }",
}
_WEIGHTS: dict[str, dict[str, tuple[int, ...]]] = {
    "linear": {"w": (64, 32), "b": (32,)},
    "convolution": {"kernel": (4, 3, 3, 3)},
    "lstm": {"wi": (1, 12, 4), "wr": (1, 12, 3), "bias": (1, 24)},
    "quantized": {"wq": (8, 8)},
    "decoder": {"table": (32, 8), "head": (8, 16)},
    "contrib": {"gamma": (8,)},
    "half": {"wh": (8, 8)},
}
_DTYPES: dict[str, type] = {"wq": np.int8, "wh": np.float16}


@functools.cache
def own_specimens() -> dict[str, bytes]:
    """Return the serialized models of this module, by name."""
    rng = np.random.default_rng(0)
    specimens = {}
    for name, text in _TEXTS.items():
        opsets = '["" : 21, "local" : 1, "com.microsoft" : 1, "ai.onnx.ml" : 3]'
        proto = onnx.parser.parse_model(f"<ir_version: 10, opset_import: {opsets}> {text}")
        for weight, shape in _WEIGHTS.get(name, {}).items():
            values: np.ndarray[Any, Any] = rng.standard_normal(shape).astype(_DTYPES.get(weight, np.float32))
            proto.graph.initializer.append(numpy_helper.from_array(values, weight))
        specimens[name] = proto.SerializeToString()
    specimens["old"] = _old_model().SerializeToString()
    return specimens


def _old_model() -> onnx.ModelProto:
    graph = onnx.parser.parse_graph("old (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add (x, w) }")
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=3)


@functools.cache
def node_test_specimens() -> tuple[bytes, ...]:
    """Return the serialized models of ONNX's node tests of at most 20 kB."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some tests compute infinities intentionally
        cases = load_model_tests(kind="node")
    serialized = (case.model.SerializeToString() for case in cases if case.model is not None)
    return tuple(content for content in serialized if len(content) <= 20_000)
