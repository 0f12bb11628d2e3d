"""TokenMatch against Python loops over pairs: ties, padding, zero and non-finite vectors, indices out of range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.op_implementations import Arrays, Attributes, OpImplementations

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.kernels import Specialization
from ryzen_compile.registry import find_op

OP = find_op("TokenMatch")
TYPE_BINDINGS = [{"T": dtype} for dtype in OP.type_constraints["T"]]


def is_real(size: float) -> bool:
    return bool(2.0**-64 <= size <= 2.0**64)


def expected_similarity(x: Arrays, sequence: int, s: int, t: int) -> float:
    """Return the similarity of the token s of list a and the token t of list b."""
    if not is_real(x["size"][sequence, s]):
        return 2.0 if is_real(x["size"][sequence, t]) else 3.0
    if not is_real(x["size"][sequence, t]):
        return -2.0
    a, b = x["metric"][sequence, s], x["metric"][sequence, t]
    with np.errstate(all="ignore"):
        if not (a @ a < 1e38 and b @ b < 1e38):
            return -2.0
    if a @ a <= 1e-30 or b @ b <= 1e-30:
        return 0.0
    return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))


def oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    out = {"partner": np.empty(x["a"].shape, np.int32), "similarity": np.empty(x["a"].shape)}
    last = x["size"].shape[1] - 1
    for sequence, i in np.ndindex(x["a"].shape):
        s = min(max(int(x["a"][sequence, i]), 0), last)
        best = -np.inf
        for t in x["b"][sequence]:
            t = min(max(int(t), 0), last)
            if (similarity := expected_similarity(x, sequence, s, t)) > best:
                best = out["similarity"][sequence, i] = similarity
                out["partner"][sequence, i] = t
    return out


def check_outputs(x: Arrays, outputs: Arrays) -> str | None:
    """Return an error unless every partner is as similar as the best, within float32; cosines may be too close to order."""
    for sequence, i in np.ndindex(x["a"].shape):
        float64 = {name: array.astype(np.float64) for name, array in x.items()}
        similarities = [expected_similarity(float64, sequence, x["a"][sequence, i], t) for t in x["b"][sequence]]
        matches = np.flatnonzero(x["b"][sequence] == outputs["partner"][sequence, i])
        if matches.size == 0:
            return f"the partner at {sequence}, {i} is not in the list"
        if (
            abs(similarities[matches[0]] - max(similarities)) > 4e-5
            or abs(outputs["similarity"][sequence, i] - max(similarities)) > 4e-5
        ):
            return f"at {sequence}, {i} {outputs['similarity'][sequence, i]} was returned, but the best is {max(similarities)}"
    return None


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
def test_all_implementations_match_the_oracle(implementations: OpImplementations, type_bindings: dict[str, str]) -> None:
    sizes = {"B": 3, "N": 9, "D": 20, "A": 6, "M": 6}

    @settings(max_examples=25 if type_bindings["T"] == "float32" else 10)
    @given(dims=st.fixed_dictionaries({name: st.integers(1, high) for name, high in sizes.items()}), seed=st.integers(0, 2**32))
    def check(dims: dict[str, int], seed: int) -> None:
        assert implementations.check(OP, oracle, dims=dims, attributes={}, type_bindings=type_bindings, seed=seed) is None

    check()


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
@pytest.mark.parametrize("depth", [64, 200])
def test_lists_of_many_tiles_and_rows_longer_than_a_block(
    implementations: OpImplementations, type_bindings: dict[str, str], depth: int
) -> None:
    """For random vectors the partner may be any candidate that is equal to the best within float32."""
    random = np.random.default_rng(depth)
    order = random.permutation(220).astype(np.int32)
    metric = random.normal(size=(1, 220, depth)) * 10.0 ** random.integers(-2, 3, size=(1, 220, 1))
    inputs = {"metric": metric, "size": np.ones((1, 220)), "a": order[None, :70], "b": order[None, 70:]}
    dims = {"B": 1, "N": 220, "D": depth, "A": 70, "M": 150}
    assert (
        implementations.check(
            OP, None, dims=dims, attributes={}, type_bindings=type_bindings, inputs=inputs, output_check=check_outputs
        )
        is None
    )


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
def test_special_float_vectors_and_sizes_follow_the_formula(
    implementations: OpImplementations, type_bindings: dict[str, str]
) -> None:
    wide_range = type_bindings["T"] != "float16"
    scales = [
        1.0,
        0.0,
        -0.0,
        np.nan,
        np.inf,
        2.0**63 if wide_range else 1024.0,
        2.0**-60 if wide_range else 2.0**-24,
        2.0**14,
        1e-40,
    ]
    for seed in range(6):
        random = np.random.default_rng(seed)
        metric = random.choice([-1.0, 1.0], size=(2, 20, 4)) * random.choice(scales, size=(2, 20, 1))
        metric[1, 3, 2] = np.nan
        size = random.choice([1.0, 1.0, 3.0, 2.0**60, 1e-9, 0.0, -0.0, -1.0, np.nan, np.inf, 1e-30, 1e30], size=(2, 20))
        a = random.integers(-3, 24, size=(2, 12), dtype=np.int32)
        b = random.integers(-3, 24, size=(2, 9), dtype=np.int32)
        inputs = {"metric": metric, "size": size, "a": a, "b": b}
        dims = {"B": 2, "N": 20, "D": 4, "A": 12, "M": 9}
        assert implementations.check(OP, oracle, dims=dims, attributes={}, type_bindings=type_bindings, inputs=inputs) is None


def test_padding_prefers_padding_and_real_tokens_prefer_real_tokens(implementations: OpImplementations) -> None:
    """In list a, tokens 0 and 1 are real and 2 is padding; in list b, 3 and 4 are real, 5 and 6 padding; 5 equals token 0."""
    metric = np.array([[1, 0], [0, 1], [7, 7], [1, 9], [9, 1], [1, 0], [np.nan, 0]], np.float64)[None]
    size = np.array([[1, 1, 0, 1, 1, 0, 0]], np.float64)
    lists = {"a": np.array([[0, 1, 2]], np.int32), "b": np.array([[6, 5, 4, 3]], np.int32)}

    def check(partner: list[int], similarity: list[float], **overrides: Any) -> None:
        inputs = {"metric": metric, "size": size, **lists, **overrides}

        def exact(x: Arrays, attributes: Attributes) -> Arrays:
            return {"partner": np.array([partner], np.int32), "similarity": np.array([similarity])}

        dims = {"B": 1, "N": 7, "D": 2, "A": 3, "M": inputs["b"].shape[1]}
        assert implementations.check(OP, exact, dims=dims, attributes={}, type_bindings={"T": "float16"}, inputs=inputs) is None

    cosine = 9 / np.sqrt(82)
    check([4, 3, 6], [cosine, cosine, 3.0])
    check([4, 3, 4], [cosine, cosine, 2.0], b=np.array([[4, 3]], np.int32))
    check([6, 6, 6], [-2.0, -2.0, 3.0], b=np.array([[6, 5]], np.int32))


def test_ties_select_the_first_candidate_of_the_list(implementations: OpImplementations) -> None:
    """Also if the ties are in different tiles, or an earlier tile has a worse candidate in the same column."""
    for indices in ([149, 3, 70], [70, 6], [64, 1], [5], [63, 128]):
        metric = np.zeros((1, 200, 16))
        metric[0, :, 0] = 1.0
        metric[0, 10:, 1:] = np.random.default_rng(0).choice([-1.0, 1.0], size=(190, 15))
        metric[0, :10] = 1.0
        b = np.arange(10, 170, dtype=np.int32)[::-1]
        for index in indices:
            metric[0, b[index]] = 1.0

        def exact(x: Arrays, attributes: Attributes, first: int = b[min(indices)]) -> Arrays:
            return {"partner": np.full((1, 10), first, np.int32), "similarity": np.ones((1, 10))}

        inputs = {"metric": metric, "size": np.ones((1, 200)), "a": np.arange(10, dtype=np.int32)[None], "b": b[None]}
        dims = {"B": 1, "N": 200, "D": 16, "A": 10, "M": 160}
        assert implementations.check(OP, exact, dims=dims, attributes={}, type_bindings={"T": "float32"}, inputs=inputs) is None


MUTANTS = [
    ("kernel", "tl.where(real_b, 2.0, 3.0)", "tl.where(real_b, 3.0, 2.0)"),
    ("kernel", "alike > best", "alike >= best"),
    ("kernel", "tl.where(best == top[:, None], best_at, count_b)", "best_at"),
    ("kernel", "for_real = tl.where(real_b[None, :], cosine, -2.0)", "for_real = cosine"),
    ("kernel", "product * scale_a[:, None] * inverse_norm(square_b)[None, :]", "product * scale_a[:, None]"),
    ("kernel", "fine_a[:, None] & is_finite_norm(square_b)[None, :]", "fine_a[:, None]"),
    ("kernel", "at_b = start + tl.minimum(tl.maximum(at_b, 0), tokens - 1)", "at_b = start + tl.maximum(at_b, 0) % tokens"),
    ("kernel", "more_a = tl.load(from_a + first_d", "more_a = tl.load(from_a"),
    ("kernel", "found = tl.minimum(tl.maximum(found, 0), tokens - 1)", "found = place"),
    ("reference", "select_last_index=0", "select_last_index=1"),
    ("reference", "op.Where(real_a, for_real, for_padding)", "for_real"),
    ("reference", "op.Where(real_b, cosine, unlike)", "cosine"),
    ("reference", "op.Greater(square_b, op.Constant(value_float=1e-30))", "op.Greater(square_b, zero)"),
    ("reference", "op.Min(op.Cast(b, to=INT64.dtype), end)", "op.Cast(b, to=INT64.dtype)"),
    ("reference", "op.GatherElements(at_b, best, axis=1)", "best"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "old", "new"), MUTANTS)
def test_mutants_are_detected(implementations: OpImplementations, part: str, old: str, new: str) -> None:
    random = np.random.default_rng(0)
    cases = []
    for depth, others in ((256, 90), (4, 3), (4, 6)):
        metric = random.choice([-1.0, 1.0], size=(2, 30, depth)) * 2.0 ** random.integers(-3, 4, size=(2, 30, 1))
        metric[:, ::5] = 0.0
        metric[:, 1::7] *= 2.0**-60
        metric[:, 3::6] *= 2.0**63
        if len(cases) == 2:
            metric[:, :12], metric[:, 12::2], metric[:, 13::2] = 1.0, 2.0**63, -1.0
        a = random.integers(-2, 12, size=(2, 9), dtype=np.int32)
        b = random.integers(12, 33, size=(2, others), dtype=np.int32)
        cases.append({"metric": metric, "size": random.choice([1.0, 1.0, 0.0], size=(2, 30)), "a": a, "b": b})

    def check(op: Any) -> str | None:
        for inputs in cases:
            dims = {"B": 2, "N": 30, "D": inputs["metric"].shape[2], "A": 9, "M": inputs["b"].shape[1]}
            mismatch = implementations.check(
                op, oracle, dims=dims, attributes={}, type_bindings={"T": "float32"}, inputs=inputs
            )
            if mismatch is not None:
                return mismatch
        return None

    assert check(OP) is None
    assert implementations.detects_mutation(OP, part, old, new, check)


def test_unsupported_inputs_are_rejected() -> None:
    dims = {"B": 1, "N": 4, "D": 4, "A": 2, "M": 2}
    with pytest.raises(ShapeError, match=r"N is 20000, and must be in \[1, 16384\]"):
        Specialization(OP, {"T": "float16"}, {}, {**dims, "N": 20000})
    with pytest.raises(ShapeError, match=r"M is 0, and must be in"):
        Specialization(OP, {"T": "float16"}, {}, {**dims, "M": 0})
    with pytest.raises(ShapeError, match="T is int8"):
        Specialization(OP, {"T": "int8"}, {}, dims)
    with pytest.raises(UsageError, match="no attribute `merged`"):
        Specialization(OP, {"T": "float16"}, {"merged": 1}, dims)
