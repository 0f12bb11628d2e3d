"""The pass `precision`: which nodes it converts or keeps in fp32; the result is valid and computes the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import onnx_samples
from support.ort_session import run_model

from ryzen_compile.errors import BackendError
from ryzen_compile.ir.interface_metadata import interface_of, write_interface
from ryzen_compile.numerics.half_emulation import emulate_half_precision
from ryzen_compile.pipeline import pass_manager
from ryzen_compile.pipeline.parser import parse as parse_pipeline
from ryzen_compile.pipeline.range_measurement import measure_ranges
from ryzen_compile.spec.interface import Inputs
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.precision import ConvertPrecision
from ryzen_passes.precision.rules import PRECISION_RULES
from ryzen_passes.properties import TYPES_FLOAT32

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
Array = np.ndarray[Any, np.dtype[Any]]
FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def parse_model(text: str, **weights: Array) -> ir.Model:
    proto = onnx.parser.parse_model(text if "ir_version" in text else HEADER + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    return ir.from_proto(proto)


def context(*samples: Inputs) -> PassContext:
    return PassContext(backend="tensorrt-rtx", samples=samples, measure_ranges=measure_ranges)


def apply(pass_: ConvertPrecision, model: ir.Model, *samples: Inputs) -> Change:
    """Run the pass with property checks, and assert that the result is a valid model."""
    pass_manager.run_passes(model.clone(), [pass_], context(*samples), {TYPES_FLOAT32})
    change = pass_.rewrite(model, context(*samples))
    assert isinstance(change, Change)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return change


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    values = [
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(value for node in model.graph for value in node.outputs),
    ]
    return {str(value.name): value.dtype for value in values}


def reason_of(change: Change, node: str) -> str:
    """Return the name of the rule that keeps `node` in fp32, or `half`."""
    rules = [note.split(": ")[1] for note in change.notes if note.startswith(f"{node}: ")]
    return rules[0] if rules else "half"


MLP = """
mlp (float[N,4] x) => (float[N,4] y) {
    [first] a = MatMul (x, w)  [bias] b = Add (a, k)  [act] r = Relu (b)  [second] y = MatMul (r, w)
}
"""
MLP_WEIGHTS: dict[str, Array] = {"w": np.eye(4, dtype=np.float32) / 3, "k": np.ones(4, np.float32)}


@pytest.mark.parametrize(("to", "dtype"), [("fp16", FLOAT16), ("bf16", BFLOAT16)])
def test_every_node_is_converted_and_inputs_and_outputs_keep_their_types(to: Any, dtype: ir.DataType) -> None:
    model = parse_model(MLP, **MLP_WEIGHTS)
    change = apply(ConvertPrecision(to=to), model)
    assert ops(model) == ["Cast", "MatMul", "Add", "Relu", "MatMul", "Cast"]
    dtypes = types(model)
    assert (dtypes["x"], dtypes["y"]) == (FLOAT, FLOAT)
    assert {dtypes[name] for name in ("w", "k", "a", "b", "r")} == {dtype}
    assert set(change.changed) == {"first", "bias", "act", "second"}
    assert len(change.inserted) == 2


def test_a_weight_with_several_consumers_is_converted_once() -> None:
    model = parse_model(MLP, **MLP_WEIGHTS)
    apply(ConvertPrecision(to="fp16"), model)
    assert sorted(model.graph.initializers) == ["k", "w"]


def test_with_io_inputs_and_outputs_are_converted_and_no_cast_remains() -> None:
    model = parse_model(MLP, **MLP_WEIGHTS)
    apply(ConvertPrecision(to="fp16", io=True), model)
    assert ops(model) == ["MatMul", "Add", "Relu", "MatMul"]
    assert (types(model)["x"], types(model)["y"]) == (FLOAT16, FLOAT16)


def test_a_weight_that_fp32_and_half_nodes_read_exists_once_per_type() -> None:
    model = parse_model(MLP, **MLP_WEIGHTS)
    apply(ConvertPrecision(to="fp16", keep=("second",)), model)
    held = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert held == {"w": FLOAT, "w.fp16": FLOAT16, "k": FLOAT16}


def test_the_outputs_stay_close() -> None:
    model = parse_model(MLP, **MLP_WEIGHTS)
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    exact = run_model(model, {"x": x})[0]
    apply(ConvertPrecision(to="fp16"), model)
    error = np.abs(run_model(emulate_half_precision(model), {"x": x})[0] - exact).max()
    assert 0 < error < 2e-3


@pytest.mark.parametrize("pattern", ["second", "sec*", "s?cond"])
def test_nodes_are_kept_by_name(pattern: str) -> None:
    model = parse_model(MLP, **MLP_WEIGHTS)
    change = apply(ConvertPrecision(to="fp16", keep=(pattern,)), model)
    assert reason_of(change, "second") == "keep"
    assert reason_of(change, "first") == "half"


def test_nodes_are_kept_by_op_type() -> None:
    change = apply(ConvertPrecision(to="fp16", keep=("MatMul",)), parse_model(MLP, **MLP_WEIGHTS))
    assert {reason_of(change, "first"), reason_of(change, "second")} == {"keep"}


@pytest.mark.parametrize("option", ["keep", "force"])
def test_a_pattern_without_a_match_is_refused_and_the_model_is_unchanged(option: str) -> None:
    model = parse_model(MLP, **MLP_WEIGHTS)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    refusal = dataclasses.replace(ConvertPrecision(to="fp16"), **{option: ("Matmul",)}).rewrite(model, context())  # type: ignore[arg-type]
    assert isinstance(refusal, Refusal)
    assert "Matmul" in refusal.reason
    assert "MatMul" in (refusal.hint or "")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("range_margin", [0.5, float("nan")])
def test_a_range_margin_below_one_is_rejected(range_margin: float) -> None:
    with pytest.raises(ValueError, match="`range-margin` must be at least 1"):
        ConvertPrecision(to="fp16", range_margin=range_margin)


def test_the_formatted_pass_parses_back() -> None:
    pass_ = ConvertPrecision(to="bf16", keep=("/enc/*", "Conv"), io=True, range_margin=8)
    assert parse_pipeline(str(pass_)) == (pass_,)


def test_the_estimate_is_half_of_the_weight_bytes_and_does_not_modify_the_model() -> None:
    model = parse_model(MLP, **MLP_WEIGHTS)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert ConvertPrecision(to="fp16").estimate(model, context()).weight_bytes == -(16 + 4) * 4 // 2
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


EXAMPLES: dict[str, tuple[str, str]] = {
    "sum": ("r = ReduceMean (x)", "r"),
    "statistic": ("s = Mul (x, x) m = ReduceSum (s)", "s"),
    "power": ("p = Pow (x, two)", "p"),
    "exponential": ("e = Exp (x)", "e"),
    "angle": ("s = Sin (x)", "s"),
    "position": ("f = Cast <to: int = 1> (i) g = Mul (f, two)", "g"),
    "softmax": ("s = Softmax (x)", "s"),
    "order": ("v, n = TopK (x, k)", "v"),
    "coordinate": ("s = GridSample (q, grid)", "s"),
    "lengths": (
        "l = Cast <to: int = 6> (i) u = Unsqueeze (x, k) r = RNN <hidden_size: int = 3> (u, rw, rr, rb, l)",
        "r",
    ),
    "random": ("s = RandomNormalLike (x)", "s"),
    "quantized": ("q8 = QuantizeLinear (x, scale)", "q8"),
    "dequantized": ("q8 = QuantizeLinear (x, scale) d = DequantizeLinear (q8, scale) s = MatMul (d, w)", "s"),
    "weight": ("s = MatMul (x, big)", "s"),
    "underflow": ("s = Add (x, tiny)", "s"),
    "overflow": ("s = Mul (x, thousand)", "s"),
}


@pytest.mark.parametrize("rule", [rule.name for rule in PRECISION_RULES])
def test_each_rule_keeps_the_node_of_its_example_in_fp32(rule: str) -> None:
    body, node = EXAMPLES[rule]
    named = " ".join(f"[{part.split(' = ')[0].split(', ')[0].split()[-1]}] {part}" for part in _split_statements(body))
    model = parse_model(
        f"g (float[2,2] x, int64[2] i, float[1,1,4,4] q, float[1,2,2,2] grid) => (y) {{ {named} y = Identity ({node}) }}",
        two=np.float32(2),
        scale=np.float32(0.1),
        k=np.array([1], np.int64),
        w=np.eye(2, dtype=np.float32),
        big=np.full((2, 2), 1e6, np.float32),
        tiny=np.float32(1e-12),
        thousand=np.float32(1000),
        rw=np.ones((1, 3, 2), np.float32),
        rr=np.ones((1, 3, 3), np.float32),
        rb=np.ones((1, 6), np.float32),
    )
    used = {value for each in model.graph for value in each.inputs}
    for name, value in tuple(model.graph.initializers.items()):
        if value not in used:
            del model.graph.initializers[name]
    samples = (
        [
            {
                "x": np.full((2, 2), 300, np.float32),
                "i": np.array([1, 2]),
                "q": np.ones((1, 1, 4, 4), np.float32),
                "grid": np.ones((1, 2, 2, 2), np.float32),
            }
        ]
        if rule == "overflow"
        else []
    )
    change = ConvertPrecision(to="fp16", keep=()).rewrite(model, context(*samples))
    assert isinstance(change, Change)
    assert reason_of(change, node) == rule


def _split_statements(body: str) -> Sequence[str]:
    import re

    return re.findall(r"[\w, ]+? = \w+ (?:<[^>]*> )?\([^)]*\)", body)


def overflow_model() -> ir.Model:
    return parse_model(onnx_samples.OVERFLOW)


def test_the_overflow_model_overflows_without_calibration() -> None:
    model = overflow_model()
    change = apply(ConvertPrecision(to="fp16"), model)
    assert "no calibration samples" in change.summary
    x = np.array([300], np.float32)
    assert np.isinf(run_model(emulate_half_precision(model), {"x": x})[0]).all()


def test_the_overflow_model_is_exact_with_calibration() -> None:
    model, sample = overflow_model(), {"x": np.array([300], np.float32)}
    change = apply(ConvertPrecision(to="fp16"), model, sample)
    assert reason_of(change, "square") == "overflow"
    assert "measured on 1 samples" in change.summary
    np.testing.assert_array_equal(run_model(emulate_half_precision(model), sample)[0], [90])


def test_bf16_represents_a_range_that_fp16_does_not() -> None:
    model, sample = overflow_model(), {"x": np.array([300], np.float32)}
    change = apply(ConvertPrecision(to="bf16"), model, sample)
    assert {reason_of(change, "square"), reason_of(change, "scale")} == {"half"}


def test_the_range_margin_decides_how_large_a_tensor_may_be() -> None:
    sample = {"x": np.array([100], np.float32)}  # 100 * 100 * 4 is below 65504, times 8 is not
    assert reason_of(apply(ConvertPrecision(to="fp16"), overflow_model(), sample), "square") == "half"
    assert reason_of(apply(ConvertPrecision(to="fp16", range_margin=8), overflow_model(), sample), "square") == "overflow"


def test_no_rule_applies_to_a_forced_node() -> None:
    model = parse_model("g (float[N] x) => (float[N] y) { [e] y = Exp (x) }")
    assert reason_of(apply(ConvertPrecision(to="fp16", force=("Exp",)), model), "e") == "half"


def test_without_measured_ranges_the_static_rules_apply_and_the_summary_states_why() -> None:
    def fail(model: ir.Model, samples: Sequence[Inputs]) -> Any:
        raise BackendError("ONNX Runtime lacks odd::Thing")

    failing_context = PassContext(backend="tensorrt", samples=[{"x": np.ones(1, np.float32)}], measure_ranges=fail)
    change = ConvertPrecision(to="fp16").rewrite(overflow_model(), failing_context)
    assert isinstance(change, Change)
    assert "static rules only: ONNX Runtime lacks odd::Thing" in change.summary


MASKED = """
masked (float[N,4] q, float[N,4] k, bool[N,N] m) => (float[N,4] y) {{
    t = Transpose (k)  [scores] s = MatMul (q, t)
    {mask}
    [soft] p = Softmax (a)  [values] y = MatMul (p, k)
}}
"""
MASKS = {
    "where": "f = Where (m, zero, low)  [mask] a = Add (s, f)",
    "fill": "[mask] a = Where (m, s, low)",
    "arithmetic": "c = Cast <to: int = 1> (m)  d = Sub (one, c)  f = Mul (d, low)  [mask] a = Add (s, f)",
    "clipped": "f = Where (m, zero, low)  g = Clip (f, low)  [mask] a = Add (s, g)",
    "twice": "f = Where (m, zero, low)  b = Add (s, f)  [mask] a = Add (b, f)",
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("low", [-3.4028234663852886e38, -1e9, -20000.0])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_a_fully_masked_row_stays_finite(to: Any, mask: str, low: float, calibrated: bool) -> None:
    model = parse_model(MASKED.format(mask=MASKS[mask]), zero=np.float32(0), one=np.float32(1), low=np.float32(low))
    for name in ("zero", "one"):
        if not model.graph.initializers[name].uses():
            del model.graph.initializers[name]
    rows = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32) * 3
    feed = {"q": rows, "k": rows, "m": np.tri(6, dtype=bool)}
    feed["m"][2] = False
    exact = run_model(model, feed)[0]
    assert np.isfinite(exact).all() == (mask != "twice" or low > -3e38)
    change = apply(ConvertPrecision(to=to), model, *([feed] if calibrated else []))
    assert {reason_of(change, name) for name in ("scores", "mask", "soft", "values")} == {"half"}
    actual = run_model(emulate_half_precision(model), feed)[0]
    assert np.isfinite(actual).all()
    other_rows = [row for row in range(6) if row != 2]
    np.testing.assert_allclose(actual[other_rows], exact[other_rows], atol=0.1 if to == "bf16" else 0.02)


def test_minus_infinity_in_a_mask_is_not_clamped() -> None:
    model = parse_model(
        MASKED.format(mask="f = Where (m, zero, low)  [mask] a = Add (s, f)"), zero=np.float32(0), low=np.float32(-np.inf)
    )
    rows = np.ones((2, 4), np.float32)
    feed = {"q": rows, "k": rows, "m": np.array([[True, False], [True, True]])}
    change = apply(ConvertPrecision(to="fp16"), model, feed)
    assert reason_of(change, "mask") == "half"
    assert np.isneginf(model.graph.initializers["low"].const_value.numpy())  # type: ignore[union-attr]


def test_a_large_constant_that_is_not_a_fill_value_keeps_its_value_and_its_node_in_fp32() -> None:
    model = parse_model("g (float[N] x) => (float[N] y) { [m] a = Mul (x, big)  y = Relu (a) }", big=np.float32(1e6))
    change = apply(ConvertPrecision(to="fp16"), model)
    assert reason_of(change, "m") == "weight"
    assert model.graph.initializers["big"].const_value.numpy() == 1e6  # type: ignore[union-attr]


def test_clip_bounds_without_effect_do_not_keep_the_node_in_fp32() -> None:
    largest = np.float32(3.4028234663852886e38)
    model = parse_model("g (float[N] x) => (float[N] y) { [c] y = Clip (x, low, high) }", low=-largest, high=largest)
    assert reason_of(apply(ConvertPrecision(to="fp16"), model), "c") == "half"


def test_only_a_softmax_over_attention_scores_is_converted() -> None:
    scores = parse_model(
        "g (float[N,4] x) => (float[N,4] y) { t = Transpose (x) s = MatMul (x, t) [p] p = Softmax (s) y = MatMul (p, x) }"
    )
    logits = parse_model(
        "g (float[N,4] x) => (float[N,4] y) { s = MatMul (x, w) [p] y = Softmax (s) }", w=np.eye(4, dtype=np.float32)
    )
    assert reason_of(apply(ConvertPrecision(to="fp16"), scores), "p") == "half"
    assert reason_of(apply(ConvertPrecision(to="fp16"), logits), "p") == "softmax"


NORM = """
norm (float[N,4] x) => (float[N,4] y) {
    a = MatMul (x, w)
    [mean] m = ReduceMean <keepdims: int = 1> (a, last)  [center] d = Sub (a, m)  [square] q = Mul (d, d)
    [variance] v = ReduceMean <keepdims: int = 1> (q, last)  [eps] e = Add (v, epsilon)  [root] r = Sqrt (e)
    [divide] n = Div (d, r)  [gain] g = Mul (n, gamma)
    y = MatMul (g, w)
}
"""


def test_a_decomposed_norm_is_one_fp32_region_with_two_casts() -> None:
    model = parse_model(
        NORM, w=np.eye(4, dtype=np.float32), last=np.array([-1]), epsilon=np.float32(1e-12), gamma=np.ones(4, np.float32)
    )
    change = apply(ConvertPrecision(to="fp16"), model)
    rules = {name: reason_of(change, name) for name in ("mean", "center", "square", "variance", "eps", "root", "divide")}
    assert rules == {
        "mean": "sum",
        "center": "region",
        "square": "statistic",
        "variance": "sum",
        "eps": "statistic",
        "root": "statistic",
        "divide": "region",
    }
    inner = [node.op_type for node in model.graph][2:-1]
    assert inner.count("Cast") == 2


def test_norm_ops_are_converted() -> None:
    model = parse_model(
        "g (float[N,4] x) => (float[N,4] y) { [ln] y = LayerNormalization <epsilon: float = 1e-12> (x, k) }",
        k=np.ones(4, np.float32),
    )
    assert reason_of(apply(ConvertPrecision(to="fp16"), model), "ln") == "half"


def test_positions_and_angles_stay_fp32_up_to_the_activations() -> None:
    model = parse_model(
        """
        rope (float[N,8] x, int64[N] positions) => (float[N,8] y) {
            q = MatMul (x, w)
            [count] p = Cast <to: int = 1> (positions)  c = Unsqueeze (p, last)
            [angles] a = MatMul (c, inverse)  [cosine] k = Cos (a)  [rotate] r = Mul (q, k)  y = MatMul (r, w)
        }
        """,
        w=np.eye(8, dtype=np.float32),
        last=np.array([1]),
        inverse=np.linspace(0.1, 1, 8, dtype=np.float32)[None],
    )
    change = apply(ConvertPrecision(to="fp16"), model)
    assert [reason_of(change, name) for name in ("count", "angles", "cosine", "rotate")] == [
        "position",
        "position",
        "angle",
        "half",
    ]


def test_a_cast_of_uint8_pixels_is_not_positional() -> None:
    model = parse_model(
        "g (uint8[N,4] x) => (float[N,4] y) { [to] f = Cast <to: int = 1> (x) [m] y = MatMul (f, w) }",
        w=np.eye(4, dtype=np.float32),
    )
    change = apply(ConvertPrecision(to="fp16"), model)
    assert {reason_of(change, "to"), reason_of(change, "m")} == {"half"}
    assert ops(model) == ["Cast", "MatMul", "Cast"]


def test_a_constant_node_is_converted_or_copied() -> None:
    model = parse_model("""
        g (float[N] x) => (float[N] y) {
            c = Constant <value: tensor = float {0.3}> ()  d = Constant <value_float: float = 0.7> ()
            [a] a = Mul (x, c)  [b] b = Mul (x, d)  [e] e = Exp (b)  [f] f = Mul (e, d)  y = Add (a, f)
        }
    """)
    change = apply(ConvertPrecision(to="fp16", keep=("f",), force=("a",)), model)
    held = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert held["c.fp16"] == FLOAT16
    assert "Constant" in ops(model)
    assert len(change.removed) == 1


def test_constant_of_shape_is_converted() -> None:
    model = parse_model("""
        g (float[N] x) => (float[N] y) {
            s = Shape (x)  [z] z = ConstantOfShape <value: tensor = float[1] {0.5}> (s)  [a] y = Add (x, z)
        }
    """)
    change = apply(ConvertPrecision(to="fp16"), model)
    assert (reason_of(change, "z"), types(model)["z"]) == ("half", FLOAT16)
    np.testing.assert_array_equal(run_model(emulate_half_precision(model), {"x": np.ones(2, np.float32)})[0], [1.5, 1.5])


def test_scales_of_resize_stay_fp32() -> None:
    model = parse_model(
        'g (float[1,1,N,N] x) => (float[1,1,M,M] y) { [r] y = Resize (x, "", scales) }',
        scales=np.array([1, 1, 2, 2], np.float32),
    )
    change = apply(ConvertPrecision(to="fp16"), model)
    assert (reason_of(change, "r"), types(model)["scales"]) == ("half", FLOAT)


def test_integers_strings_and_booleans_are_left_alone() -> None:
    model = parse_model("""
        g (int64[N] i, string[N] s, bool[N] b) => (int64[N] j, string[N] t, bool[N] c) {
            j = Abs (i)  t = Identity (s)  c = Not (b)
        }
    """)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    change = apply(ConvertPrecision(to="fp16"), model)
    assert not change
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_control_flow_and_its_subgraphs_stay_fp32() -> None:
    model = parse_model("""
        g (float[N] x, bool c) => (float[N] y) {
            [out] a = Mul (x, x)
            [if] b = If (c) <
                then_branch = t () => (float[N] s) { s = Add (a, a) },
                else_branch = e () => (float[N] o) { o = Neg (a) }
            >
            [end] y = Mul (b, a)
        }
    """)
    change = apply(ConvertPrecision(to="fp16"), model)
    assert reason_of(change, "if") == "subgraph"
    assert {reason_of(change, "out"), reason_of(change, "end")} <= {"half", "region"}
    x = np.array([1.5, 2], np.float32)
    for condition in (True, False):
        expected = (2 if condition else -1) * x**4
        np.testing.assert_allclose(
            run_model(emulate_half_precision(model), {"x": x, "c": np.array(condition)})[0], expected, rtol=1e-2
        )


def test_a_local_function_without_a_declared_op_stays_fp32() -> None:
    model = parse_model(
        """
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[N,4] x) => (float[N,4] y) { [call] a = local.Halve (x)  [end] y = MatMul (a, w) }
        <domain: "local", opset_import: ["" : 21]> 
        Halve (a) => (c) { k = Constant <value: tensor = float {0.5}> ()  c = Mul (a, k) }
        """,
        w=np.eye(4, dtype=np.float32),
    )
    change = apply(ConvertPrecision(to="fp16"), model)
    assert (reason_of(change, "call"), reason_of(change, "end")) == ("unknown", "half")
    assert ops(model) == ["Halve", "Cast", "MatMul", "Cast"]


def test_the_declared_attention_op_is_converted() -> None:
    from ryzen_compile.registry import find_op

    model = parse_model("""
        <ir_version: 10, opset_import: ["" : 23, "ryzen" : 1]>
        g (float[1,2,N,8] q, float[1,2,N,8] k, float[1,2,N,8] v) => (float[1,2,N,8] y) {
            [attention] y = ryzen.TRT_Attention (q, k, v)
        }
    """)
    find_op("TRT_Attention").add_to(model)
    change = ConvertPrecision(to="fp16").rewrite(model, context())
    assert isinstance(change, Change)
    assert reason_of(change, "attention") == "half"
    assert ops(model) == ["Cast", "Cast", "Cast", "TRT_Attention", "Cast"]


def test_an_op_without_bf16_in_the_opset_raises_the_opset() -> None:
    model = parse_model(
        "g (float[1,3,N,N] x) => (float[1,1,M,M] y) { [conv] y = Conv (x, w) }", w=np.ones((1, 3, 3, 3), np.float32)
    )
    change = apply(ConvertPrecision(to="bf16"), model)
    assert reason_of(change, "conv") == "half"
    assert model.opset_imports[""] == 22
    assert "opset raised from 21 to 22" in change.summary


def test_an_op_without_half_precision_stays_fp32() -> None:
    model = parse_model("""
        g (float[1,N,4] boxes, float[1,1,N] scores) => (int64[M,3] y) {
            b = Neg (boxes)  s = Neg (scores)  [nms] y = NonMaxSuppression (b, s)
        }
    """)
    assert reason_of(apply(ConvertPrecision(to="fp16"), model), "nms") == "schema"


def test_bf16_is_refused_below_opset_13() -> None:
    model = parse_model('<ir_version: 7, opset_import: ["" : 11]> g (float[N] x) => (float[N] y) { y = Relu (x) }')
    refusal = ConvertPrecision(to="bf16").rewrite(model, context())
    assert isinstance(refusal, Refusal)
    assert "opset 11" in refusal.reason


def half_graph(half: str) -> ir.Model:
    return parse_model(
        f"g ({half}[N,4] x) => ({half}[N,4] y) {{ [m] a = MatMul (x, w)  [e] b = Exp (a)  [n] y = Neg (b) }}",
        w=np.eye(4, dtype=np.float32) / 3,
    )


def half_weight_model(half: str) -> ir.Model:
    model = half_graph(half)
    dtype = ir.DataType[half.upper()]
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy().astype(dtype.numpy()), dtype=dtype, name="w")
    value.type = ir.TensorType(dtype)
    return model


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_to_fp32_computes_nothing_in_half(half: str) -> None:
    model = half_weight_model(half)
    assert TYPES_FLOAT32.check(model) is not None
    change = apply(ConvertPrecision(to="fp32"), model)
    assert change
    assert TYPES_FLOAT32.check(model) is None
    assert ops(model) == ["Cast", "MatMul", "Exp", "Neg", "Cast"]
    assert types(model)["x"] == types(model)["y"] == ir.DataType[half.upper()]
    assert types(model)["w"] == FLOAT


def test_to_fp32_with_io_leaves_no_half_precision_tensor() -> None:
    model = half_weight_model("float16")
    apply(ConvertPrecision(to="fp32", io=True), model)
    assert set(types(model).values()) == {FLOAT}
    assert TYPES_FLOAT32.check(model) is None
    assert ops(model) == ["MatMul", "Exp", "Neg"]


def test_to_fp32_converts_functions_and_control_flow() -> None:
    model = parse_model("""
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[N] x, bool c) => (float[N] y) {
            h = Cast <to: int = 10> (x)
            b = If (c) <
                then_branch = t () => (float16[N] s) { s = local.Add1 (h) },
                else_branch = e () => (float16[N] o) { o = Neg (h) }
            >
            y = Cast <to: int = 1> (b)
        }
        <domain: "local", opset_import: ["" : 21]>
        Add1 (a) => (c) { w = Constant <value_float: float = 1.0> () k = Cast <to: int = 10> (w)  c = Add (a, k) }
    """)
    assert TYPES_FLOAT32.check(model) is not None
    apply(ConvertPrecision(to="fp32"), model)
    assert TYPES_FLOAT32.check(model) is None
    feed = {"x": np.array([70000], np.float32), "c": np.array(True)}
    np.testing.assert_array_equal(run_model(model, feed)[0], [70001])


def test_to_fp32_does_not_change_an_fp32_model() -> None:
    change = apply(ConvertPrecision(to="fp32"), parse_model(MLP, **MLP_WEIGHTS))
    assert not change
    assert change.summary == "no tensor has the type bfloat16 or float16"


def test_only_to_fp32_ensures_the_property() -> None:
    assert ConvertPrecision(to="fp32").ensures == {TYPES_FLOAT32}
    assert not ConvertPrecision(to="fp32").invalidates
    assert ConvertPrecision(to="fp16").invalidates == {TYPES_FLOAT32}
    assert not ConvertPrecision(to="fp16").ensures


def test_a_bf16_model_becomes_fp16_and_its_inputs_and_outputs_stay_bf16() -> None:
    model = half_weight_model("bfloat16")
    change = apply(ConvertPrecision(to="fp16"), model)
    assert reason_of(change, "e") == "exponential"
    assert types(model)["w"] == FLOAT16
    assert types(model)["x"] == types(model)["y"] == BFLOAT16
    assert ops(model).count("Cast") <= 4


def test_a_model_in_the_target_type_is_unchanged() -> None:
    model = half_weight_model("float16")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not apply(ConvertPrecision(to="fp16"), model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_casts_that_became_redundant_are_removed() -> None:
    model = parse_model("""
        g (float[N] x) => (float[N] y) {
            a = Neg (x) h = Cast <to: int = 10> (a) b = Neg (h) f = Cast <to: int = 1> (b) y = Neg (f)
        }
    """)
    apply(ConvertPrecision(to="fp16"), model)
    assert ops(model) == ["Cast", "Neg", "Neg", "Neg", "Cast"]


def test_an_output_with_consumers_keeps_its_name() -> None:
    model = parse_model("g (float[N] x) => (float[N] y, float[N] z) { y = Neg (x) z = Relu (y) }")
    apply(ConvertPrecision(to="fp16"), model)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    np.testing.assert_array_equal(run_model(model, {"x": np.array([-2], np.float32)}), [[2], [2]])


def test_a_tensor_is_cast_once_for_several_consumers() -> None:
    reads = " ".join(f"[e{i}] e{i} = Exp (a)" for i in range(5))
    total = "y = Sum (e0, e1, e2, e3, e4)"
    model = parse_model(
        f"g (float[N,4] x) => (float[N,4] y) {{ a = MatMul (x, w) {reads} {total} }}", w=np.eye(4, dtype=np.float32)
    )
    apply(ConvertPrecision(to="fp16"), model)
    assert ops(model).count("Cast") == 2


def test_the_recorded_interface_has_the_types_of_converted_inputs_and_outputs() -> None:
    model = parse_model("g (float[B,4] x) => (float[B,4] y) { y = Relu (x) }")
    recorded = msgspec.structs.replace(interface_of(model), typical_sizes={"B": 3})
    write_interface(model, recorded)
    for to, dtype in (("fp16", "float16"), ("fp32", "float32")):
        assert ConvertPrecision(to=to, io=True).rewrite(model, context())  # type: ignore[arg-type]
        interface = interface_of(model)
        assert [spec.dtype for spec in (*interface.inputs, *interface.outputs)] == [dtype, dtype]
        assert interface.typical_sizes == {"B": 3}
