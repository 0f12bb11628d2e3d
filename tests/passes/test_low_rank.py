"""The pass `low-rank`: two products with fewer weights in place of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from ryzen_passes.low_rank import LowRank

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 64)).astype(np.float32)
RANK_8 = (RNG.standard_normal((64, 8)) @ RNG.standard_normal((8, 96))).astype(np.float32)
DENSE = RNG.standard_normal((64, 96)).astype(np.float32)
BIAS = RNG.standard_normal(96).astype(np.float32)

READERS = {
    "MatMul": ("y = MatMul (x, w)", False),
    "Gemm": ("y = Gemm (x, w, b)", False),
    "Gemm of a transposed weight": ("y = Gemm <transB=1, alpha=0.5> (x, w, b)", True),
    "two readers": ("t = MatMul (x, w)  u = Abs (x)  v = MatMul (u, w)  y = Add (t, v)", False),
}


def parse(nodes: str, **constants: Array) -> ir.Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 17]> g (float[N,64] x) => (float[N,96] y) {{ {nodes} }}'
    )
    read = " ".join(nodes.replace("(", " ").replace(")", " ").replace(",", " ").split()).split()
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items() if name in read)
    return ir.from_proto(proto)


def context(samples: Sequence[Mapping[str, Array]] = ({"x": X},)) -> PassContext:
    return PassContext(backend="onnxruntime", samples=samples, measure_second_moments=second_moments)


def output(model: ir.Model, x: Array = X) -> Array:
    return run_as_written(model, {"x": x})[0]


@pytest.mark.parametrize("options", [{"rank": 8}, {"energy": 0.999999}], ids=str)
@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("reader", list(READERS))
def test_a_matrix_of_low_rank_is_replaced_by_its_factors(reader: str, whiten: bool, options: dict[str, Any]) -> None:
    nodes, transposed = READERS[reader]
    weight = RANK_8.T.copy() if transposed else RANK_8
    model, original = (parse(nodes, w=weight, b=BIAS) for _ in range(2))
    estimate = LowRank(whiten=whiten, **options).estimate(model, context())
    change = LowRank(whiten=whiten, **options).rewrite(model, context())
    assert isinstance(change, Change)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_allclose(output(model), output(original), rtol=1e-3, atol=1e-3)
    shapes = {tuple(value.shape.numpy()) for value in model.graph.initializers.values() if value.shape is not None}
    assert {(64, 8), (8, 96)} <= shapes
    assert weight.shape not in shapes
    assert not isinstance(estimate, Refusal)
    assert estimate.weight_bytes == (-4 * (64 * 96 - 8 * (64 + 96)) if "rank" in options else 0)


def test_whitening_minimizes_the_error_of_products_on_the_samples() -> None:
    basis = RNG.standard_normal((64, 64)) * np.geomspace(1, 1e-3, 64)
    x = (RNG.standard_normal((500, 64)) @ basis).astype(np.float32)
    errors = []
    for whiten in (True, False):
        model = parse("y = MatMul (x, w)", w=DENSE)
        assert isinstance(LowRank(rank=24, whiten=whiten).rewrite(model, context([{"x": x}])), Change)
        errors.append(np.linalg.norm(output(model, x) - x @ DENSE))
    singular = np.linalg.svd(x.astype(np.float64) @ DENSE, compute_uv=False)
    best = np.sqrt((singular[24:] ** 2).sum())
    assert errors[0] == pytest.approx(best, rel=0.01)
    assert errors[1] > 2 * best


def test_a_higher_energy_keeps_more_ranks() -> None:
    ranks = []
    for energy in (0.3, 0.5):
        model = parse("y = MatMul (x, w)", w=DENSE)
        assert isinstance(LowRank(energy=energy, whiten=False).rewrite(model, context()), Change)
        ranks.append(min(value.shape[1] for value in model.graph.initializers.values() if value.shape is not None))
    singular = np.cumsum(np.linalg.svd(DENSE.astype(np.float64), compute_uv=False) ** 2)
    needed = [int(np.searchsorted(singular, energy * singular[-1]) + 1) for energy in (0.3, 0.5)]
    assert ranks == [-(-rank // 8) * 8 for rank in needed]
    assert ranks[0] < ranks[1]


@pytest.mark.parametrize(
    ("options", "samples", "reason"),
    [
        ({}, [{"x": X}], "neither"),
        ({"rank": 60, "whiten": False}, [{"x": X}], "no matrix becomes smaller: w: factors of rank 60"),
        ({"rank": 8}, [], "there are no samples"),
        ({"rank": 8, "skip": ("MatMul",)}, [{"x": X}], "it has none"),
    ],
)
def test_what_cannot_be_factorized_is_refused(options: dict[str, Any], samples: list[Any], reason: str) -> None:
    model = parse("y = MatMul (x, w)", w=DENSE)
    refusal = LowRank(**options).rewrite(model, context(samples))
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason
    assert list(model.graph.initializers) == ["w"]


@pytest.mark.parametrize("options", [{"rank": -1}, {"energy": 1.5}, {"energy": float("nan")}, {"floor": 2.0}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LowRank(**options)


def test_the_floor_is_declared() -> None:
    assert LowRank(rank=8, floor=0.8).fidelity == Lossy("cosine", 0.8)
