"""Tests of mask polarity: which value of a mask marks padding, by what the graph does with it; names play no part."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.spec.interface import InputSpec

CONSTANTS = """
    one = Constant <value = float {1.0}> ()  low = Constant <value = float {-1e9}> ()  zero = Constant <value = float {0}> ()
    weak = Constant <value = float {-10000.0}> ()  ax = Constant <value = int64[1] {1}> ()
    i0 = Constant <value = int64 {0}> ()  i1 = Constant <value = int64 {1}> ()
    u = Unsqueeze (x, ax)
"""


def infer_mask(element: str, body: str, *, extra: str = "", opset: int = 21, functions: str = "") -> InputSpec:
    """Return the inferred spec of the input `x` [B, S] of a graph with the scores `s` [B, S, S] and activations `h`."""
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1, "local" : 1]>
        g ({element}[B, S] x, float[B, S, S] s, float[B, S, S] h, float[B, S, S] c{extra}) => (float[B, S, S] y)
        {{ {CONSTANTS} {body} }} {functions}"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    return interface_of(model).input("x")


@pytest.mark.parametrize(
    ("element", "body", "padding_value"),
    [
        ("bool", "f = Where (u, low, s)  y = Softmax (f)", 1),
        ("bool", "f = Where (u, s, low)  y = Softmax (f)", 0),
        ("bool", "n = Not (u)  f = Where (n, low, s)  y = Softmax (f)", 0),
        ("bool", "b = Where (u, low, zero)  f = Add (s, b)  y = Softmax (f)", 1),
        ("int64", "e = Equal (u, i0)  f = Where (e, low, s)  y = Softmax (f)", 0),
        ("int64", "e = Equal (u, i1)  f = Where (e, low, s)  y = Softmax (f)", 1),
        ("int64", "e = Greater (u, i0)  f = Where (e, s, low)  y = Softmax (f)", 0),
        ("int64", "e = Cast <to = 9> (u)  f = Where (e, s, low)  y = Softmax (f)", 0),
        ("int64", "m = Cast <to = 1> (u)  i = Sub (one, m)  b = Mul (i, weak)  f = Add (s, b)  y = Softmax (f)", 0),
        ("float", "i = Sub (one, u)  b = Mul (i, low)  f = Add (s, b)  y = Softmax (f)", 0),
        ("float", "b = Mul (u, low)  f = Add (b, s)  y = Softmax (f)", 1),
        ("int64", "m = Cast <to = 1> (u)  d = Sub (m, one)  p = Neg (low)  b = Mul (d, p)  f = Add (s, b)  y = Softmax (f)", 0),
        ("int64", "m = Cast <to = 1> (u)  i = Sub (one, m)  p = Neg (low)  b = Mul (i, p)  f = Sub (s, b)  y = Softmax (f)", 0),
        ("bool", "v = Cast <to = 9> (c)  k = And (u, v)  f = Where (k, s, low)  y = Softmax (f)", 0),
        ("bool", "v = Cast <to = 9> (c)  k = Or (u, v)  f = Where (k, low, s)  y = Softmax (f)", 1),
        ("bool", "f = Where (u, low, s)  m = ReduceMax (f)  d = Sub (f, m)  y = Exp (d)", 1),
        ("bool", "f = Where (u, low, s)  z = Softmax (f)  y = Where (u, zero, z)", 1),
        (
            "int64",
            'm = Cast <to = 1> (u)  i = Sub (one, m)  t = Einsum <equation = "bqk->kqb"> (i)  p = Neg (low)  b = Mul (t, p)'
            "  f = Sub (s, b)  y = Softmax (f)",
            0,
        ),
        ("bool", "y = Where (u, zero, h)", 1),
        ("int64", "m = Cast <to = 1> (u)  y = Mul (h, m)", 0),
        ("int64", "m = Cast <to = 1> (u)  i = Sub (one, m)  y = Mul (i, h)", 1),
    ],
)
def test_the_value_that_leads_to_the_fill_of_the_scores_marks_padding(element: str, body: str, padding_value: int) -> None:
    spec = infer_mask(element, body)
    assert (spec.role, spec.padding_value) == ("mask", padding_value)


@pytest.mark.parametrize(
    ("element", "body"),
    [
        ("bool", "f = Cast <to = 1> (u)  y = Add (f, s)"),
        ("bool", "a = Where (u, low, s)  b = Where (u, s, low)  p = Softmax (a)  q = Softmax (b)  y = Add (p, q)"),
        ("bool", "a = Where (u, h, s)  y = Softmax (a)"),
        ("bool", "a = Where (u, low, low)  f = Add (a, s)  y = Softmax (a)"),
        ("int64", "m = Cast <to = 1> (u)  y = Add (h, m)"),
        (
            "bool",
            "t = Constant <value = float[2] {1, 2}> ()  m = Cast <to = 1> (u)  i = Sub (one, m)  a = Mul (m, t)  b = Mul (h, i)"
            "  y = Add (a, b)",
        ),
    ],
)
def test_other_uses_do_not_show_which_value_marks_padding(element: str, body: str) -> None:
    assert infer_mask(element, body).padding_value is None


@pytest.mark.parametrize("body", ["y = Mul (h, u)", "i = Sub (one, u)  y = Mul (h, i)", "f = Add (s, u)  y = Softmax (f)"])
def test_a_float_input_that_is_no_mask_of_scores_has_values(body: str) -> None:
    assert infer_mask("float", body).role == "values"


HEADS = ", float[B, 2, S, 4] q"


@pytest.mark.parametrize(
    ("body", "padding_value"),
    [
        ("m = Unsqueeze (u, ax)  a = Attention (q, q, q, m)", 0),
        ("n = Not (u)  m = Unsqueeze (n, ax)  a = Attention (q, q, q, m)", 1),
        ("b = Where (u, low, zero)  m = Unsqueeze (b, ax)  a = Attention (q, q, q, m)", 1),
        ("k = Cast <to = 6> (x)  a = com.microsoft.MultiHeadAttention <num_heads = 2> (h, h, h, , k)", 0),
        ("n = Not (x)  k = Cast <to = 6> (n)  a = com.microsoft.MultiHeadAttention <num_heads = 2> (h, h, h, , k)", 1),
        ("b = Where (u, low, zero)  a = com.microsoft.MultiHeadAttention <num_heads = 2> (h, h, h, , , b)", 1),
        (
            "k = Cast <to = 7> (x)  r = ReduceSum <keepdims = 0> (k, ax)  l = Sub (r, i1)  t = Cast <to = 6> (l)"
            "  a = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2> (h, h, h, , , t, t)",
            0,
        ),
        (
            "n = Not (x)  k = Cast <to = 7> (n)  r = ReduceSum <keepdims = 0> (k, ax)  t = Cast <to = 6> (r)"
            "  a = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2> (h, h, h, , , t, t)",
            1,
        ),
        ("k = Cast <to = 6> (x)  t = ReduceSum <keepdims = 0> (k, ax)  a = LSTM <hidden_size = 4> (h, h, h, , t)", 0),
    ],
)
def test_masks_and_lengths_of_attention_and_recurrent_ops(body: str, padding_value: int) -> None:
    spec = infer_mask("bool", f"{body}  y = Identity (a)", extra=HEADS, opset=24)
    assert (spec.role, spec.padding_value) == ("mask", padding_value)


@pytest.mark.parametrize(
    ("body", "functions"),
    [
        (
            "k = Cast <to = 9> (one)  f = If (k) <then_branch = t () => (float[B, S, S] a) { a = Where (u, low, s) },"
            " else_branch = e () => (float[B, S, S] b) { b = Where (u, low, h) }>  y = Softmax (f)",
            "",
        ),
        (
            "k = Cast <to = 9> (one)  f = Loop (i1, k, s) <body = l (int64 i, bool go, float[B, S, S] v) => (bool on,"
            " float[B, S, S] w) { on = Identity (go)  w = Where (u, low, v)  p = Softmax (w) }>  y = Identity (f)",
            "",
        ),
        (
            "f = local.hide (u, s)  y = Softmax (f)",
            """<domain: "local", opset_import: ["" : 21]> hide (m, v) => (w)
            { far = Constant <value = float {-1e9}> ()  w = Where (m, far, v) }""",
        ),
    ],
)
def test_branches_bodies_and_functions_are_followed(body: str, functions: str) -> None:
    spec = infer_mask("bool", body, functions=functions)
    assert (spec.role, spec.padding_value) == ("mask", 1)


def test_a_causal_mask_of_the_graph_does_not_hide_the_polarity() -> None:
    """As Transformers before 4.53: the padding is added to a causal mask, and sums of 0 are filled."""
    body = """
        n = Shape (s)  full = ConstantOfShape <value = float[1] {-3e38}> (n)  k = Trilu (full, i1)
        m = Cast <to = 1> (u)  p = Add (k, m)  e = Equal (p, zero)  b = Where (e, low, k)  f = Add (s, b)  y = Softmax (f)
    """
    assert infer_mask("int64", body).padding_value == 0


def test_masks_of_pairs_of_tokens_are_masks_without_padding_tokens() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (bool[S, S] x, float[B, S, S] s) => (float[B, S, S] y)
        { low = Constant <value = float {-1e9}> ()  f = Where (x, s, low)  y = Softmax (f) }"""
    spec = interface_of(ir.serde.deserialize_model(onnx.parser.parse_model(text))).input("x")
    assert (spec.role, spec.padding_value, spec.is_padding_mask) == ("mask", 0, False)


@pytest.mark.parametrize(("dims", "expected"), [(("B", "S"), True), (("B", 1, 1, "S"), True), (("B", 1, "S", "S"), False)])
def test_padding_masks_have_one_element_per_token(dims: tuple[str | int, ...], expected: bool) -> None:
    spec = InputSpec(name="m", dtype="bool", dims=dims, role="mask", padding_value=1)
    assert spec.is_padding_mask is expected
    assert spec.valid_value == 0
