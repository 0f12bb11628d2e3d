"""Emulation of half precision, checked against NumPy, the ONNX reference evaluator and PyTorch."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support.ort_session import run_model

from ryzen_compile.numerics.half_emulation import emulate_half_precision

Array = np.ndarray[Any, np.dtype[Any]]


def parse(text: str, **weights: Array) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(proto)


def half_graph(body: str, half: str = "float16", inputs: str = "x", **weights: Array) -> ir.Model:
    """Return a graph with the nodes `body`, which compute `y`, over matrices of type `half`."""
    declarations = ", ".join(f"{half}[A, B] {name}" for name in inputs.split())
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({declarations}) => ({half}[C, D] y) {{ {body} }}'
    return parse(text, **weights)


def run(model: ir.Model, **inputs: Array) -> Array:
    return run_model(model, inputs)[0]


def run_emulated(model: ir.Model, **inputs: Array) -> Array:
    return run(emulate_half_precision(model), **{name: array.astype(np.float32) for name, array in inputs.items()})


def ulps(left: Array, right: Array) -> int:
    """Return the largest difference of two arrays in units in the last place of fp16."""
    ordered = [
        np.where(bits < 0, -32768 - bits, bits).astype(np.int64)
        for bits in (array.astype(np.float16).view(np.int16).astype(np.int32) for array in (left, right))
    ]
    return int(np.abs(ordered[0] - ordered[1]).max())


def draw(shape: tuple[int, ...] = (8, 16), scale: float = 4.0, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float16)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
def test_arithmetic_matches_fp16_bit_for_bit(op: str) -> None:
    model = half_graph(f"y = {op} (a, b)", inputs="a b")
    a, b = draw(scale=1000.0), draw(scale=50.0, seed=1)
    with np.errstate(over="ignore", divide="ignore"):
        expected = {"Add": a + b, "Sub": a - b, "Mul": a * b, "Div": a / b}[op]
    assert np.isinf(expected).any() == (op == "Mul")
    np.testing.assert_array_equal(run_emulated(model, a=a, b=b), expected.astype(np.float32))


def test_the_square_root_matches_fp16_bit_for_bit() -> None:
    values = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).reshape(1, -1)
    output = run_emulated(half_graph("y = Sqrt (x)"), x=values)
    np.testing.assert_array_equal(output, np.sqrt(values).astype(np.float32))


@pytest.mark.parametrize(
    "body",
    [
        "y = Tanh (x)",
        "y = Sigmoid (x)",
        "y = Exp (x)",
        "t = Transpose (x)\ny = MatMul (x, t)",
        "m = ReduceMean <keepdims: int = 1> (x)\ny = Sub (x, m)",
        "e = Exp (x)\nl = Log (e)\ny = Mul (l, x)",
    ],
)
def test_a_graph_is_within_one_ulp_of_the_reference_evaluator_in_fp16(body: str) -> None:
    model = half_graph(body)
    x = draw(scale=1.0)
    expected = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]
    assert expected.dtype == np.float16
    assert ulps(run_emulated(model, x=x), expected) <= 1


@pytest.mark.parametrize("body", ["y = Softmax (x)", "y = Gelu (x)", "y = Elu (x)", "y = LogSoftmax (x)"])
def test_a_composite_op_is_within_one_ulp_of_its_exact_result(body: str) -> None:
    # The reference evaluator rounds every step inside these ops; TensorRT computes them in fp32.
    x = draw(scale=1.0)
    exact = parse(f'<ir_version: 10, opset_import: ["" : 21]> g (double[A, B] x) => (double[A, B] y) {{ {body} }}')
    expected = ReferenceEvaluator(ir.to_proto(exact)).run(None, {"x": x.astype(np.float64)})[0]
    assert ulps(run_emulated(half_graph(body), x=x), expected) <= 1


def test_overflow_is_infinite_where_onnx_runtime_hides_it() -> None:
    model = half_graph("h = Mul (x, x)\ny = Div (h, k)", k=np.array([1000], np.float16))
    x = np.full((1, 1), 300, np.float16)
    assert np.isinf(run_emulated(model, x=x)).all()
    assert run(model, x=x) == 90


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_no_optimization_of_onnx_runtime_removes_the_rounding(level: str) -> None:
    model = emulate_half_precision(half_graph("h = Mul (x, x)\ny = Div (h, k)", k=np.array([1000], np.float16)))
    assert np.isinf(run_model(model, {"x": np.full((1, 1), 300, np.float32)}, optimizations=level)[0]).all()


def test_bf16_rounds_to_the_nearest_even_bf16() -> None:
    model = half_graph("y = Mul (a, b)", "bfloat16", inputs="a b")
    a, b = draw(scale=1e3).astype(ml_dtypes.bfloat16), draw(seed=1).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(run_emulated(model, a=a, b=b), (a * b).astype(np.float32))


def test_bf16_runs_ops_that_onnx_runtime_lacks_in_bf16() -> None:
    model = half_graph("t = Transpose (x)\ny = MatMul (x, t)", "bfloat16")
    with pytest.raises(Exception, match="bfloat16|NOT_IMPLEMENTED|NotImplemented"):
        run(model, x=draw())
    assert run_emulated(model, x=draw().astype(ml_dtypes.bfloat16)).shape == (8, 8)


def test_the_error_of_a_small_network_is_that_of_torch_in_fp16() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.LayerNorm(128), torch.nn.Linear(128, 32))
    x = torch.randn(16, 64).half()
    with torch.no_grad():
        exact = net(x.float()).numpy()
        half_output = net.half()(x).float().numpy()
    layers = {name: tensor.detach().numpy() for name, tensor in net.state_dict().items()}
    model = half_graph(
        "m = MatMul (x, w0)\na = Add (m, b0)\ng = Gelu (a)\nn = LayerNormalization (g, s, t)\n"
        "k = MatMul (n, w1)\ny = Add (k, b1)",
        w0=layers["0.weight"].T.copy(),
        b0=layers["0.bias"],
        s=layers["2.weight"],
        t=layers["2.bias"],
        w1=layers["3.weight"].T.copy(),
        b1=layers["3.bias"],
    )
    output = run_emulated(model, x=x.numpy())
    error, torch_error = np.abs(output - exact).mean(), np.abs(half_output - exact).mean()
    assert 0 < error < 1.5 * torch_error
    assert 0 < torch_error < 1.5 * error


def test_a_function_counts_as_one_op_and_is_rounded_at_its_output() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float16[N] x) => (float16[N] y) { y = local.SquareRoot (x) }
        <domain: "local", opset_import: ["" : 21]> SquareRoot (a) => (c) { b = Mul (a, a)  c = Sqrt (b) }
    """)
    x = np.array([300, 2.5], np.float16)
    np.testing.assert_array_equal(run_emulated(model, x=x), [300, 2.5])


def test_a_cast_to_half_inside_a_function_rounds() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[N] x) => (float[N] y) { y = local.Through (x) }
        <domain: "local", opset_import: ["" : 21]>
        Through (a) => (c) { b = Cast <to: int = 10> (a)  c = Cast <to: int = 1> (b) }
    """)
    np.testing.assert_array_equal(run_emulated(model, x=np.array([70000, 1.0001], np.float32)), [np.inf, 1])


def test_tensors_inside_control_flow_are_rounded() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float16[N] x, bool c) => (float16[N] y) {
            y = If (c) <
                then_branch = t () => (float16[N] a) { h = Mul (x, x)  a = Div (h, x) },
                else_branch = e () => (float16[N] b) { b = Identity (x) }
            >
        }
    """)
    x = np.array([300, 2], np.float32)
    np.testing.assert_array_equal(run(emulate_half_precision(model), x=x, c=np.array(True)), [np.inf, 2])
    np.testing.assert_array_equal(run(emulate_half_precision(model), x=x, c=np.array(False)), [300, 2])


def test_an_input_is_rounded_and_names_are_kept() -> None:
    model = emulate_half_precision(half_graph("y = Identity (x)"))
    assert [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)] == [
        ("x", ir.DataType.FLOAT),
        ("y", ir.DataType.FLOAT),
    ]
    np.testing.assert_array_equal(run(model, x=np.array([[1.0001]], np.float32)), [[1]])


def test_ops_that_only_move_values_are_not_rounded() -> None:
    model = emulate_half_precision(half_graph("t = Transpose (x)\nr = Relu (t)\ny = Neg (r)"))
    assert [node.op_type for node in model.graph] == ["Cast", "Cast", "Transpose", "Relu", "Neg"]


def test_fp32_tensors_of_a_mixed_graph_are_not_rounded() -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y) {
            a = Mul (x, x)  h = Cast <to: int = 10> (a)  w = Cast <to: int = 1> (h)  y = Add (w, a)
        }
    """)
    np.testing.assert_array_equal(
        run_emulated(model, x=np.array([1.0001], np.float32)), np.float32([1]) + np.float32(1.0001) ** 2
    )


def test_the_model_is_not_modified() -> None:
    model = half_graph("h = Mul (x, x)\ny = Div (h, k)", k=np.array([1000], np.float16))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    emulate_half_precision(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
