"""The pass `fold`: what it evaluates, shares, removes and leaves unchanged; the outputs of the model stay equal."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.fold_checks import CONTEXT, Array, assert_same, fold, fold_and_compare, model, ops, run

from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save
from ryzen_compile.ir.weights import FileTensor
from ryzen_compile.pipeline import pass_manager
from ryzen_compile.spec.passes import Change
from ryzen_passes.fold import Fold
from ryzen_passes.fold.constant_evaluation import SMALL_RESULT_BYTES, EvaluationBudget, _einsum_operation_count
from ryzen_passes.fold.iteration import FoldIteration
from ryzen_passes.fold.stats import FoldStats
from ryzen_passes.properties import GRAPH_LIVE


def x(*shape: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}


HEADS = """
heads (float[B, S, 12] x) => (float[B, 3, S, 4] y) {
    s0 = Shape (x)  i0 = Constant <value = int64 {0}> ()  b = Gather <axis = 0> (s0, i0)
    s1 = Shape (x)  i1 = Constant <value = int64 {1}> ()  s = Gather <axis = 0> (s1, i1)
    a0 = Constant <value = int64[1] {0}> ()  b1 = Unsqueeze (b, a0)
    a1 = Constant <value = int64[1] {0}> ()  t1 = Unsqueeze (s, a1)
    h = Constant <value = int64[1] {3}> ()  d = Constant <value = int64[1] {4}> ()
    shape = Concat <axis = 0> (b1, t1, h, d)
    split = Reshape (x, shape)
    y = Transpose <perm = [0, 2, 1, 3]> (split)
}
"""


def test_a_computed_shape_becomes_a_constant_with_copied_input_dims() -> None:
    folded, change = fold_and_compare(HEADS, x(2, 5, 12), x(1, 1, 12), x(0, 4, 12), x(3, 0, 12))
    assert ops(folded) == ["Reshape", "Transpose"]
    shape = {tensor.name: tensor for tensor in folded.graph.initializer}[folded.graph.node[0].input[1]]
    assert onnx.numpy_helper.to_array(shape).tolist() == [0, 0, 3, 4]
    assert "1 shape computation" in change.summary


REPEAT = """
repeat (float[B, 2, T, 4] x) => (float[B, 6, T, 4] y) {
    s = Shape (x)
    i0 = Constant <value = int64[1] {0}> ()  b = Gather <axis = 0> (s, i0)
    i2 = Constant <value = int64[1] {2}> ()  t = Gather <axis = 0> (s, i2)
    two = Constant <value = int64[1] {2}> ()  three = Constant <value = int64[1] {3}> ()
    four = Constant <value = int64[1] {4}> ()  six = Constant <value = int64[1] {6}> ()
    wide = Unsqueeze (x, two)
    shape = Concat <axis = 0> (b, two, three, t, four)
    rank = Shape (shape)
    ones = ConstantOfShape <value = int64[1] {1}> (rank)
    minus = Constant <value = int64 {-1}> ()
    open = Mul (ones, minus)
    is_open = Equal (shape, open)
    given = Where (is_open, ones, shape)
    wider = Expand (wide, given)
    target = Concat <axis = 0> (b, six, t, four)
    y = Reshape (wider, target)
}
"""


def test_the_shape_of_an_expand_becomes_constant_and_its_check_for_minus_one_is_evaluated() -> None:
    folded, _ = fold_and_compare(REPEAT, x(2, 2, 5, 4), x(1, 2, 1, 4))
    assert ops(folded) == ["Shape", "Gather", "Gather", "Unsqueeze", "Expand", "Concat", "Reshape"]
    (expand,) = [node for node in folded.graph.node if node.op_type == "Expand"]
    shape = {tensor.name: tensor for tensor in folded.graph.initializer}[expand.input[1]]
    assert onnx.numpy_helper.to_array(shape).tolist() == [1, 2, 3, 1, 4]


def test_minus_one_is_not_used_if_another_dim_may_be_zero() -> None:
    # [0, 6, -1, 4] would be invalid for an empty batch, which the original model accepts.
    fold_and_compare(REPEAT, x(0, 2, 5, 4))


def test_the_only_dynamic_dim_among_static_ones_becomes_minus_one() -> None:
    text = """
    g (float[N, 4] x) => (float[N, 2, 2] y) {
        s = Shape <start = 0, end = 1> (x)
        rest = Constant <value = int64[2] {2, 2}> ()
        shape = Concat <axis = 0> (s, rest)
        turned = Transpose (x)
        y = Reshape (turned, shape)
    }"""
    folded, _ = fold_and_compare(text, x(3, 4), x(1, 4))
    assert ops(folded) == ["Transpose", "Reshape"]


def test_equal_dims_of_different_tensors_are_computed_once() -> None:
    text = """
    g (float[N, M] x) => (int64[1] y, int64[1] z) {
        a = Exp (x)  b = Transpose (a)
        zero = Constant <value = int64[1] {0}> ()  one = Constant <value = int64[1] {1}> ()
        sa = Shape (x)  y0 = Gather (sa, zero)  y = Mul (y0, one)
        sb = Shape (b)  z0 = Gather (sb, one)  z = Mul (z0, one)
    }"""
    folded, _ = fold_and_compare(text, x(3, 4))
    assert ops(folded) == ["Shape", "Gather", "Identity"]


def test_inputs_with_equal_dim_names_have_equal_dims() -> None:
    text = """
    g (float[N, 4] x, float[N, 4] w) => (float[M] y) {
        s = Shape <start = 0, end = 1> (w)  f = Constant <value = int64[1] {4}> ()
        shape = Concat <axis = 0> (s, f)
        z = Expand (x, shape)
        m = Constant <value = int64[1] {-1}> ()
        y = Reshape (z, m)
    }"""
    assert ops(fold(model(text))[0]) == ["Reshape"]
    assert "Expand" in ops(fold(model(text.replace("float[N, 4] w", "float[K, 4] w")))[0])


EVALUATED = {
    "a Gather of static dims": "i = Constant <value = int64[2] {1, -1}> ()  y = Gather (s, i)",
    "a Slice of static dims": (
        "b = Constant <value = int64[1] {1}> ()  e = Constant <value = int64[1] {3}> ()  y = Slice (s, b, e)"
    ),
    "a product of static dims": "t = Shape <start = 1> (x)  p = ReduceProd <keepdims = 1> (t)  y = Neg (p)",
    "the number of elements": (
        "i = Constant <value = int64[1] {0}> ()  c = Unsqueeze (k, i)  z = Size (c)  y = Unsqueeze (z, i)"
    ),
    "a dim minus itself": "y = Sub (n, n)",
    "a multiple of a dim divided by the factor": (
        "two = Constant <value = int64[1] {2}> ()  m = Mul (n, two)  h = Div (m, two)  y = Sub (h, n)"
    ),
    "a negative quotient": (
        "a = Constant <value = int64[2] {-7, 7}> ()  b = Constant <value = int64[1] {2}> ()  y = Div (a, b)"
    ),
    "a comparison": (
        "o = Constant <value = int64[1] {1}> ()  m = Add (n, o)  g = Greater (m, n)  h = LessOrEqual (m, n)  "
        "j = Less (n, m)  l = GreaterOrEqual (m, n)  q = And (g, j)  u = Or (h, q)  v = Not (u)  w = And (u, l)  "
        "r = Or (v, w)  y = Cast <to = 7> (r)"
    ),
    "a dim plus one as a boolean": (
        "o = Constant <value = int64[1] {1}> ()  m = Add (n, o)  b = Cast <to = 9> (m)  y = Cast <to = 7> (b)"
    ),
    "a replacement of minus ones": (
        "m = Constant <value = int64[1] {-1}> ()  q = Equal (n, m)  w = Where (q, m, n)  y = Sub (w, n)"
    ),
    "an Expand of a scalar": (
        "t = Constant <value = int64[1] {2}> ()  k2 = Constant <value = int64[1] {5}> ()  y = Expand (k2, t)"
    ),
    "32-bit dims": ("c = Cast <to = 6> (s)  i = Constant <value = int64[1] {1}> ()  p = Gather (c, i)  y = Cast <to = 7> (p)"),
    "a Range": (
        "a = Constant <value = int64 {1}> ()  b = Constant <value = int64 {7}> ()  "
        "d = Constant <value = int64 {2}> ()  y = Range (a, b, d)"
    ),
    "a view of dims": (
        "t = Shape <start = 1> (x)  two = Constant <value = int64[2] {1, 2}> ()  m = Constant <value = int64[1] {-1}> ()  "
        "v = Reshape (t, two)  y = Reshape (v, m)"
    ),
}


@pytest.mark.parametrize("nodes", EVALUATED.values(), ids=EVALUATED.keys())
def test_shape_arithmetic_is_evaluated(nodes: str) -> None:
    text = f"""
    g (float[N, 3, 4] x) => (int64[K] y) {{
        s = Shape (x)  n = Shape <start = 0, end = 1> (x)  k = Constant <value = int64[3] {{1, 2, 3}}> ()  {nodes}
    }}"""
    folded, _ = fold_and_compare(text, x(2, 3, 4), x(1, 3, 4))
    assert ops(folded) == ["Identity"]


DYNAMIC = {
    "a dim that may be zero as a boolean": "b = Cast <to = 9> (n)  y = Cast <to = 7> (b)",
    "a dim compared with a number": ("o = Constant <value = int64[1] {2}> ()  g = Greater (n, o)  y = Cast <to = 7> (g)"),
    "half of a dim": "o = Constant <value = int64[1] {2}> ()  y = Div (n, o)",
    "a dim divided by another one": "m = Shape <start = 1, end = 2> (x)  y = Div (n, m)",
    "a dim with a dynamic index": (
        "z = Squeeze (n)  o = Constant <value = int64 {3}> ()  r = Mod (z, o)  p = Gather (s, r)  "
        "i = Constant <value = int64[1] {0}> ()  y = Unsqueeze (p, i)"
    ),
}


@pytest.mark.parametrize("nodes", DYNAMIC.values(), ids=DYNAMIC.keys())
def test_arithmetic_that_depends_on_dynamic_dims_stays(nodes: str) -> None:
    text = f"g (float[N, M, 4] x) => (int64[K] y) {{ s = Shape (x)  n = Shape <start = 0, end = 1> (x)  {nodes} }}"
    folded, _ = fold_and_compare(text, x(2, 3, 4), x(4, 1, 4), x(1, 3, 4))
    assert "Identity" not in ops(folded)


def test_an_out_of_range_integer_cast_is_left_to_the_runtime() -> None:
    text = """
    g (int64[1] n) => (int64[1] y) { a = Constant <value_floats = [1e30]> ()  i = Cast <to = 7> (a)  y = Add (n, i) }"""
    assert ops(fold(model(text))[0]) == ["Cast", "Add"]


def test_omitted_outputs_do_not_replace_outputs_of_another_node() -> None:
    text = """
    g (float[1, 1, N] x) => (float[1, 1, M] y, int64[1, 1, M] i) {
        a, "" = MaxPool <kernel_shape = [2]> (x)  b, i = MaxPool <kernel_shape = [2]> (x)  y = Add (a, b)
    }"""
    proto = model(text.replace(', ""', ", none"))
    proto.graph.node[0].output[1] = ""
    folded, _ = fold(proto)
    assert_same(run(proto, x(1, 1, 5)), run(folded, x(1, 1, 5)))


NO_EFFECT = {
    "Identity": "y = Identity (a)",
    "a Dropout without training mode": "y = Dropout (a)",
    "a Dropout with training mode off": (
        "r = Constant <value = float {0.5}> ()  off = Constant <value = bool {0}> ()  y = Dropout (a, r, off)"
    ),
    "a Cast to its own type": "y = Cast <to = 1> (a)",
    "a CastLike to its own type": "y = CastLike (a, x)",
    "an identity Transpose": "y = Transpose <perm = [0, 1]> (a)",
    "two Transposes": "t = Transpose (a)  y = Transpose (t)",
    "a view and its inverse": (
        "i = Constant <value = int64[1] {1}> ()  u = Unsqueeze (a, i)  f = Flatten <axis = 1> (u)  y = Identity (f)"
    ),
    "a Reshape to its own shape": "s = Shape (a)  y = Reshape (a, s)",
    "an Expand to its own shape": "s = Shape (a)  y = Expand (a, s)",
    "a Slice of all elements": (
        "b = Constant <value = int64[1] {0}> ()  e = Constant <value = int64[1] {9223372036854775807}> ()  y = Slice (a, b, e)"
    ),
    "a Slice up to the dim": (
        "b = Constant <value = int64[1] {0}> ()  e = Shape <start = 0, end = 1> (x)  y = Slice (a, b, e)"
    ),
    "a Concat of one input": "y = Concat <axis = 0> (a)",
    "a Split into one output": "y = Split <num_outputs = 1> (a)",
    "a Pad of zero": "p = Constant <value = int64[4] {0, 0, 0, 0}> ()  y = Pad (a, p)",
    "a Tile once": "r = Constant <value = int64[2] {1, 1}> ()  y = Tile (a, r)",
    "times one": "one = Constant <value = float {1.0}> ()  y = Mul (one, a)",
    "divided by one": "one = Constant <value = float[4] {1.0, 1.0, 1.0, 1.0}> ()  y = Div (a, one)",
    "minus zero": "zero = Constant <value = float {0.0}> ()  y = Sub (a, zero)",
    "plus minus zero": "zero = Constant <value = float {-0.0}> ()  y = Add (a, zero)",
    "to the power of one": "one = Constant <value = float {1.0}> ()  y = Pow (a, one)",
    "a Where with a constant condition": "t = Constant <value = bool {1}> ()  n = Exp (a)  y = Where (t, a, n)",
}


@pytest.mark.parametrize("nodes", NO_EFFECT.values(), ids=NO_EFFECT.keys())
def test_nodes_without_effect_are_removed(nodes: str) -> None:
    values = np.array([[-0.0, 0.0, np.nan, np.inf], [-1.5, 2.5, 1e-40, -np.inf]], np.float32)
    folded, change = fold_and_compare(
        f"g (float[N, 4] x) => (float[N, 4] y) {{ a = Neg (x)  {nodes} }}", {"x": values}, x(1, 4)
    )
    assert ops(folded) == ["Neg"]
    assert change.removed


HAS_EFFECT = {
    "plus zero, which changes -0.0 to 0.0": "zero = Constant <value = float {0.0}> ()  y = Add (a, zero)",
    "a Dropout in training mode": (
        "r = Constant <value = float {0.0}> ()  on = Constant <value = bool {1}> ()  y = Dropout <seed = 1> (a, r, on)"
    ),
    "times ones of a higher rank": (
        "one = Constant <value = float[2, 1, 1] {1.0, 1.0}> ()  w = Mul (a, one)  y = ReduceMax <keepdims = 0> (w, k)"
    ),
    "a Slice with a negative step": (
        "b = Constant <value = int64[1] {-1}> ()  e = Constant <value = int64[1] {-9223372036854775807}> ()  "
        "ax = Constant <value = int64[1] {0}> ()  st = Constant <value = int64[1] {-1}> ()  y = Slice (a, b, e, ax, st)"
    ),
    "a Reshape of a Transpose to the original shape": "t = Transpose (a)  s = Shape (a)  y = Reshape (t, s)",
    "a Cast to fp16 and back": "h = Cast <to = 10> (a)  y = Cast <to = 1> (h)",
    "a Transpose": "t = Transpose (a)  e = Exp (t)  y = Transpose (e)",
}


@pytest.mark.parametrize("nodes", HAS_EFFECT.values(), ids=HAS_EFFECT.keys())
def test_nodes_with_a_small_effect_stay(nodes: str) -> None:
    values = np.array([[-0.0, 0.0, 3.25, 1e-3], [-1.5, 2.5, 1e-40, 7.0]], np.float32)
    text = f"""g (float[N, 4] x) => (float[N, 4] y) {{
        k = Constant <value = int64[1] {{0}}> ()  a = Neg (x)  {nodes} }}"""
    folded, _ = fold_and_compare(text, {"x": values})
    assert len(ops(folded)) > 1


def test_constants_are_evaluated_in_their_type() -> None:
    text = """
    g (float[N] x) => (float[N] y, int32[1] i, float16[1] h) {
        a = Constant <value = float {2.0}> ()  b = Sqrt (a)  c = Neg (b)  y = Mul (x, c)
        j = Constant <value = int32[1] {2147483647}> ()  i = Add (j, j)
        k = Constant <value_floats = [0.1]> ()  l = Cast <to = 10> (k)  h = Add (l, l)
    }"""
    folded, change = fold_and_compare(text, x(3))
    assert [op for op in ops(folded) if op != "Identity"] == ["Mul"]
    assert "constants" in change.summary


def test_a_constant_that_would_grow_the_model_stays_computed() -> None:
    size = SMALL_RESULT_BYTES // 4 + 1
    text = f"""
    g (float[N] x) => (float[{size}] y) {{
        n = Constant <value = int64[1] {{{size}}}> ()  ones = ConstantOfShape <value = float[1] {{2.0}}> (n)  y = Mul (x, ones)
    }}"""
    assert ops(fold_and_compare(text, x(1))[0]) == ["ConstantOfShape", "Mul"]
    assert ops(fold_and_compare(text.replace(str(size), str(size - 1)), x(1))[0]) == ["Mul"]


def test_a_large_weight_is_not_evaluated() -> None:
    text = "g (float[N, 600] x) => (float[N, 600] y) { t = Transpose (w)  y = MatMul (x, t) }"
    weight = np.random.default_rng(0).random((600, 600), np.float32)
    folded, change = fold_and_compare(text, x(2, 600), w=weight)
    assert ops(folded) == ["Transpose", "MatMul"]
    assert not change


def pairwise_einsum(indices: str, size: int) -> tuple[str, dict[str, Array]]:
    """Return a model with a constant Einsum over one matrix per pair of `indices`, which numpy cannot contract pairwise."""
    pairs = ["".join(pair) for pair in itertools.combinations(indices, 2)]
    text = f"""
    g (float[N] x) => (float[N] y) {{
        e = Einsum <equation = "{",".join(pairs)}->"> ({", ".join(pairs)})  y = Mul (x, e)
    }}"""
    rng = np.random.default_rng(0)
    return text, {pair: rng.random((size, size), np.float32) for pair in pairs}


def test_a_constant_node_with_many_operations_on_small_operands_stays() -> None:
    # 10 operands of 6,400 bytes each, but 40^5 iterations; with 10 indices of size 40 it would take years.
    text, weights = pairwise_einsum("abcde", 40)
    folded, change = fold(model(text, **weights))
    assert ops(folded) == ["Einsum", "Mul"]
    assert not change
    assert change.notes == ("Einsum of e: not evaluated: it takes about 1e+09 operations, the limit is 268,435,456",)


def test_a_constant_einsum_within_the_limits_is_evaluated() -> None:
    text, weights = pairwise_einsum("abcd", 8)
    folded, change = fold(model(text, **weights))
    assert ops(folded) == ["Mul"]
    assert not change.notes
    assert_same(run(model(text, **weights), x(3)), run(folded, x(3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("equation", "shapes", "count"),
    [
        ("ij,jk->ik", [(2, 3), (3, 5)], 2 * 3 * 5 * 2),
        (" i j , j k -> i k ", [(2, 3), (3, 5)], 2 * 3 * 5 * 2),
        ("ii->", [(7, 7)], 7),
        ("...ij,...jk->...ik", [(4, 1, 2, 3), (6, 3, 5)], 4 * 6 * 2 * 3 * 5 * 2),
        ("i...,i...->...", [(2, 3), (2, 4, 3)], 2 * 4 * 3 * 2),
        ("ij,jk", [(1, 3), (3, 5)], 1 * 3 * 5 * 2),
    ],
)
def test_the_operations_of_an_einsum_are_iterations_times_operands(
    equation: str, shapes: list[tuple[int, ...]], count: int
) -> None:
    assert _einsum_operation_count(equation, shapes) == count


CONSTANT_LOOP = """
g (float[2] x) => (float[2] y) <bool t = {1}, float[2] k = {1,1}> {
    z = Loop ("", t, k) <body = b (int64 i, bool c, float[2] a) => (bool c2, float[2] a2) {
        c2 = Identity (c)  a2 = Identity (a)
    }>
    y = Add (x, z)
}
"""
"""A Loop with constant operands and no end: no trip count, and a condition that stays true."""


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (CONSTANT_LOOP, "Loop of z"),
        (CONSTANT_LOOP.replace("a2 = Identity (a)", "a2 = Mul (a, k)"), "Loop of z"),
        (CONSTANT_LOOP.replace("z = Loop", "[endless] z = Loop"), "endless"),
    ],
)
def test_an_endless_loop_with_constant_operands_stays_and_is_noted(text: str, label: str) -> None:
    proto = model(text)
    folded, change = fold(proto)
    assert ops(folded) == ["Loop", "Add"]
    assert change.notes == (f"{label}: not evaluated: nodes with subgraphs are never evaluated",)


@pytest.mark.parametrize("body", ["a2 = Mul (a, x)", "r = RandomUniformLike (a)  a2 = Add (a, r)"])
def test_a_loop_that_is_not_constant_is_not_noted(body: str) -> None:
    assert fold(model(CONSTANT_LOOP.replace("a2 = Identity (a)", body)))[1].notes == ()


def test_a_function_with_constant_operands_is_noted() -> None:
    text = FUNCTIONS.replace("y = l.F (x)", "k = Constant <value_floats = [1.0, 2.0]> ()  [call] f = l.F (k)  y = Add (x, f)")
    folded, change = fold_and_compare(text, x(2))
    assert ops(folded) == ["F", "Add"]
    assert change.notes == ("call: not evaluated: local functions are never evaluated",)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("t = Transpose (w)", "operands and results take 1,310,720 bytes, the limit is 1,048,576"),
        (
            "n = Constant <value = int64[1] {20000}> ()  t = ConstantOfShape (n)",
            "the results take 80,000 bytes, the limit is 65,536 for these operands",
        ),
    ],
)
def test_a_constant_node_above_a_byte_limit_is_noted(nodes: str, reason: str) -> None:
    weight = np.ones((1, 163840), np.float32)
    text = f"g (float[N] x) => (float[N, M] y) {{ v = Expand (x, s)  {nodes}  y = Mul (v, t) }}"
    folded, change = fold(model(text, w=weight, s=np.array([1, 1], np.int64)))
    assert change.notes[0].endswith(f" of t: not evaluated: {reason}")
    assert len(change.notes) == 1
    assert "Mul" in ops(folded)


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (EvaluationBudget(operations=30), "the run of the pass has reached its limit of 4,294,967,296 operations"),
        (EvaluationBudget(result_bytes=50), "the run of the pass has reached its limit of 1,073,741,824 result bytes"),
    ],
)
def test_a_run_of_the_pass_has_limits_for_all_nodes_together(budget: EvaluationBudget, reason: str) -> None:
    text = """
    g (float[N] x) => (float[N] y) {
        a = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]> ()
        b = Exp (a)  c = Exp (b)  y = Mul (x, c)
    }"""
    graph, stats = ir.from_proto(model(text)), FoldStats(budget=budget)
    assert FoldIteration(graph, stats).run()
    assert stats.not_evaluated == {"Exp of c": reason}
    assert [node.op_type for node in graph.graph if node.outputs[0].uses() or node.outputs[0].is_graph_output()] == [
        "Exp",
        "Mul",
    ]


def test_a_range_with_more_elements_than_int64_stays() -> None:
    text = """
    g (int64[1] x) => (int64[N] y) {
        a = Constant <value = int64 {-9223372036854775807}> ()  b = Constant <value = int64 {9223372036854775807}> ()
        d = Constant <value = int64 {1}> ()  r = Range (a, b, d)  y = Mul (x, r)
    }"""
    assert ops(fold(model(text))[0]) == ["Range", "Mul"]


def test_a_quantized_weight_stays_quantized() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { d = DequantizeLinear (w, s)  y = MatMul (x, d) }"
    folded, _ = fold_and_compare(text, x(2, 4), w=np.eye(4, dtype=np.int8), s=np.array(0.5, np.float32))
    assert ops(folded) == ["DequantizeLinear", "MatMul"]


def test_random_ops_are_not_shared() -> None:
    text = """
    g (float[N] x) => (float[4] y) {
        a = RandomNormal <shape = [4]> ()  b = RandomNormal <shape = [4]> ()  d = Add (a, b)  y = Add (d, x)
    }"""
    assert ops(fold(model(text))[0]) == ["RandomNormal", "RandomNormal", "Add", "Add"]


def test_a_division_of_integers_by_zero_is_left_to_the_runtime() -> None:
    text = """
    g (int64[1] n) => (int64[1] y) {
        a = Constant <value = int64[1] {1}> ()  z = Constant <value = int64[1] {0}> ()  b = Div (a, z)  y = Add (n, b)
    }"""
    assert ops(fold(model(text))[0]) == ["Div", "Add"]


def test_attributes_that_differ_in_the_sign_of_zero_are_not_equal() -> None:
    text = """
    g (float[N] x) => (float[N] y) { a = LeakyRelu <alpha = 0.0> (x)  b = LeakyRelu <alpha = -0.0> (x)  y = Sub (a, b) }"""
    proto = model(text)
    for node, alpha in zip(proto.graph.node, (0.0, -0.0), strict=False):
        node.attribute[0].f = alpha
    assert ops(fold(proto)[0]) == ["LeakyRelu", "LeakyRelu", "Sub"]


def test_repeated_expressions_are_computed_once() -> None:
    text = """
    g (float[N] x) => (float[N] y, float[N] z) {
        a = Exp (x)  b = Exp (x)  c = Sigmoid (a)  d = Sigmoid (b)  y = Mul (c, d)  z = Mul (c, d)
    }"""
    folded, change = fold_and_compare(text, x(5))
    assert ops(folded) == ["Exp", "Sigmoid", "Mul", "Identity"]
    assert "3 repeated expressions" in change.summary


def test_an_output_that_is_constant_or_an_input_keeps_its_name() -> None:
    text = """
    g (float[2] x) => (float[2] y, int64[1] s, float[2] w) {
        s = Shape (x)  one = Constant <value = float {1.0}> ()  y = Mul (x, one)  w = Constant <value = float[2] {1.0, 2.0}> ()
    }"""
    folded, _ = fold_and_compare(text, x(2))
    assert sorted(ops(folded)) == ["Constant", "Identity", "Identity"]


BRANCHES = """
g (bool c, float[N] x) => (float[N] y, float[N] z) {
    yes = Constant <value = bool {1}> ()
    two = Constant <value = float {2.0}> ()
    y = If (yes) <
        then_branch = a () => (float[N] q) { k = Constant <value = float {2.0}> ()  p = Mul (x, k)  q = Add (p, two) },
        else_branch = b () => (float[N] r) { r = Abs (x) }
    >
    z = If (c) <
        then_branch = d () => (float[N] q) { p = Neg (x)  k = Identity (p)  q = Add (k, y) },
        else_branch = e () => (float[N] r) { s = Mul (two, two)  t = Mul (two, two)  u = Add (s, t)  r = Mul (x, u) }
    >
}
"""


def test_a_constant_if_is_replaced_by_its_branch_and_a_dynamic_if_is_folded_inside() -> None:
    feeds = [{"c": np.array(choice), **x(3)} for choice in (True, False)]
    folded, change = fold_and_compare(BRANCHES, *feeds)
    assert ops(folded) == ["Mul", "Add", "If"]
    branches = {attribute.name: [node.op_type for node in attribute.g.node] for attribute in folded.graph.node[2].attribute}
    assert branches == {"then_branch": ["Neg", "Add"], "else_branch": ["Mul"]}
    assert "1 constant If" in change.summary


def test_nodes_that_only_the_removed_branch_uses_are_removed() -> None:
    text = """
    g (float[N] x) => (float[N] y) {
        no = Constant <value = bool {0}> ()  e = Exp (x)
        y = If (no) <then_branch = a () => (float[N] q) { q = Neg (e) }, else_branch = b () => (float[N] r) { r = Abs (x) }>
    }"""
    assert ops(fold_and_compare(text, x(3))[0]) == ["Abs"]


LOOP = """
g (int64 n, float[M] x) => (float[M] y, float[K, M] s) {
    go = Constant <value = bool {1}> ()
    y, s = Loop (n, go, x) <body = b (int64 i, bool ci, float[M] st) => (bool co, float[M] so, float[M] sc) {
        co = Identity (ci)  two = Constant <value = float {2.0}> ()  e = Mul (two, two)  f = Add (e, e)
        so = Mul (st, f)  sc = Mul (st, f)
    }>
}
"""


def test_a_loop_stays_and_its_body_is_folded() -> None:
    folded, _ = fold_and_compare(LOOP, {"n": np.array(3), **x(2)})
    assert ops(folded) == ["Loop"]
    assert [node.op_type for node in folded.graph.node[0].attribute[0].g.node] == ["Identity", "Mul", "Identity"]


FUNCTIONS = """
<ir_version: 10, opset_import: ["" : 21, "l" : 1, "nobody" : 3]>
g (float[M] x) => (float[M] y) { y = l.F (x) }
<domain: "l", opset_import: ["" : 21, "nobody" : 3]>
F (x) => (y) {
    a = Constant <value_float = 2.0> ()  b = Constant <value_float = 2.0> ()  c = Mul (a, b)
    d = Mul (x, c)  e = Mul (x, c)  f = Add (d, e)  y = Identity (f)
}
<domain: "l", opset_import: ["" : 21]>
Unused (x) => (y) { y = Neg (x) }
"""


def test_functions_are_folded_with_constant_nodes_and_unused_functions_are_removed() -> None:
    folded, change = fold_and_compare(FUNCTIONS, x(2))
    (function,) = folded.functions
    assert [node.op_type for node in function.node] == ["Constant", "Mul", "Add"]
    assert {entry.domain for entry in function.opset_import} == {""}
    assert {"function l::Unused", "opset import nobody"} <= set(change.removed)


def test_a_node_that_does_not_match_its_schema_is_unchanged() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21, "mine" : 1]>
    g (float[N] x) => (float[N] y) {
        a = mine.Thing (x)  b = mine.Thing (x)  c = Later (a, b)  d = Add (c)  e = Identity (d, d)  f = Cast <to = "x"> (e)
        y = Transpose <perm = 3> (f)
    }"""
    folded, change = fold(model(text))
    assert ops(folded) == ["Thing", "Thing", "Later", "Add", "Identity", "Cast", "Transpose"]
    assert not change
    assert change.summary


def test_an_initializer_that_is_an_input_is_not_constant() -> None:
    text = "g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 1.0}> { y = Mul (x, w) }"
    other = np.array([3.0, 4.0], np.float32)
    folded, _ = fold_and_compare(text, x(2), {**x(2), "w": other})
    assert ops(folded) == ["Mul"]


def test_no_initializers_are_added_below_ir_version_4() -> None:
    text = """
    g (float[2] x) => (float[2] y) {
        c = Constant <value = float[2] {1.0, 1.0}> ()  d = Constant <value = float[2] {1.0, 3.0}> ()
        e = Add (d, c)  y = Add (x, e)
    }"""
    folded, _ = fold_and_compare(text, x(2), opset=11, ir_version=3)
    assert ops(folded) == ["Constant", "Add"]
    assert not folded.graph.initializer


@pytest.mark.parametrize("opset", [11, 12, 13, 18, 24])
def test_axes_are_read_from_an_attribute_or_an_input(opset: int) -> None:
    if opset < 13:
        views = "u = Unsqueeze <axes = [0]> (a)  v = Squeeze <axes = [0]> (u)"
    else:
        views = "ax = Constant <value = int64[1] {0}> ()  u = Unsqueeze (a, ax)  v = Squeeze (u, ax)"
    text = f"g (float[N, 4] x) => (float[N, 4] y) {{ a = Neg (x)  {views}  y = Identity (v) }}"
    assert ops(fold_and_compare(text, x(3, 4), opset=opset)[0]) == ["Neg"]


def test_equal_weights_are_shared_and_weights_that_differ_in_the_last_element_are_not(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).random((64, 64), np.float32)
    differs_last = weight.copy()
    differs_last[-1, -1] += 1
    text = """
    g (float[N, 64] x) => (float[N, 64] y) {
        a = MatMul (x, v)  b = MatMul (a, w)  c = MatMul (b, late)  y = MatMul (c, u)
    }"""
    proto = model(text, v=weight, w=weight, late=differs_last, u=weight)
    folded, change = fold(proto)
    assert [tensor.name for tensor in folded.graph.initializer] == ["v", "late"]
    assert "2 duplicate initializers" in change.summary
    expected = run(proto, x(2, 64))
    assert_same(expected, run(folded, x(2, 64)))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    lazy = load(tmp_path / "m.onnx")
    first_tensor = lazy.graph.initializers["v"].const_value
    Fold().rewrite(lazy, CONTEXT)
    assert isinstance(first_tensor, FileTensor)
    assert set(lazy.graph.initializers) == {"v", "late"}
    assert lazy.graph.initializers["v"].const_value is first_tensor
    save(lazy, tmp_path / "folded.onnx")
    assert_same(expected, run(onnx.load(tmp_path / "folded.onnx"), x(2, 64)))


def test_a_model_without_redundancy_is_unchanged() -> None:
    proto = model("g (float[N, 4] x) => (float[N, 4] y) { a = MatMul (x, w)  y = Relu (a) }", w=np.eye(4, dtype=np.float32))
    graph = ir.from_proto(proto)
    nodes, weight = list(graph.graph), graph.graph.initializers["w"]
    change = Fold().rewrite(graph, CONTEXT)
    assert not change
    assert change == Change(summary="no part of the graph is constant, repeated or unused")
    assert all(one is other for one, other in zip(nodes, graph.graph, strict=True))
    assert graph.graph.initializers["w"] is weight


@pytest.mark.parametrize("text", [REPEAT, BRANCHES, LOOP, FUNCTIONS])
def test_the_estimate_is_exact_and_does_not_modify_the_model(text: str) -> None:
    graph = ir.from_proto(model(text))
    before = ir.to_proto(graph).SerializeToString(deterministic=True)
    estimate = Fold().estimate(graph, CONTEXT)
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before
    nodes = sum(1 for _ in graph.graph.all_nodes())
    Fold().rewrite(graph, CONTEXT)
    assert estimate.nodes == sum(1 for _ in graph.graph.all_nodes()) - nodes <= 0
    assert estimate.weight_bytes == sum(value.const_value.nbytes for value in graph.graph.initializers.values())  # type: ignore[union-attr]


def test_the_change_lists_nodes_in_graph_order() -> None:
    text = """
    g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) {
        [one] a = Identity (x)  [two] b = Exp (a)  [three] y = Exp (x)  [four] z = Exp (x)  [dead] d = Neg (b)
    }"""
    change = Fold().rewrite(ir.from_proto(model(text)), CONTEXT)
    assert isinstance(change, Change)
    assert change.removed == ("one", "two", "dead", "four")
    assert change.summary.endswith("removed 4 nodes and declarations")


def test_the_property_check_of_fold_passes() -> None:
    graph = ir.from_proto(model(BRANCHES))
    (record,) = pass_manager.run_passes(graph, [Fold()], CONTEXT, {GRAPH_LIVE})
    assert record.outcome == "changed"
    assert record.properties_after == ("graph/live",)


def test_the_property_graph_live_reports_a_dead_node_in_any_graph() -> None:
    for text in (
        "g (float[N] x) => (float[N] y) { [lost] d = Exp (x)  y = Neg (x) }",
        FUNCTIONS.replace("f = Add", "[lost] n = Neg (x)  f = Add"),
        LOOP.replace("so = Mul", "[lost] n = Neg (st)  so = Mul"),
    ):
        assert GRAPH_LIVE.check(ir.from_proto(model(text))) == "no output of `lost` is used"
    assert GRAPH_LIVE.check(ir.from_proto(model(HEADS))) is None


def test_names_of_inlined_nodes_do_not_collide(tmp_path: Path) -> None:
    folded, _ = fold_and_compare(BRANCHES, {"c": np.array(True), **x(3)})
    names: list[Any] = [name for node in folded.graph.node for name in node.output]
    for node in folded.graph.node:
        names += [name for attribute in node.attribute for inner in attribute.g.node for name in inner.output]
    names += [tensor.name for tensor in folded.graph.initializer]
    main, inner = set(names[:3]), names[3:]
    assert not main & set(inner)
    onnx.checker.check_model(folded, full_check=True)
