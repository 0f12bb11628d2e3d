"""The pass `attention` on decomposed attention: outputs on ONNX Runtime before and after the pass are equal."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.decomposed_attention import KEY_LAYOUTS, MASKS, SCALES, SOFTMAXES, decomposed_attention, random_inputs
from support.ort_session import run_as_written

from ryzen_compile.pipeline.pass_manager import run_passes
from ryzen_compile.registry import find_pass, properties
from ryzen_compile.spec.passes import Change, PassContext
from ryzen_passes.attention import Attention
from ryzen_passes.precision import ConvertPrecision

To = Literal["auto", "onnx", "tensorrt"]
TENSORRT = PassContext(backend="tensorrt-rtx")
NODE = {"onnx": "Attention", "tensorrt": "TRT_Attention"}


def fuse(proto: onnx.ModelProto, to: To) -> tuple[onnx.ModelProto, Change]:
    """Run the pass with property checks, check the result with the ONNX checker, and return both."""
    model = ir.from_proto(proto)
    (log,) = run_passes(model, [Attention(to=to)], TENSORRT, properties())
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    change = Change(inserted=log.inserted, removed=log.removed, changed=log.changed, summary=log.reason, notes=log.notes)
    return after, change


def count(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


FORMS = [
    *({"key": key} for key in KEY_LAYOUTS),
    *({"scale": scale} for scale in SCALES if scale != "soft-capped"),
    *({"mask": mask, "softmax": softmax} for mask in MASKS for softmax in SOFTMAXES),
    {"key": "flat", "scale": "both", "mask": "Where with the lowest value", "softmax": "NaN guard"},
    {"key": "grouped query", "scale": "both", "mask": "Where with minus infinity", "softmax": "NaN guard"},
    {"key": "sequence first", "scale": "multiplied after", "mask": "two masks", "softmax": "cast"},
    {"key": "3-D", "mask": "1-D"},
    {"key": "3-D", "mask": "added"},
    {"key": "3-D", "mask": "Where with minus infinity", "softmax": "NaN guard"},
]


@pytest.mark.parametrize("to", ["onnx", "tensorrt"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: ", ".join(form.values()))
def test_every_form_is_fused_into_one_equivalent_attention(form: dict[str, str], to: To) -> None:
    before = decomposed_attention(**form)
    after, change = fuse(before, to)
    assert change.changed == ("attend",)
    assert not change.notes
    op_counts = count(after)
    assert op_counts[NODE[to]] == 1
    assert not {"Softmax", "MatMul", "IsNaN"} & set(op_counts)
    values = random_inputs(before)
    np.testing.assert_allclose(run_as_written(after, values)[0], run_as_written(before, values)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("to", "op"), [("onnx", "Attention"), ("tensorrt", "Tanh")])
def test_soft_capped_scores_are_fused_or_stay_decomposed(to: To, op: str) -> None:
    """TensorRT has no attention with a soft cap."""
    before = decomposed_attention(scale="soft-capped", mask="Where with the lowest value")
    after, _ = fuse(before, to)
    assert count(after)[op] == 1
    values = random_inputs(before)
    np.testing.assert_allclose(run_as_written(after, values)[0], run_as_written(before, values)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["onnx", "tensorrt"])
@pytest.mark.parametrize(
    ("mask", "softmax"),
    [
        ("Where with the lowest value", "plain"),
        ("Where with the lowest value", "NaN guard"),
        ("scores filled", "plain"),
        ("scores filled with the lowest value, then with minus infinity", "plain"),
        ("Where with minus infinity", "NaN guard"),
    ],
)
def test_fully_masked_rows_keep_their_output(mask: str, softmax: str, to: To) -> None:
    before = decomposed_attention(mask=mask, softmax=softmax)
    values = random_inputs(before, mask_row=True)
    if "not_padding" in values:
        values["not_padding"][1:3] = False
    expected = run_as_written(before, values)[0]
    assert np.isfinite(expected).all()
    assert (mask == "Where with minus infinity") == (not expected[0, :, 2].any())
    np.testing.assert_allclose(run_as_written(fuse(before, to)[0], values)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["onnx", "tensorrt"])
def test_infinities_of_a_dynamic_mask_mask_a_row(to: To) -> None:
    before = decomposed_attention(mask="added as the left operand", softmax="NaN guard")
    values = random_inputs(before)
    values["mask"][1] = -np.inf
    values["mask"][2, 3:] = -np.inf
    expected = run_as_written(before, values)[0]
    assert not expected[:, :, 1].any()
    np.testing.assert_allclose(run_as_written(fuse(before, to)[0], values)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["onnx", "tensorrt"])
def test_a_row_of_lowest_values_of_a_dynamic_mask_averages_the_values(to: To) -> None:
    before = decomposed_attention(mask="added as the left operand")
    values = random_inputs(before)
    values["mask"][1] = np.finfo(np.float32).min
    expected = run_as_written(before, values)[0]
    np.testing.assert_allclose(expected[:, :, 1], values["v"].mean(axis=2), rtol=0, atol=1e-6)
    np.testing.assert_allclose(run_as_written(fuse(before, to)[0], values)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["onnx", "tensorrt"])
def test_lowest_values_of_a_dynamic_mask_have_weight_beside_infinities(to: To) -> None:
    before = decomposed_attention(mask="added as the left operand")
    values = random_inputs(before)
    values["mask"][1] = -np.inf
    values["mask"][1, 3:] = np.finfo(np.float32).min
    expected = run_as_written(before, values)[0]
    np.testing.assert_allclose(expected[:, :, 1], values["v"][:, :, 3:].mean(axis=2), rtol=0, atol=1e-6)
    np.testing.assert_allclose(run_as_written(fuse(before, to)[0], values)[0], expected, rtol=0, atol=1e-5)


def test_repeated_keys_and_values_are_replaced_by_the_unrepeated_ones() -> None:
    after, _ = fuse(decomposed_attention(key="grouped query"), "onnx")
    (node,) = [node for node in after.graph.node if node.op_type == "Attention"]
    assert list(node.input) == ["q", "k", "v_few"]
    assert not {"Expand", "Reshape", "Unsqueeze"} & set(count(after))


def test_layers_share_one_mask() -> None:
    single = decomposed_attention(mask="Where with minus infinity", softmax="NaN guard")
    double = onnx.compose.merge_models(
        single, onnx.compose.add_prefix(single, "b_"), io_map=[("y", "b_q")], inputs=None, name="two"
    )
    for node in double.graph.node:
        node.input[:] = ["keep" if name == "b_keep" else name for name in node.input]
    del double.graph.input[[entry.name for entry in double.graph.input].index("b_keep")]
    after, change = fuse(double, "tensorrt")
    assert len(change.changed) == 2
    assert count(after)["ReduceMax"] == 1
    assert count(after)["TRT_Attention"] == 2
    values = random_inputs(single) | {
        f"b_{name}": array for name, array in random_inputs(single, seed=1).items() if name in ("k", "v")
    }
    np.testing.assert_allclose(run_as_written(after, values)[0], run_as_written(double, values)[0], rtol=0, atol=1e-5)


def modified(old: str, new: str, **form: str) -> onnx.ModelProto:
    text = onnx.printer.to_text(decomposed_attention(**form))
    assert old in text
    return onnx.parser.parse_model(text.replace(old, new))


NEAR_MISSES = {
    "the weights are an output": (
        lambda: modified("] y)", "] y, float[B,4,S,N] p)"),
        "the attention weights have other consumers",
    ),
    "the scores are an output": (lambda: modified("] y)", "] y, float[B,4,S,N] s)"), "the scores have other consumers"),
    "the softmax runs over the heads": (
        lambda: modified("axis: int = -1", "axis: int = 1"),
        "the softmax axis is not the key axis",
    ),
    "soft-capped after the mask": (
        lambda: modified("p = Softmax <axis: int = -1> (m)", "n = Tanh (m)  p = Softmax <axis: int = -1> (n)", mask="added"),
        "soft-capped after they are masked",
    ),
    "soft-capped twice": (lambda: modified("m = Identity (s)", "n = Tanh (s)  m = Tanh (n)"), "by a tensor, or twice"),
    "another op": (lambda: modified("m = Identity (s)", "m = Relu (s)"), "there is a Relu between"),
    "a fill with weight in the softmax": (
        lambda: modified("-10000", "-10", mask="scores filled, inverted condition"),
        "masked scores become -10",
    ),
    "scaled after the mask": (
        lambda: modified("p = Softmax <axis: int = -1> (m)", "n = Mul (m, c)  p = Softmax <axis: int = -1> (n)", mask="added"),
        "scaled after they are masked",
    ),
    "one mask value for all keys": (
        lambda: modified("[B,1,1,N] mask", "[B,1,S,1] mask", mask="added"),
        "the mask has one value for all keys",
    ),
    "a broadcast query": (lambda: modified("[B,4,S,32] q", "[1,4,S,32] q"), "differ in their batch size"),
    "fewer value heads": (lambda: modified("[B,4,N,32] v", "[B,1,N,32] v"), "the keys have 4 heads, the values 1"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_unchanged_with_its_reason_in_the_notes(name: str) -> None:
    make, reason = NEAR_MISSES[name]
    before = make()
    after, change = fuse(before, "onnx")
    assert not change
    assert len(change.notes) == 1
    assert reason in change.notes[0]
    assert after == ir.to_proto(ir.from_proto(before))


def test_a_softmax_outside_attention_is_not_a_near_miss() -> None:
    classifier = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18]>
        classify (float[B,8] x, float[8,4] w, float[4,3] u) => (float[B,3] y) {
            h = MatMul (x, w)  p = Softmax (h)  y = MatMul (p, u) }""")
    _, change = fuse(classifier, "tensorrt")
    assert not change
    head = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[B,8] x) => (float[B,8] y) { y = Softmax (x) }'
    )
    assert fuse(head, "tensorrt")[1] == Change(summary="no decomposed attention")


@pytest.mark.parametrize(("key", "is_fused"), [("swapped", False), ("grouped query", True)])
def test_for_onnx_runtime_only_grouped_query_attention_is_fused(key: str, is_fused: bool) -> None:
    model = ir.from_proto(decomposed_attention(key=key))
    change = Attention().rewrite(model, PassContext(backend="onnxruntime"))
    assert isinstance(change, Change)
    assert bool(change) == is_fused
    assert ("Attention" in {node.op_type for node in model.graph}) == is_fused
    assert change.summary


def test_fused_matmul_of_onnx_runtime_is_matched() -> None:
    text = onnx.printer.to_text(decomposed_attention(scale="none"))
    fused = text.replace("s = MatMul (q, kt)", "s = com.microsoft.FusedMatMul <transB = 1, alpha = 0.25> (q, k)")
    fused = fused.replace("kt = Transpose <perm: ints = [0, 1, 3, 2]> (k)", "").replace(
        '"" : 18', '"" : 18, "com.microsoft" : 1'
    )
    before = onnx.parser.parse_model(fused)
    model = ir.from_proto(before)
    assert Attention(to="onnx").rewrite(model, TENSORRT)
    assert [node.op_type for node in model.graph] == ["Attention"]
    values = random_inputs(before)
    np.testing.assert_allclose(
        run_as_written(ir.to_proto(model), values)[0], run_as_written(before, values)[0], rtol=0, atol=1e-5
    )


def test_a_model_whose_opset_cannot_be_raised_is_unchanged() -> None:
    before = decomposed_attention(opset=18)
    before.opset_import[0].version = 12
    after, change = fuse(before, "onnx")
    assert not change
    assert "opset" in change.summary
    assert after == ir.to_proto(ir.from_proto(before))


def test_the_opset_is_kept_if_there_is_nothing_to_unflatten_and_to_fuse() -> None:
    """The last layer of a recognizer is a MatMul before a Softmax, behind Reshapes to 3-D and 4-D."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[2,6,8] x, float[8,8] w) => (float[2,6,8] y)
        <int64[4] four = {2,6,2,4}, int64[3] three = {2,6,8}> {
            a = MatMul (x, w)  b = Reshape (a, four)  c = Relu (b)  d = Reshape (c, three)  e = MatMul (d, w)  y = Softmax (e)
        }"""
    )
    fused, change = fuse(model, "tensorrt")
    assert not change
    assert fused.opset_import[0].version == 18


def test_attention_in_a_subgraph_is_fused() -> None:
    text = onnx.printer.to_text(decomposed_attention()).split("{", 1)[1].rsplit("}", 1)[0]
    inner = text.replace("y = MatMul (p, v)", "y_ = MatMul (p, v)").replace("c =", "root =").replace(", c)", ", root)")
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        branch (bool c, float[B,4,S,32] q, float[B,4,N,32] k, float[B,4,N,32] v) => (float[B,4,S,32] y) {{
            y = If (c) <then_branch = yes () => (float[B,4,S,32] y_) {{ {inner} }},
                        else_branch = no () => (float[B,4,S,32] z) {{ z = Identity (q) }}> }}""")
    after, change = fuse(model, "tensorrt")
    assert change.changed == ("attend",)
    values = random_inputs(decomposed_attention()) | {"c": np.array(True)}
    np.testing.assert_allclose(run_as_written(after, values)[0], run_as_written(model, values)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["attention first", "precision first"])
def test_attention_and_precision_compose_in_either_order(order: str) -> None:
    model = ir.from_proto(decomposed_attention(mask="Where with the lowest value", softmax="NaN guard"))
    passes = [Attention(), ConvertPrecision(to="fp16")]
    run_passes(model, passes if order == "attention first" else passes[::-1], TENSORRT, properties())
    (node,) = [node for node in model.graph if node.op_type == "TRT_Attention"]
    assert {value.dtype for value in node.inputs[:4] if value is not None} == {ir.DataType.FLOAT16}


def test_the_pass_is_found_by_name_and_formatted() -> None:
    assert find_pass("attention") is Attention
    assert str(Attention()) == "attention"
    assert str(Attention(to="onnx")) == "attention{to=onnx}"


def test_the_estimate_counts_softmaxes_and_does_not_modify_the_model(tmp_path: Path) -> None:
    model = ir.from_proto(decomposed_attention())
    before = ir.to_proto(model).SerializeToString()
    estimate = Attention().estimate(model, TENSORRT)
    assert estimate.nodes < 0
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("folded", [False, True])
def test_a_decoder_without_declared_shapes_is_fused(folded: bool) -> None:
    name = "benchmarks_decoder"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "benchmarks" / "llama_graph.py")
    assert spec is not None
    assert spec.loader is not None
    llama = importlib.util.module_from_spec(spec)
    sys.modules[name] = llama
    spec.loader.exec_module(llama)
    config = llama.SyntheticLlamaConfig(layers=3, hidden=64, heads=4, kv_heads=2, intermediate=96, vocabulary=50, positions=64)
    before, weights = llama.build(config)
    random = np.random.default_rng(0)
    before.graph.initializer.extend(
        onnx.numpy_helper.from_array(random.normal(size=shape).astype(np.float32) * 0.1, name)
        for name, shape in weights.items()
    )
    model = ir.from_proto(before)
    run_passes(model, [*([find_pass("fold")()] if folded else []), Attention()], TENSORRT, properties())
    after = ir.to_proto(model)
    assert not count(after)["Softmax"]
    keys = [node.input[1] for node in after.graph.node if node.op_type == "TRT_Attention"]
    assert keys == [f"present.{layer}.key" for layer in range(3)]
    values = llama.make_inputs(config, batch=2, seq=3, past=4)
    for actual, expected in zip(run_as_written(after, values), run_as_written(before, values), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_the_match_of_a_softmax_over_a_deep_network_is_bounded() -> None:
    adds = "".join(f" h{at + 1} = Add (h{at}, h{at})" for at in range(200))
    before = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        deep (float[B,4,S,S] x, float[B,4,S,8] v) => (float[B,4,S,8] y) {{
            h0 = Relu (x) {adds}  p = Softmax (h200)  y = MatMul (p, v) }}""")
    start = time.perf_counter()
    assert fuse(before, "tensorrt")[1] == Change(summary="no decomposed attention")
    assert time.perf_counter() - start < 5


FLATTENED = """
<ir_version: 10, opset_import: ["" : 18]>
joined (float[B,4,S,16] q, float[B,4,N,16] k, float[B,4,N,16] v, float[B,4,N] bias, float[B,1,S,N] mask)
  => (float[B,4,S,16] y, int64[3] size) {{
    qs = Shape (q)  bias_s = Shape (bias)  zero = Constant <value_int=0> ()  four = Constant <value_int=4> ()
    batch = Gather (qs, zero)  both = Mul (batch, four)  at1 = Constant <value_ints=[1]> ()  b = Reshape (batch, at1)
    lead = Reshape (both, at1)  at2 = Constant <value_ints=[2]> ()  at3 = Constant <value_ints=[3]> ()
    h = Constant <value_ints=[4]> ()  d = Constant <value_ints=[16]> ()
    rows = Slice (qs, at2, at3)  keys = Slice (bias_s, at2, at3)
    thin_q = Concat <axis=0> (lead, rows, d)  thin_k = Concat <axis=0> (lead, keys, d)
    one_row = Concat <axis=0> (lead, at1, keys)  scores = Concat <axis=0> (lead, rows, keys)
    wide = Concat <axis=0> (b, h, rows, keys)  out = Concat <axis=0> (b, h, rows, d)
    q3 = Reshape (q, thin_q)  k3 = Reshape (k, thin_k)  v3 = Reshape (v, thin_k)
    kt = Transpose <perm=[0,2,1]> (k3)  s0 = MatMul (q3, kt)  c = Constant <value_float=0.25> ()  s1 = Mul (s0, c)
    {bias}
    s2 = Add (bias3, s1)
    {softmax}
    y3 = MatMul (w3, v3)  size = Shape (y3)  y = Reshape (y3, out) }}
"""
"""Attention with flattened batch and head axes, as exporters write 3-D products (bmm, baddbmm)."""

BIASES = {
    "flattened": "bias3 = Reshape (bias, one_row)",
    "tiled": """first = Constant <value_ints=[0]> ()  few = ReduceMax <keepdims=0> (bias, first)  few3 = Unsqueeze (few, at1)
        times = Concat <axis=0> (b, at1, at1)  bias3 = Tile (few3, times)""",
    "scalar": "bias3 = Constant <value_float=0.5> ()",
}
FLATTENED_SOFTMAXES = {
    "4-D": "s4 = Reshape (s2, wide)  m = Add (s4, mask)  w = Softmax <axis=-1> (m)  w3 = Reshape (w, scores)",
    "3-D": "s4 = Reshape (s2, wide)  m = Add (s4, mask)  m3 = Reshape (m, scores)  w3 = Softmax <axis=-1> (m3)",
}


@pytest.mark.parametrize("to", ["onnx", "tensorrt"])
@pytest.mark.parametrize("softmax", FLATTENED_SOFTMAXES)
@pytest.mark.parametrize("bias", BIASES)
def test_flattened_axes_are_unflattened(bias: str, softmax: str, to: To) -> None:
    before = onnx.parser.parse_model(FLATTENED.format(bias=BIASES[bias], softmax=FLATTENED_SOFTMAXES[softmax]))
    after, change = fuse(before, to)
    assert count(after)[NODE[to]] == 1
    assert not count(after)["Softmax"]
    assert not change.notes
    rng = np.random.default_rng(0)
    for batch, rows, keys in ((2, 3, 5), (1, 1, 4)):
        arrays = {
            "q": rng.normal(size=(batch, 4, rows, 16)),
            "k": rng.normal(size=(batch, 4, keys, 16)),
            "v": rng.normal(size=(batch, 4, keys, 16)),
            "bias": rng.normal(size=(batch, 4, keys)),
            "mask": rng.normal(size=(batch, 1, rows, keys)),
        }
        inputs = {name: array.astype(np.float32) for name, array in arrays.items()}
        for actual, expected in zip(run_as_written(after, inputs), run_as_written(before, inputs), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "softmax",
    ["s4 = Reshape (s2, wide)  t = Tanh (s4)  m = Add (t, mask)  w = Softmax <axis=-1> (m)  w3 = Reshape (w, scores)"],
)
def test_axes_stay_flattened_below_the_minimum_opset(softmax: str) -> None:
    before = onnx.parser.parse_model(FLATTENED.format(bias=BIASES["scalar"], softmax=softmax))
    before.opset_import[0].version = 12
    model = ir.from_proto(before)
    change = Attention(to="onnx").rewrite(model, TENSORRT)
    assert isinstance(change, Change)
    assert "below opset 13" in change.summary
    assert not change
    assert [node.op_type for node in model.graph] == [node.op_type for node in before.graph.node]


def test_a_long_chain_between_flattened_axes_is_analyzed_in_linear_time() -> None:
    """Each Mul reads the one before it twice, so a traversal of all paths would take 2^60 steps."""
    chain = "  ".join(f"c{at + 1} = Mul (c{at}, c{at})" for at in range(60))
    softmax = f"{FLATTENED_SOFTMAXES['4-D']}  c0 = Identity (q3)  {chain}  parted = Reshape (c60, out)"
    before = onnx.parser.parse_model(FLATTENED.format(bias=BIASES["scalar"], softmax=softmax))
    assert count(fuse(before, "onnx")[0])["Attention"] == 1
