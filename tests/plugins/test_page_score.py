"""PageScoreBound and PageScoreCosine against loops in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.op_implementations import Arrays, Attributes, OpImplementations

from ryzen_compile.errors import ShapeError
from ryzen_compile.kernels import Specialization
from ryzen_compile.registry import find_op
from ryzen_compile.spec.op import Op

BOUND, COSINE = find_op("PageScoreBound"), find_op("PageScoreCosine")
OPS = (BOUND, COSINE)
BOTH = pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))


def oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    b, h, group, _ = x["query"].shape
    pages = (x["low"] if "low" in x else x["centroid"]).shape[2]
    score = np.full((b, h, pages), -np.inf)
    for at in np.ndindex(b, h, pages):
        if at[2] >= x["filled"][at[0]]:
            continue
        for g in range(group):
            q = x["query"][at[0], at[1], g]
            one = bound(q, x["low"][at], x["high"][at]) if "low" in x else cosine(q, x["centroid"][at])
            if not math.isnan(one):
                score[at] = max(score[at], one)
    return {"score": score}


def bound(q: np.ndarray[Any, Any], low: np.ndarray[Any, Any], high: np.ndarray[Any, Any]) -> float:
    total = 0.0
    for one, least, most in zip(q.tolist(), low.tolist(), high.tolist(), strict=True):
        total += most * max(one, 0.0) + least * min(one, 0.0) if one == one else math.nan
    return total


def cosine(q: np.ndarray[Any, Any], c: np.ndarray[Any, Any]) -> float:
    if not (np.isfinite(q).all() and np.isfinite(c).all() and q.any() and c.any()):
        return 0.0
    q, c = q / np.abs(q).max(), c / np.abs(c).max()
    return math.fsum(q * c) / math.sqrt(math.fsum(q * q) * math.fsum(c * c))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, int]:
    return {name: draw(st.integers(1, high)) for name, high in {"B": 3, "H": 3, "G": 5, "P": 9, "D": 19}.items()}


@pytest.mark.parametrize("element", BOUND.type_constraints["T"])
@BOTH
def test_every_life_scores_as_the_oracle_does(lives: OpImplementations, op: Op, element: str) -> None:
    @settings(max_examples=25 if element == "float32" else 8)
    @given(dims=cases(), seed=st.integers(0, 2**32 - 1))
    def check(dims: dict[str, int], seed: int) -> None:
        assert lives.check(op, oracle, dims=dims, attributes={}, type_bindings={"T": element}, seed=seed) is None

    check()


@BOTH
def test_pages_of_many_blocks(lives: OpImplementations, op: Op) -> None:
    for dims in ({"B": 2, "H": 2, "G": 3, "P": 45, "D": 64}, {"B": 1, "H": 1, "G": 9, "P": 5, "D": 700}):
        assert lives.check(op, oracle, dims=dims, attributes={}, type_bindings={"T": "float32"}) is None


def test_a_bound_bounds_every_key_of_its_page(lives: OpImplementations) -> None:
    random = np.random.default_rng(3)
    keys = random.normal(size=(1, 2, 6, 16, 12)).astype(np.float32)
    query = random.normal(size=(1, 2, 3, 12)).astype(np.float32)
    inputs = {"query": query, "low": keys.min(axis=3), "high": keys.max(axis=3), "filled": np.array([6], np.int32)}
    best = np.einsum("bhgd,bhpkd->bhgpk", query, keys, dtype=np.float64).max(axis=(2, 4))

    def judge(given: Arrays, found: Arrays) -> str | None:
        return None if (found["score"] >= best - 1e-5).all() else "a key is worth more than its page"

    dims = {"B": 1, "H": 2, "G": 3, "P": 6, "D": 12}
    said = lives.check(
        BOUND, oracle, dims=dims, attributes={}, type_bindings={"T": "float32"}, inputs=inputs, output_check=judge
    )
    assert said is None


def test_more_pages_in_use_than_there_are_and_fewer_than_none(lives: OpImplementations) -> None:
    dims = {"B": 3, "H": 2, "G": 2, "P": 6, "D": 4}
    for op in OPS:
        assert op.make_inputs is not None
        inputs = {**op.make_inputs(np.random.default_rng(0), dims, {}), "filled": np.array([9, -1, 2], np.int32)}
        assert lives.check(op, oracle, dims=dims, attributes={}, type_bindings={"T": "float32"}, inputs=inputs) is None


STRANGE = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 2.0, -1.0, 0.5]


@pytest.mark.parametrize("element", ["float32", "float16"])
@BOTH
def test_what_is_no_number_follows_the_formula(lives: OpImplementations, op: Op, element: str) -> None:
    dims = {"B": 2, "H": 3, "G": 3, "P": 9, "D": 3}
    for seed in range(4):
        random = np.random.default_rng(seed)
        assert op.make_inputs is not None
        inputs = dict(op.make_inputs(random, dims, {}))
        for name in {*inputs} - {"filled"}:
            mixed = random.random(inputs[name].shape) < 0.25
            inputs[name] = np.where(mixed, random.choice(STRANGE, size=mixed.shape), inputs[name])
        assert lives.check(op, oracle, dims=dims, attributes={}, type_bindings={"T": element}, inputs=inputs) is None


@pytest.mark.parametrize(
    ("element", "norms"),
    [
        ("float32", (1e38, 1e20, 1e-20, 3e-39, 1e-44)),
        ("bfloat16", (1e38, 1e20, 1e-20, 1e-34)),  # the interpreter misreads the subnormal ones
        ("float16", (6e4 / 5, 1e-3, 6e-7)),
    ],
)
def test_a_cosine_does_not_depend_on_norms(lives: OpImplementations, element: str, norms: tuple[float, ...]) -> None:
    dims = {"B": 1, "H": 2, "G": 3, "P": 9, "D": 7}
    for norm in norms:
        for other in (1.0, norm):
            assert COSINE.make_inputs is not None
            inputs = dict(COSINE.make_inputs(np.random.default_rng(1), dims, {}))
            inputs["query"], inputs["centroid"] = (np.clip(inputs["query"], -3, 3) * other, inputs["centroid"] * norm)
            assert lives.check(COSINE, oracle, dims=dims, attributes={}, type_bindings={"T": element}, inputs=inputs) is None


@pytest.mark.parametrize(("element", "norm"), [("float32", 1e18), ("float32", 1e-18), ("float16", 1e4), ("float16", 1e-5)])
def test_a_bound_is_as_precise_at_any_norm(lives: OpImplementations, element: str, norm: float) -> None:
    dims = {"B": 1, "H": 2, "G": 3, "P": 9, "D": 7}
    assert BOUND.make_inputs is not None
    inputs = dict(BOUND.make_inputs(np.random.default_rng(1), dims, {}))
    for name in ("query", "low", "high"):
        inputs[name] = inputs[name] * norm

    def judge(given: Arrays, found: Arrays) -> str | None:
        exact = oracle({name: array if name == "filled" else array.astype(np.float64) for name, array in given.items()}, {})
        used = np.isfinite(exact["score"])
        off = np.abs(found["score"][used] - exact["score"][used]).max() / norm**2
        return f"off by {off}" if off > 1e-5 or np.isfinite(found["score"][~used]).any() else None

    said = lives.check(BOUND, None, dims=dims, attributes={}, type_bindings={"T": element}, inputs=inputs, output_check=judge)
    assert said is None


KEEP = 'tl.where(used, best, float("-inf"))'
KEPT = """, start=2, end=3))
    page = op.Range(op.Constant(value_int=0), pages, op.Constant(value_int=1))
    used = op.Less(page, op.Unsqueeze(op.Cast(filled, to=INT64.dtype), op.Constant(value_ints=[1, 2])))
    score = op.Where(used, best, op.Constant(value_float=-INF))"""
UNUSED = [
    *[
        (BOUND, "kernel", "bound, best)\n    best = " + KEEP, "bound, best)\n    best = " + new)
        for new in ("best", KEEP.replace('float("-inf")', "7.0"), KEEP.replace("-inf", "inf"))
    ],
    *[
        (COSINE, "kernel", "cosine, 0.0))\n    best = " + KEEP, "cosine, 0.0))\n    best = " + new)
        for new in ("best", KEEP.replace('float("-inf")', "7.0"), KEEP.replace("-inf", "inf"))
    ],
    *[
        (op, "reference", pages + KEPT, pages + KEPT.replace(old, new))
        for op, pages in ((BOUND, "op.Shape(low"), (COSINE, "op.Shape(centroid"))
        for old, new in (
            ("-INF", "7.0"),
            ("-INF", "INF"),
            ("op.Where(used, best, op.Constant(value_float=-INF))", "op.Identity(best)"),
        )
    ],
]
"""What is said of a page that is not in use."""

MUTANTS = [
    *UNUSED,
    (BOUND, "kernel", "tl.where(q > 0, q, 0.0), tl.where(q > 0, 0.0, q)", "q, q"),
    (BOUND, "kernel", "tl.fma(up, most, down * least)", "tl.fma(up, most, -down * least)"),
    (BOUND, "kernel", "tl.where(bound > best, bound, best)", "bound"),
    (BOUND, "kernel", "head // heads", "head"),
    (BOUND, "kernel", "query + row * D + d, mask=d < D", "query + row * BLOCK_D + d, mask=d < D"),
    (BOUND, "reference", "op.Where(positive, zero, q)", "op.Where(positive, q, zero)"),
    (BOUND, "reference", "op.IsNaN(bound)", "op.IsInf(bound)"),
    (COSINE, "kernel", "tl.maximum(best, ", "tl.minimum(best, "),
    (COSINE, "kernel", "(norms > 0) & ", ""),
    (COSINE, "kernel", "element != tl.float16", "element == tl.float16"),
    (COSINE, "kernel", "largest < SMALL, UP, 1.0", "largest < SMALL, 1.0, 1.0"),
    (COSINE, "kernel", "tl.sum(q * q, axis=1)", "tl.sum(q * q * 1.001, axis=1)"),
    (COSINE, "kernel", "tl.sqrt_rn(tl.sum(c * c", "(tl.sum(c * c"),
    (COSINE, "reference", "op.Mul(q_norm, op.Transpose", "op.Add(q_norm, op.Transpose"),
    (COSINE, "reference", "op.And(op.Greater(norms, zero), op.Less(norms", "op.And(op.Less(norms, zero), op.Less(norms"),
    (COSINE, "reference", "op.Where(sane, op.Div(dot, op.Where(sane, norms, one)), zero)", "op.Div(dot, norms)"),
    (COSINE, "reference", "SMALL = 8.881784197001252e-16", "SMALL = 0.0"),
]


@pytest.mark.parametrize(("op", "part", "old", "new"), MUTANTS, ids=range(len(MUTANTS)))
def test_a_mutant_is_noticed(lives: OpImplementations, op: Op, part: str, old: str, new: str) -> None:
    def check(changed: Any) -> str | None:
        for seed in range(3):
            dims = {"B": 2, "H": 2, "G": 3, "P": 8, "D": 5}
            inputs = changed.draw(np.random.default_rng(seed), dims, {})
            inputs["filled"] = np.array([8, 5], np.int32)
            inputs["query"][0, 0] *= [1.0, 1e30, 1e-30][seed] if op is COSINE else 1.0
            inputs["query"][1, 0, 1, 0] = np.nan
            inputs["query"][1, 1, :, 1] = np.nan
            inputs["query"][0, 1, 0] = 0.0
            said = lives.check(changed, oracle, dims=dims, attributes={}, type_bindings={"T": "float32"}, inputs=inputs)
            if said is not None:
                return said
        return None

    assert check(op) is None
    assert lives.detects_mutation(op, part, old, new, check)


@BOTH
def test_what_they_cannot_do_is_refused(op: Op) -> None:
    dims = {"B": 1, "H": 2, "G": 2, "P": 3, "D": 4}
    with pytest.raises(ShapeError, match=r"D is 1025, and must be in \[1, 1024\]"):
        Specialization(op, {"T": "float32"}, {}, {**dims, "D": 1025})
    with pytest.raises(ShapeError, match="T is int8"):
        Specialization(op, {"T": "int8"}, {}, dims)
    shapes: dict[str, Any] = {port.name: [dims[name] for name in port.dims.split()] for port in op.inputs}
    with pytest.raises(ShapeError, match="`query` is of size 3 in H|is of size 2 in H, which is 3 here"):
        op.bind_dims({**shapes, "query": [1, 3, 2, 4]}, {})
