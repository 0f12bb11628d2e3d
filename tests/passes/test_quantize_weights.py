"""The pass `quantize-weights`: codes and scales, and graphs that compute with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from support.ort_session import run_as_written, run_model

import ryzen_compile as rc
from ryzen_compile.spec.fidelity import Lossy
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.quantize_weights import QuantizeWeights, codes
from ryzen_passes.quantize_weights.codes import FORMATS, SIGNED_INT4, Blocks, CodesTensor, quantize

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(0)
LARGEST = {"int8": 127, "int4": 7, "fp8": 448}
CODE_FORMATS = {**FORMATS, "signed int4": SIGNED_INT4}
BACKENDS = ("onnxruntime", "tensorrt-rtx")


def rounded(weight: Array, axis: int, block: int, format_name: str) -> Array:
    """Return what codes of `weight` stand for, one block at a time."""
    rows = np.moveaxis(weight.astype(np.float32), axis, -1)
    result = np.empty_like(rows)
    for index in np.ndindex(rows.shape[:-1]):
        for start in range(0, rows.shape[-1], block):
            values = rows[index][start : start + block]
            if format_name == "signed int4":
                scale = values[np.abs(values).argmax()] * np.float32(-1 / 8)
            else:
                scale = np.abs(values).max() * np.float32(1 / LARGEST[format_name])
            scale = np.float32(scale.astype(weight.dtype)) or np.float32(1)
            quotients = values / scale
            if format_name == "signed int4":
                kept = np.clip(np.rint(quotients), -8, 7)
            elif format_name == "fp8":
                kept = np.clip(quotients, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            else:
                kept = np.clip(np.rint(quotients), -LARGEST[format_name], LARGEST[format_name])
            result[index][start : start + block] = kept * scale
    return np.moveaxis(result, -1, axis)


def decoded(tensor: CodesTensor) -> Array:
    return np.asarray(tensor.numpy()).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("format_name", list(LARGEST))
@pytest.mark.parametrize(
    ("shape", "axis", "block"), [((64, 6), 0, 64), ((64, 6), 0, 16), ((6, 64), 1, 8), ((3, 32, 10), 1, 16)]
)
@pytest.mark.parametrize("slab", [24, 200, 1 << 20])
def test_codes_are_the_nearest_in_each_block(
    dtype: Any, format_name: str, shape: tuple[int, ...], axis: int, block: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "_SLAB_ELEMENTS", slab)
    weight = RNG.standard_normal(shape).astype(dtype)
    weight[0] = 0
    blocks = Blocks(
        leading=int(np.prod(shape[:axis])), length=shape[axis], trailing=int(np.prod(shape[axis + 1 :])), size=block
    )
    quantized = quantize(ir.tensor(weight), blocks, CODE_FORMATS[format_name])
    assert quantized is not None
    scales = np.repeat(quantized.scales, block, axis=1).reshape(shape)
    expected = rounded(weight, axis, block, format_name)
    np.testing.assert_array_equal(decoded(quantized.codes) * scales, expected)
    error = np.linalg.norm(weight.astype(np.float32) - expected) / np.linalg.norm(weight.astype(np.float32))
    assert quantized.relative_error == pytest.approx(error, rel=1e-5)


def test_bytes_of_4_bit_codes_are_those_of_onnx() -> None:
    values = RNG.integers(-8, 8, 64).astype(np.int8)
    packed = codes.pack_int4(values)
    proto = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=[64], raw_data=packed.tobytes())
    np.testing.assert_array_equal(numpy_helper.to_array(proto).astype(np.int8), values)


def parse(signature: str, nodes: str, opset: int = 17, **constants: Array) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {signature} {{ {nodes} }}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return ir.from_proto(proto)


W = RNG.standard_normal((64, 96)).astype(np.float32)
X = RNG.standard_normal((5, 64)).astype(np.float32)
X_96 = RNG.standard_normal((5, 96)).astype(np.float32)
IDS = RNG.integers(0, 64, (2, 3))
FILTERS = RNG.standard_normal((16, 32, 3, 3)).astype(np.float32)
IMAGE = RNG.standard_normal((2, 32, 7, 7)).astype(np.float32)
STACK = RNG.standard_normal((3, 64, 32)).astype(np.float32)
STACK_X = RNG.standard_normal((3, 5, 64)).astype(np.float32)

SITES: dict[str, tuple[str, str, dict[str, Array], Array, int]] = {
    "MatMul": ("(float[N,64] x) => (float[N,96] y)", "y = MatMul (x, w)", {"x": X}, W, 0),
    "MatMul on the left": ("(float[96,N] x) => (float[64,N] y)", "y = MatMul (w, x)", {"x": X_96.T.copy()}, W, 1),
    "Gemm": ("(float[N,64] x) => (float[N,96] y)", "y = Gemm (x, w)", {"x": X}, W, 0),
    "Gemm of a transposed weight": ("(float[N,96] x) => (float[N,64] y)", "y = Gemm <transB=1> (x, w)", {"x": X_96}, W, 1),
    "Transpose": (
        "(float[N,96] x) => (float[N,64] y)",
        "t = Transpose <perm=[1,0]> (w)  y = MatMul (x, t)",
        {"x": X_96},
        W,
        1,
    ),
    "Gather": ("(int64[N,3] ids) => (float[N,3,96] y)", "y = Gather (w, ids)", {"ids": IDS}, W, 1),
    "an embedding tied to a projection": (
        "(int64[N,3] ids) => (float[N,3,64] y)",
        "h = Gather (w, ids)  t = Transpose <perm=[1,0]> (w)  y = MatMul (h, t)",
        {"ids": IDS},
        W,
        1,
    ),
    "a stack of matrices": ("(float[3,N,64] x) => (float[3,N,32] y)", "y = MatMul (x, w)", {"x": STACK_X}, STACK, 1),
    "Conv": ("(float[N,32,7,7] x) => (float[N,16,5,5] y)", "y = Conv (x, w)", {"x": IMAGE}, FILTERS, 0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format_name", list(LARGEST))
@pytest.mark.parametrize("site", list(SITES))
def test_a_graph_computes_with_the_rounded_weight(site: str, format_name: str, backend: str) -> None:
    signature, nodes, inputs, weight, axis = SITES[site]
    model = parse(signature, nodes, w=weight)
    options = QuantizeWeights(format=format_name)  # type: ignore[arg-type]
    context = PassContext(backend=backend)
    estimate = options.estimate(model, context)
    before = weight_bytes(model)
    change = options.rewrite(model, context)
    if site == "Conv" and format_name == "int4":
        assert isinstance(change, Refusal)
        assert "convolutions" in change.reason
        return
    assert isinstance(change, Change)
    assert not isinstance(estimate, Refusal)
    assert not any(node.inputs[0] is None for node in model.graph)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert not unused_initializers(proto)
    constants = 256  # such as shapes
    assert -estimate.weight_bytes <= before - weight_bytes(model) + constants
    used_format = "int8" if format_name == "fp8" and ("Gather" in nodes) else format_name
    used_format = "signed int4" if format_name == "int4" and backend == "onnxruntime" else used_format
    rows = weight.reshape(len(weight), -1) if site == "Conv" else weight
    block = 32 if format_name == "int4" else rows.shape[1 if site == "Conv" else axis]
    kept = rounded(rows, 1 if site == "Conv" else axis, block, used_format).reshape(weight.shape)
    (expected,) = run_as_written(parse(signature, nodes, w=kept), inputs)
    for run in (run_as_written, run_model) if backend == "onnxruntime" else (run_as_written,):
        (output,) = run(model, inputs)
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(expected, run_as_written(parse(signature, nodes, w=weight), inputs)[0], rtol=1e-4, atol=1e-4)


def weight_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def unused_initializers(proto: onnx.ModelProto) -> set[str]:
    read = {name for node in proto.graph.node for name in node.input}
    return {tensor.name for tensor in proto.graph.initializer} - read


def test_half_precision_weights_keep_the_type_of_the_graph() -> None:
    model = parse("(float16[N,64] x) => (float16[N,96] y)", "y = MatMul (x, w)", w=W.astype(np.float16))
    assert isinstance(QuantizeWeights().rewrite(model, PassContext(backend="onnxruntime")), Change)
    (output,) = run_as_written(model, {"x": X.astype(np.float16)})
    assert output.dtype == np.float16
    expected = X.astype(np.float16) @ rounded(W.astype(np.float16), 0, 64, "int8").astype(np.float16)
    np.testing.assert_allclose(output, expected, rtol=2e-2, atol=5e-2)


def test_weights_that_are_left_are_noted_with_the_reason() -> None:
    infinite = W.copy()
    infinite[3, 4] = np.inf
    model = parse(
        "(float[N,64] x, float[64,96] given) => (float[N,96] y, float[64,96] shown)",
        "a = MatMul (x, w)  b = MatMul (x, infinite)  c = MatMul (x, kept)  s = Add (a, b)  y = Add (s, c)"
        "  shown = Add (given, added)",
        w=W,
        infinite=infinite,
        kept=W,
        added=W,
    )
    (kept_product,) = (node for node in model.graph if node.inputs[1] is not None and node.inputs[1].name == "kept")
    kept_product.name = "head/product"
    change = QuantizeWeights(skip=("head/*",)).rewrite(model, PassContext(backend="onnxruntime"))
    assert isinstance(change, Change)
    notes = dict(note.split(": ", 1) for note in change.notes)
    assert notes["infinite"] == "it has an element that is not finite"
    assert notes["kept"] == "`head/product` is in `skip`"
    assert notes["added"].startswith("it is read by")
    assert notes["w"].startswith("relative error 0.")
    assert {"infinite", "kept", "added"} <= set(model.graph.initializers)


def test_a_weight_in_a_subgraph_is_left() -> None:
    branches = [
        f"{name}_branch = {name} () => (float[N,96] y_{name}) {{ y_{name} = MatMul (x, w) }}" for name in ("then", "else")
    ]
    model = parse("(float[N,64] x, bool c) => (float[N,96] y)", f"y = If (c) <{', '.join(branches)}>", w=W)
    refusal = QuantizeWeights().rewrite(model, PassContext(backend="onnxruntime"))
    assert isinstance(refusal, Refusal)
    assert "subgraph" in refusal.reason


def test_a_graph_whose_weights_are_not_finite_is_refused_and_unchanged() -> None:
    model = parse("(float[N,64] x) => (float[N,96] y)", "y = MatMul (x, w)", w=np.full_like(W, np.nan))
    refusal = QuantizeWeights(format="int4").rewrite(model, PassContext(backend="tensorrt-rtx"))
    assert isinstance(refusal, Refusal)
    assert "not finite" in refusal.reason
    assert model.graph.opset_imports[""] == 17


@pytest.mark.parametrize(
    ("options", "message"),
    [({"block": -1}, "at least 1"), ({"floor": 2.0}, "cosine"), ({"floor": float("nan")}, "cosine")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeWeights(**options)


def test_a_block_that_does_not_divide_is_refused_and_the_model_unchanged() -> None:
    model = parse("(float[N,64] x) => (float[N,96] y)", "y = MatMul (x, w)", w=W)
    refusal = QuantizeWeights(format="int4", block=48).rewrite(model, PassContext(backend="onnxruntime"))
    assert isinstance(refusal, Refusal)
    assert "64 elements" in refusal.reason
    assert "blocks of 48" in refusal.reason
    assert [node.op_type for node in model.graph] == ["MatMul"]


def test_the_floor_depends_on_the_format_unless_given() -> None:
    floors = {name: QuantizeWeights(format=name).fidelity for name in LARGEST}  # type: ignore[arg-type]
    assert all(isinstance(fidelity, Lossy) and fidelity.metric == "cosine" for fidelity in floors.values())
    assert QuantizeWeights(floor=0.5).fidelity == Lossy("cosine", 0.5)
    assert floors["int8"] != floors["int4"]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("minilm") / "minilm.onnx"
    rc.export("recipe:minilm", path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_name", "smaller", "cosine"),
    [
        ("int8", 3.7, 0.998),
        pytest.param("fp8", 3.7, 0.99, marks=pytest.mark.exhaustive),
        pytest.param("int4", 6.0, 0.9, marks=pytest.mark.exhaustive),
    ],
)
def test_minilm_is_built_within_its_floor_at_a_fraction_of_the_size(
    format_name: str, smaller: float, cosine: float, minilm: Path, tmp_path: Path
) -> None:
    passes = f"fold,quantize-weights{{format={format_name},floor={cosine - 0.05:g}}}"
    package = rc.build(minilm, gpu="cpu", passes=passes, data="recipe:minilm", output=tmp_path / "m.ryzen", cache=False)
    (graph,) = package.manifest.graphs
    (variant,) = graph.variants
    lossy = [
        record for record in variant.accuracy if any(metric.required == f">= {cosine - 0.05:g}" for metric in record.metrics)
    ]
    assert lossy
    assert all(record.met and not record.faults for record in lossy)
    cosines = [metric.worst for record in lossy for metric in record.metrics if metric.name == "cosine"]
    assert min(cosines) < 0.99999  # the pass is not a no-op
    files = [path for path in (tmp_path / "m.ryzen").rglob("*") if path.parent.name in ("graphs", "weights")]
    assert sum(path.stat().st_size for path in files) * smaller < 90.9e6
