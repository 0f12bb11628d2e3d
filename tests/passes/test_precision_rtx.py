"""Models converted by the pass `precision` build on TensorRT-RTX as strongly typed networks with fused attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import backend_graphs

from ryzen_compile.backends.api import BuiltEngine
from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND
from ryzen_compile.ir.save import save
from ryzen_compile.pipeline import parser, pass_manager
from ryzen_compile.pipeline.range_measurement import measure_ranges
from ryzen_compile.progress import SilentProgress
from ryzen_compile.registry import properties
from ryzen_compile.spec.passes import PassContext

BLOCK = """
<ir_version: 10, opset_import: ["" : 21]>
block (float[B,S,64] x, int64[S] positions, bool[B,1,S,S] keep) => (float[B,S,64] y, float[B,S] score) {
    [count] p = Cast <to: int = 1> (positions)  c = Unsqueeze (p, last)  [angles] a = MatMul (c, inverse)
    cosine = Cos (a)  sine = Sin (a)
    squares = Pow (x, two)  mean = ReduceMean (squares, last)  safe = Add (mean, tiny)  root = Sqrt (safe)
    normal = Div (x, root)  h = Mul (normal, gain)
    q = MatMul (h, wq)  k = MatMul (h, wk)  v = MatMul (h, wv)
    qr = Mul (q, cosine)  qi = Mul (q, sine)  qq = Add (qr, qi)
    q4 = Reshape (qq, heads)  k4 = Reshape (k, heads)  v4 = Reshape (v, heads)
    qt = Transpose <perm = [0,2,1,3]> (q4)  kt = Transpose <perm = [0,2,3,1]> (k4)  vt = Transpose <perm = [0,2,1,3]> (v4)
    s = MatMul (qt, kt)  d = Mul (s, scale)  m = Where (keep, d, hidden)  w = Softmax (m)  o = MatMul (w, vt)
    ot = Transpose <perm = [0,2,1,3]> (o)  flat = Reshape (ot, rows)
    y = Add (flat, x)
    best = ReduceMax <keepdims = 0> (y, last)  score = Softmax (best)
}
"""


def block() -> ir.Model:
    draw = np.random.default_rng(0)
    square = {name: draw.standard_normal((64, 64)).astype(np.float32) / 8 for name in ("wq", "wk", "wv")}
    weights: dict[str, Any] = {
        **square,
        "inverse": np.linspace(0.01, 1, 64, dtype=np.float32)[None],
        "gain": np.ones(64, np.float32),
        "tiny": np.float32(1e-6),
        "two": np.float32(2),
        "scale": np.float32(32**-0.5),
        "hidden": np.float32(-3.4028234663852886e38),
        "last": np.array([-1]),
        "heads": np.array([0, 0, 2, 32]),
        "rows": np.array([0, 0, 64]),
    }
    proto = onnx.parser.parse_model(BLOCK)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    return ir.from_proto(proto)


def build(model: ir.Model, folder: Path, pipeline_text: str) -> tuple[set[str], BuiltEngine]:
    """Run `pipeline_text` on `model` and build it; return the rules that keep nodes in fp32, and the engine."""
    sample = {
        "x": np.random.default_rng(1).standard_normal((2, 8, 64)).astype(np.float32),
        "positions": np.arange(8),
        "keep": np.tril(np.ones((2, 1, 8, 8), bool)),
    }
    context = PassContext(backend="tensorrt-rtx", samples=[sample], measure_ranges=measure_ranges)
    records = pass_manager.run_passes(model, parser.parse(pipeline_text), context, properties())
    save(model, folder / "block.onnx")
    profile = backend_graphs.profile(
        x=((1, 1, 64), (2, 32, 64), (4, 64, 64)),
        positions=((1,), (32,), (64,)),
        keep=((1, 1, 1, 1), (2, 1, 32, 32), (4, 1, 64, 64)),
    )
    built = BACKEND.build(
        backend_graphs.build_request(str(folder / "block.onnx"), folder / "block.plan", profiles=(profile,)), SilentProgress()
    )
    return {note.split(": ")[1] for note in records[-1].notes}, built


@pytest.mark.parametrize("pipeline_text", ["precision", "attention,precision"])
@pytest.mark.parametrize(("to", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_a_block_with_fp32_regions_builds_with_its_attention_fused(
    tmp_path: Path, pipeline_text: str, to: str, dtype: str
) -> None:
    reasons, built = build(block(), tmp_path, f"{pipeline_text}{{to={to}}}")
    assert {"position", "angle", "sum", "statistic", "softmax", "fill"} <= reasons
    assert built.layers is not None
    assert [attention.fused for attention in built.layers.attentions] == [True]
    assert built.layers.by_type.get(dtype, 0) > 0


@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_an_attention_that_stays_fp32_builds(tmp_path: Path, to: str) -> None:
    reasons, built = build(block(), tmp_path, f"attention,precision{{to={to},keep=[TRT_Attention]}}")
    assert "attention" in reasons
    assert built.size_bytes > 0
