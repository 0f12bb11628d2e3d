"""PageScoreBound and PageScoreCosine against Python loops in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from support.op_implementations import Arrays, Attributes, OpCase, OpImplementations, mutant_test, op_inputs, oracle_comparison

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
    for page in np.ndindex(b, h, pages):
        if page[2] >= x["filled"][page[0]]:
            continue
        for g in range(group):
            q = x["query"][page[0], page[1], g]
            value = bound(q, x["low"][page], x["high"][page]) if "low" in x else cosine(q, x["centroid"][page])
            if not math.isnan(value):
                score[page] = max(score[page], value)
    return {"score": score}


def bound(q: np.ndarray[Any, Any], low: np.ndarray[Any, Any], high: np.ndarray[Any, Any]) -> float:
    total = 0.0
    for element, low_element, high_element in zip(q.tolist(), low.tolist(), high.tolist(), strict=True):
        total += high_element * max(element, 0.0) + low_element * min(element, 0.0) if element == element else math.nan
    return total


def cosine(q: np.ndarray[Any, Any], c: np.ndarray[Any, Any]) -> float:
    if not (np.isfinite(q).all() and np.isfinite(c).all() and q.any() and c.any()):
        return 0.0
    q, c = q / np.abs(q).max(), c / np.abs(c).max()
    return math.fsum(q * c) / math.sqrt(math.fsum(q * q) * math.fsum(c * c))


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int]]:
    return {name: draw(st.integers(1, high)) for name, high in {"B": 3, "H": 3, "G": 5, "P": 9, "D": 19}.items()}, {}


@pytest.mark.parametrize("dtype", BOUND.type_constraints["T"])
@BOTH
def test_all_implementations_match_the_oracle(implementations: OpImplementations, op: Op, dtype: str) -> None:
    implementations.assert_random_cases_match(op, oracle, cases(), counts=(13, 4), type_bindings={"T": dtype})


@BOTH
def test_pages_of_many_blocks(implementations: OpImplementations, op: Op) -> None:
    for dims in ({"B": 2, "H": 2, "G": 3, "P": 45, "D": 64}, {"B": 1, "H": 1, "G": 9, "P": 5, "D": 700}):
        implementations.assert_matches(op, oracle, dims=dims, type_bindings={"T": "float32"})


def test_the_bound_holds_for_every_key_of_the_page(implementations: OpImplementations) -> None:
    random = np.random.default_rng(3)
    keys = random.normal(size=(1, 2, 6, 16, 12)).astype(np.float32)
    query = random.normal(size=(1, 2, 3, 12)).astype(np.float32)
    inputs = {"query": query, "low": keys.min(axis=3), "high": keys.max(axis=3), "filled": np.array([6], np.int32)}
    best = np.einsum("bhgd,bhpkd->bhgpk", query, keys, dtype=np.float64).max(axis=(2, 4))

    def check_outputs(arrays: Arrays, outputs: Arrays) -> str | None:
        return None if (outputs["score"] >= best - 1e-5).all() else "a key exceeds the bound of its page"

    implementations.assert_matches(BOUND, oracle, type_bindings={"T": "float32"}, inputs=inputs, output_check=check_outputs)


def test_page_counts_out_of_range_are_clamped(implementations: OpImplementations) -> None:
    dims = {"B": 3, "H": 2, "G": 2, "P": 6, "D": 4}
    for op in OPS:
        inputs = {**op_inputs(op, dims), "filled": np.array([9, -1, 2], np.int32)}
        implementations.assert_matches(op, oracle, type_bindings={"T": "float32"}, inputs=inputs)


SPECIAL_VALUES = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 2.0, -1.0, 0.5]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@BOTH
def test_special_float_values_follow_the_formula(implementations: OpImplementations, op: Op, dtype: str) -> None:
    dims = {"B": 2, "H": 3, "G": 3, "P": 9, "D": 3}
    for seed in range(4):
        random = np.random.default_rng(seed)
        inputs = op_inputs(op, dims, {}, random)
        for name in {*inputs} - {"filled"}:
            mixed = random.random(inputs[name].shape) < 0.25
            inputs[name] = np.where(mixed, random.choice(SPECIAL_VALUES, size=mixed.shape), inputs[name])
        implementations.assert_matches(op, oracle, type_bindings={"T": dtype}, inputs=inputs)


@pytest.mark.parametrize(
    ("dtype", "norms"),
    [
        ("float32", (1e38, 1e20, 1e-20, 3e-39, 1e-44)),
        ("bfloat16", (1e38, 1e20, 1e-20, 1e-34)),  # Triton's interpreter converts subnormal bfloat16 incorrectly
        ("float16", (6e4 / 5, 1e-3, 6e-7)),
    ],
)
def test_a_cosine_does_not_depend_on_norms(implementations: OpImplementations, dtype: str, norms: tuple[float, ...]) -> None:
    dims = {"B": 1, "H": 2, "G": 3, "P": 9, "D": 7}
    for norm in norms:
        for query_norm in (1.0, norm):
            inputs = op_inputs(COSINE, dims, seed=1)
            inputs["query"], inputs["centroid"] = (np.clip(inputs["query"], -3, 3) * query_norm, inputs["centroid"] * norm)
            implementations.assert_matches(COSINE, oracle, type_bindings={"T": dtype}, inputs=inputs)


@pytest.mark.parametrize(("dtype", "norm"), [("float32", 1e18), ("float32", 1e-18), ("float16", 1e4), ("float16", 1e-5)])
def test_the_bound_has_the_same_relative_accuracy_at_any_norm(
    implementations: OpImplementations, dtype: str, norm: float
) -> None:
    dims = {"B": 1, "H": 2, "G": 3, "P": 9, "D": 7}
    inputs = op_inputs(BOUND, dims, seed=1)
    for name in ("query", "low", "high"):
        inputs[name] = inputs[name] * norm

    def check_outputs(arrays: Arrays, outputs: Arrays) -> str | None:
        exact = oracle({name: array if name == "filled" else array.astype(np.float64) for name, array in arrays.items()}, {})
        used = np.isfinite(exact["score"])
        error = np.abs(outputs["score"][used] - exact["score"][used]).max() / norm**2
        return f"off by {error}" if error > 1e-5 or np.isfinite(outputs["score"][~used]).any() else None

    implementations.assert_matches(BOUND, None, type_bindings={"T": dtype}, inputs=inputs, output_check=check_outputs)


MASK_UNUSED = 'tl.where(used, best, float("-inf"))'
MASK_UNUSED_REFERENCE = """, start=2, end=3))
    page = op.Range(op.Constant(value_int=0), pages, op.Constant(value_int=1))
    used = op.Less(page, op.Unsqueeze(op.Cast(filled, to=INT64.dtype), op.Constant(value_ints=[1, 2])))
    score = op.Where(used, best, op.Constant(value_float=-INF))"""


def unused_page_mutants(kernel_line: str, pages: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the mutants of the score of pages that are not in use."""
    kernel = kernel_line + "\n    best = "
    masks = ("best", MASK_UNUSED.replace('float("-inf")', "7.0"), MASK_UNUSED.replace("-inf", "inf"))
    reference = pages + MASK_UNUSED_REFERENCE
    changes = (("-INF", "7.0"), ("-INF", "INF"), ("op.Where(used, best, op.Constant(value_float=-INF))", "op.Identity(best)"))
    return {
        "kernel": {kernel + MASK_UNUSED: tuple(kernel + mask for mask in masks)},
        "reference": {reference: tuple(pages + MASK_UNUSED_REFERENCE.replace(old, new) for old, new in changes)},
    }


UNUSED_BOUND, UNUSED_COSINE = (
    unused_page_mutants("bound, best)", "op.Shape(low"),
    unused_page_mutants("cosine, 0.0))", "op.Shape(centroid"),
)
MUTANTS = {
    "PageScoreBound": {
        "kernel": {
            **UNUSED_BOUND["kernel"],
            "tl.where(q > 0, q, 0.0), tl.where(q > 0, 0.0, q)": "q, q",
            "tl.fma(up, most, down * least)": "tl.fma(up, most, -down * least)",
            "tl.where(bound > best, bound, best)": "bound",
            "head // heads": "head",
            "query + row * D + d, mask=d < D": "query + row * BLOCK_D + d, mask=d < D",
        },
        "reference": {
            **UNUSED_BOUND["reference"],
            "op.Where(positive, zero, q)": "op.Where(positive, q, zero)",
            "op.IsNaN(bound)": "op.IsInf(bound)",
        },
    },
    "PageScoreCosine": {
        "kernel": {
            **UNUSED_COSINE["kernel"],
            "tl.maximum(best, ": "tl.minimum(best, ",
            "(norms > 0) & ": "",
            "element != tl.float16": "element == tl.float16",
            "largest < SMALL, UP, 1.0": "largest < SMALL, 1.0, 1.0",
            "tl.sum(q * q, axis=1)": "tl.sum(q * q * 1.001, axis=1)",
            "tl.sqrt_rn(tl.sum(c * c": "(tl.sum(c * c",
        },
        "reference": {
            **UNUSED_COSINE["reference"],
            "op.Mul(q_norm, op.Transpose": "op.Add(q_norm, op.Transpose",
            "op.And(op.Greater(norms, zero), op.Less(norms": "op.And(op.Less(norms, zero), op.Less(norms",
            "op.Where(sane, op.Div(dot, op.Where(sane, norms, one)), zero)": "op.Div(dot, norms)",
            "SMALL = 8.881784197001252e-16": "SMALL = 0.0",
        },
    },
}


def mutation_cases(op: Op) -> Iterator[OpCase]:
    for seed, norm in enumerate((1.0, 1e30, 1e-30)):
        inputs = op_inputs(op, {"B": 2, "H": 2, "G": 3, "P": 8, "D": 5}, seed=seed)
        inputs["filled"] = np.array([8, 5], np.int32)
        inputs["query"][0, 0] *= norm if op.name == COSINE.name else 1.0
        inputs["query"][1, 0, 1, 0] = np.nan
        inputs["query"][1, 1, :, 1] = np.nan
        inputs["query"][0, 1, 0] = 0.0
        yield OpCase(inputs=inputs)


test_mutants_are_detected = mutant_test(oracle_comparison(oracle, mutation_cases), MUTANTS)


@BOTH
def test_unsupported_inputs_are_rejected(op: Op) -> None:
    dims = {"B": 1, "H": 2, "G": 2, "P": 3, "D": 4}
    with pytest.raises(ShapeError, match=r"D is 1025, and must be in \[1, 1024\]"):
        Specialization(op, {"T": "float32"}, {}, {**dims, "D": 1025})
    with pytest.raises(ShapeError, match="T is int8"):
        Specialization(op, {"T": "int8"}, {}, dims)
    shapes: dict[str, Any] = {param.name: [dims[name] for name in param.dims.split()] for param in op.inputs}
    with pytest.raises(ShapeError, match="`query` has size 3 in dim H|has size 2 in dim H, expected 3"):
        op.bind_dims({**shapes, "query": [1, 3, 2, 4]}, {})
