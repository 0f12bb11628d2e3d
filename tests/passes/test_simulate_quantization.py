"""The pass `simulate-quantization`: the float32 graph computes what ONNX Runtime computes with integers, and engines build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.ort_session import run_as_written

import ryzen_compile as rc
from ryzen_compile.backends.traits import find_traits
from ryzen_compile.ir.analysis.graph_contents import graph_contents
from ryzen_compile.ir.load import load
from ryzen_compile.pipeline.pass_manager import run_passes
from ryzen_compile.registry import properties
from ryzen_compile.spec.pass_record import PassRecord
from ryzen_compile.spec.passes import PassContext
from ryzen_passes.simulate_quantization import SimulateQuantization

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 8)).astype(np.float32)
IMAGE = RNG.standard_normal((2, 3, 7, 7)).astype(np.float32)
WEIGHT = RNG.integers(-120, 120, (8, 5)).astype(np.int8)
FILTERS = RNG.integers(0, 255, (4, 3, 3, 3)).astype(np.uint8)
SCALE, SCALES = np.float32(0.02), np.linspace(0.01, 0.03, 5).astype(np.float32)
U8, I8 = np.uint8, np.int8
QDQ = "q = QuantizeLinear (x, s, z)  f = DequantizeLinear (q, s, z)  y = MatMul (f, w)"


def parse(signature: str, nodes: str, **constants: Any) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g {signature} {{ {nodes} }}')
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items())
    return ir.from_proto(proto)


def simulate(model: ir.Model) -> PassRecord:
    (record,) = run_passes(model, [SimulateQuantization()], PassContext(backend="tensorrt-rtx"), properties())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return record


FLOAT_TO_FLOAT = "(float[6,8] x) => (float[M,N] y)"
CASES: dict[str, tuple[ir.Model, dict[str, Array]]] = {
    "uint8 with a zero point": (
        parse(FLOAT_TO_FLOAT, QDQ, s=SCALE, z=U8(120), w=WEIGHT.astype(np.float32)),
        {"x": X},
    ),
    "uint8 without a zero point, which TensorRT reads as int8": (
        parse(FLOAT_TO_FLOAT, QDQ, s=np.float32(0.01), z=U8(0), w=WEIGHT.astype(np.float32)),
        {"x": np.abs(X)},
    ),
    "int8 with a zero point": (parse(FLOAT_TO_FLOAT, QDQ, s=SCALE, z=I8(7), w=WEIGHT.astype(np.float32)), {"x": X}),
    "weights with a scale and a zero point per channel": (
        parse(
            FLOAT_TO_FLOAT,
            "f = DequantizeLinear <axis = 1> (w, s, z)  y = MatMul (x, f)",
            w=WEIGHT,
            s=SCALES,
            z=np.arange(5, dtype=I8),
        ),
        {"x": X},
    ),
    "a scale per row of an activation": (
        parse(
            "(float[6,8] x) => (float[6,8] y)",
            "q = QuantizeLinear <axis = 0> (x, s, z)  y = DequantizeLinear <axis = 0> (q, s, z)",
            s=np.linspace(0.01, 0.03, 6).astype(np.float32),
            z=np.arange(6, dtype=U8),
        ),
        {"x": X},
    ),
    "an int32 bias": (
        parse(
            FLOAT_TO_FLOAT,
            "b = DequantizeLinear (bias, s)  m = MatMul (x, w)  y = Add (m, b)",
            bias=np.arange(5, dtype=np.int32),
            s=SCALE,
            w=WEIGHT.astype(np.float32),
        ),
        {"x": X},
    ),
    "a constant that a node holds": (
        parse(
            "(float[6,8] x) => (float[6,8] y)",
            "z = Constant <value = uint8[1] {7}> ()  w = Constant <value = uint8[1] {9}> ()  f = DequantizeLinear (w, s, z)  "
            "y = Mul (x, f)",
            s=np.array([0.02], np.float32),
        ),
        {"x": X},
    ),
    "a quantized embedding": (
        parse(
            "(int64[B,S] i) => (float[B,S,N] y)",
            "g = Gather (w, i)  r = Identity (g)  y = DequantizeLinear (r, s, z)",
            w=WEIGHT,
            s=SCALE,
            z=I8(0),
        ),
        {"i": np.array([[0, 7, 3], [1, 1, 2]])},
    ),
    "dynamic quantization": (
        parse(
            FLOAT_TO_FLOAT,
            "q, s, z = DynamicQuantizeLinear (x)  m = MatMulInteger (q, w, z, wz)  c = Cast <to = 1> (m)  y = Mul (c, s)",
            w=WEIGHT,
            wz=I8(3),
        ),
        {"x": X},
    ),
    "dynamic quantization of zeros": (
        parse(
            FLOAT_TO_FLOAT,
            "q, s, z = DynamicQuantizeLinear (x)  m = MatMulInteger (q, w, z)  c = Cast <to = 1> (m)  y = Mul (c, s)",
            w=WEIGHT,
        ),
        {"x": np.zeros_like(X)},
    ),
    "a zero point per column, and a bias of integers": (
        parse(
            "(uint8[6,8] x) => (int32[M,N] y)",
            "m = MatMulInteger (x, w, az, bz)  y = Add (m, bias)",
            w=WEIGHT.astype(U8),
            az=U8(6),
            bz=np.arange(5, dtype=U8),
            bias=np.arange(5, dtype=np.int32),
        ),
        {"x": RNG.integers(0, 255, (6, 8)).astype(U8)},
    ),
    "an integer convolution with padding": (
        parse(
            "(float[B,3,7,7] x) => (float[B,C,H,W] y)",
            "q, s, z = DynamicQuantizeLinear (x)  c = ConvInteger <pads = [1,1,1,1]> (q, w, z, wz)  f = Cast <to = 1> (c)  "
            "y = Mul (f, s)",
            w=FILTERS,
            wz=U8(130),
        ),
        {"x": IMAGE},
    ),
    "QLinearMatMul": (
        parse(
            FLOAT_TO_FLOAT,
            "q = QuantizeLinear (x, s, z)  m = QLinearMatMul (q, s, z, w, ws, wz, ys, yz)  y = DequantizeLinear (m, ys, yz)",
            s=SCALE,
            z=U8(128),
            w=WEIGHT.astype(U8),
            ws=np.float32(0.01),
            wz=U8(100),
            ys=np.float32(0.1),
            yz=U8(90),
        ),
        {"x": X},
    ),
    "QLinearConv with a scale per channel and a bias": (
        parse(
            "(float[B,3,7,7] x) => (float[B,C,H,W] y)",
            "q = QuantizeLinear (x, s, z)  "
            "c = QLinearConv <pads = [1,1,1,1], strides = [2,2]> (q, s, z, w, ws, wz, ys, yz, b)  "
            "p = MaxPool <kernel_shape = [2,2]> (c)  y = DequantizeLinear (p, ys, yz)",
            s=SCALE,
            z=U8(128),
            w=FILTERS,
            ws=np.array([0.01, 0.02, 0.01, 0.03], np.float32),
            wz=np.full(4, 128, U8),
            ys=np.float32(0.2),
            yz=U8(127),
            b=np.array([100, -50, 0, 7], np.int32),
        ),
        {"x": IMAGE},
    ),
    "QLinearConv with a computed bias": (
        parse(
            "(float[B,3,7,7] x, float[4] f) => (float[B,C,H,W] y)",
            "q = QuantizeLinear (x, s, z)  b = Cast <to = 6> (f)  "
            "c = QLinearConv <pads = [1,1,1,1], strides = [2,2]> (q, s, z, w, s, wz, ys, z, b)  "
            "y = DequantizeLinear (c, ys, z)",
            s=SCALE,
            z=U8(128),
            w=FILTERS,
            wz=U8(128),
            ys=np.float32(0.2),
        ),
        {"x": IMAGE, "f": np.array([9000, -7000, 0, 400], np.float32)},
    ),
    "a quantized output that other nodes read": (
        parse(
            "(float[B,3,7,7] x) => (uint8[B,3,7,7] q, uint8[B,3,H,W] p, float[B,3,H,W] y)",
            "q = QuantizeLinear (x, s, z)  p = MaxPool <kernel_shape = [2,2]> (q)  y = DequantizeLinear (p, s, z)",
            s=SCALE,
            z=U8(128),
        ),
        {"x": IMAGE},
    ),
    "a quantized output": (
        parse("(float[6,8] x) => (uint8[6,8] y)", "y = QuantizeLinear (x, s, z)", s=SCALE, z=U8(9)),
        {"x": X},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_float_graph_computes_what_the_integers_compute(case: str) -> None:
    source, inputs = CASES[case]
    model = source.clone()
    record = simulate(model)
    assert record.outcome == "changed"
    remaining = {node.op_type for node in model.graph}
    assert not {name for name in remaining if "Quantize" in name or "Integer" in name or "QLinear" in name}
    for expected, actual in zip(run_as_written(source, inputs), run_as_written(model, inputs), strict=True):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_int8_without_zero_points_stays_quantized() -> None:
    model = parse(
        FLOAT_TO_FLOAT,
        f"g = DequantizeLinear <axis = 1> (w8, ws)  {QDQ.replace('w)', 'g)')}",
        s=SCALE,
        z=I8(0),
        w8=WEIGHT,
        ws=SCALES,
    )
    record = simulate(model)
    assert record.outcome == "nothing-to-do"
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "QuantizeLinear", "DequantizeLinear", "MatMul"]


def test_a_region_that_cannot_be_rewritten_is_left_and_named() -> None:
    model = parse("(float[6,8] x) => (uint8[6,8] y)", "[wrap] c = Cast <to = 2> (x)  [sum] y = Add (c, c)")
    assert simulate(model).notes == ()
    dequantized = parse(
        "(float[6,8] x) => (float[6,8] y)", "[wrap] c = Cast <to = 2> (x)  y = DequantizeLinear (c, s, z)", s=SCALE, z=U8(1)
    )
    record = simulate(dequantized)
    assert record.outcome == "nothing-to-do"
    assert record.notes == ("wrap: `wrap` [Cast] converts to uint8 without a scale",)


def test_backends_without_zero_points_need_the_pass_for_quantized_graphs() -> None:
    contents = graph_contents(CASES["dynamic quantization"][0])
    needing = {
        name
        for name in ("onnxruntime", "tensorrt", "tensorrt-rtx")
        if SimulateQuantization.for_backend(find_traits(name), contents) is not None
    }
    assert needing == {"tensorrt", "tensorrt-rtx"}
    assert (
        SimulateQuantization.for_backend(find_traits("tensorrt-rtx"), graph_contents(parse(FLOAT_TO_FLOAT, "y = Relu (x)")))
        is None
    )


def save_float_model(path: Path, rng: np.random.Generator) -> Path:
    """Write an embedding and two linear layers, ids: (b, s), y: (b, s, 16)."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embed"),
        helper.make_node("MatMul", ["e", "w"], ["m"], name="first"),
        helper.make_node("Relu", ["m"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="second"),
    ]
    weights = {
        "table": rng.standard_normal((40, 32)) + 0.4,
        "w": rng.standard_normal((32, 16)),
        "v": rng.standard_normal((16, 16)),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", 16])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(("mode", "seed"), [("dynamic", 0), ("static", 0), ("static", 4)])
def test_a_model_that_onnxruntime_quantized_builds_for_a_gpu_and_equals_the_integers(
    mode: str, seed: int, tmp_path: Path
) -> None:
    """With seed 4, sums of the static form exceed 16 bits."""
    from onnxruntime import quantization

    rng = np.random.default_rng(seed)

    class RandomIdsReader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.remaining = [{"ids": rng.integers(0, 40, (2, 5))} for _ in range(3)]

        def get_next(self) -> dict[str, Array] | None:
            return self.remaining.pop() if self.remaining else None

    source, quantized = str(save_float_model(tmp_path / "float.onnx", rng)), str(tmp_path / "quantized.onnx")
    if mode == "dynamic":
        quantization.quantize_dynamic(source, quantized, weight_type=quantization.QuantType.QUInt8)
    else:
        quantization.quantize_static(source, quantized, RandomIdsReader(), activation_type=quantization.QuantType.QUInt8)
    package = rc.build(quantized, gpu="cpu,sm89", cache=False)
    assert [engine.targets[0].name for engine in package.manifest.engines] == ["sm89"]
    variant = package.manifest.variant_of(package.manifest.engines[0])
    assert {metric.name: metric.worst for metric in variant.accuracy[0].metrics}["max_abs"] < 1e-5
    assert any("build the model before it was quantized" in warning for record in variant.passes for warning in record.warnings)
    model = load(package.path / variant.path)
    assert {value.dtype for value in model.graph.initializers.values()} <= {
        ir.DataType.FLOAT,
        ir.DataType.INT64,
        ir.DataType.INT8,
    }


def test_integers_that_are_not_quantized_are_left_in_one_pass_over_the_graph() -> None:
    doublings = "  ".join(f"i{step + 1} = Add (i{step}, i{step})" for step in range(60))
    model = parse(
        "(float[6,8] x, int32[1] n) => (float[6,8] y, int32[1] m)",
        f"i0 = Identity (n)  {doublings}  m = Identity (i60)  q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, s, z)",
        s=SCALE,
        z=U8(3),
    )
    assert simulate(model).outcome == "changed"
    assert [node.op_type for node in model.graph].count("Add") == 61
