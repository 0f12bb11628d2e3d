"""The pass `prune`: zeros in place of the least important weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from support.ort_session import run_as_written

from ryzen_compile.pipeline.activation_statistics import second_moments
from ryzen_compile.spec.fidelity import Lossy
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.prune import Prune

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(0)
NORMS = np.geomspace(0.01, 10, 64).astype(np.float32)
X = (RNG.standard_normal((40, 64)) * RNG.permutation(NORMS)).astype(np.float32)
W = RNG.standard_normal((64, 96)).astype(np.float32)
READERS = {
    "MatMul": ("y = MatMul (x, w)", False),
    "Gemm of a transposed weight": ("y = Gemm <transB=1> (x, w)", True),
    "Transpose": ("t = Transpose <perm=[1,0]> (w)  y = MatMul (x, t)", True),
}


def parse(nodes: str, weight: Array) -> ir.Model:
    signature = "g (float[N,64] x) => (float[N,96] y)"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 17]> {signature} {{ {nodes} }}')
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return ir.from_proto(proto)


def context(samples: Any = ({"x": X},)) -> PassContext:
    return PassContext(backend="onnxruntime", samples=samples, measure_second_moments=second_moments)


def expected(pattern: str, share: float, score: str) -> Array:
    """Return the pruned weight, (64, 96), one output at a time."""
    pruned = W.copy()
    importance = np.abs(W) * (np.linalg.norm(X, axis=0)[:, None] if score == "wanda" else 1)
    for output in range(96):
        groups = [range(start, start + 4) for start in range(0, 64, 4)] if pattern == "2:4" else [range(64)]
        for group in groups:
            removed = sorted(group, key=lambda index: importance[index, output])[: int(share * len(group))]
            pruned[removed, output] = 0
    return pruned


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("unstructured", 0.5), ("unstructured", 0.25)])
@pytest.mark.parametrize("reader", list(READERS))
def test_the_least_important_weights_of_each_output_become_zero(reader: str, pattern: str, share: float, score: str) -> None:
    nodes, transposed = READERS[reader]
    model = parse(nodes, W.T.copy() if transposed else W)
    options = Prune(pattern=pattern, share=share, score=score, without_recovery=True)  # type: ignore[arg-type]
    change = options.rewrite(model, context())
    assert isinstance(change, Change)
    assert "without training" in change.warnings[0]
    (output,) = run_as_written(model, {"x": X})
    np.testing.assert_allclose(output, X @ expected(pattern, share, score), rtol=1e-4, atol=1e-3)
    weight = ir.to_proto(model).graph.initializer[0]
    assert (numpy_helper.to_array(weight) == 0).mean() == pytest.approx(share, abs=0.01)


def test_pruning_is_refused_unless_it_is_confirmed() -> None:
    model = parse("y = MatMul (x, w)", W)
    for refusal in (Prune().rewrite(model, context()), Prune().estimate(model, context())):
        assert isinstance(refusal, Refusal)
        assert "training" in refusal.reason
        assert refusal.hint is not None
        assert "without-recovery=true" in refusal.hint
    np.testing.assert_array_equal(
        run_as_written(model, {"x": X})[0], run_as_written(parse("y = MatMul (x, w)", W), {"x": X})[0]
    )


@pytest.mark.parametrize(
    ("options", "samples", "weight", "reason"),
    [
        ({}, (), W, "there are no samples"),
        ({"skip": ("MatMul",)}, ({"x": X},), W, "in `skip`"),
    ],
)
def test_what_cannot_be_pruned_is_refused(options: dict[str, Any], samples: Any, weight: Array, reason: str) -> None:
    refusal = Prune(without_recovery=True, **options).rewrite(parse("y = MatMul (x, w)", weight), context(samples))
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 0.3}, {"share": float("nan")}, {"floor": 2.0}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|2:4"):
        Prune(**options)


def test_the_floor_is_declared() -> None:
    assert Prune(floor=0.8).fidelity == Lossy("cosine", 0.8)
