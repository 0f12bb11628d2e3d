"""TokenMatch against Python loops over pairs: ties, padding, zero and non-finite vectors, indices out of range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from support.op_implementations import Arrays, Attributes, OpCase, OpImplementations, mutant_test, oracle_comparison
from support.token_oracles import cosine, is_real_token, scaled_signs, special_token_inputs

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.kernels import Specialization
from ryzen_compile.registry import find_op
from ryzen_compile.spec.op import Op

OP = find_op("TokenMatch")
TYPE_BINDINGS = [{"T": dtype} for dtype in OP.type_constraints["T"]]


def expected_similarity(x: Arrays, sequence: int, s: int, t: int) -> float:
    """Return the similarity of the token s of list a and the token t of list b."""
    if not is_real_token(x["size"][sequence, s]):
        return 2.0 if is_real_token(x["size"][sequence, t]) else 3.0
    if not is_real_token(x["size"][sequence, t]):
        return -2.0
    return cosine(x["metric"][sequence, s], x["metric"][sequence, t])


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

    dims = st.fixed_dictionaries({name: st.integers(1, high) for name, high in sizes.items()})
    implementations.assert_random_cases_match(
        OP, oracle, st.tuples(dims, st.just({})), counts=(13, 5), type_bindings=type_bindings
    )


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
    implementations.assert_matches(OP, None, type_bindings=type_bindings, inputs=inputs, output_check=check_outputs)


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
def test_special_float_vectors_and_sizes_follow_the_formula(
    implementations: OpImplementations, type_bindings: dict[str, str]
) -> None:
    for seed in range(6):
        random, inputs = special_token_inputs(seed, type_bindings["T"])
        a = random.integers(-3, 24, size=(2, 12), dtype=np.int32)
        b = random.integers(-3, 24, size=(2, 9), dtype=np.int32)
        inputs |= {"a": a, "b": b}
        implementations.assert_matches(OP, oracle, type_bindings=type_bindings, inputs=inputs)


def test_padding_prefers_padding_and_real_tokens_prefer_real_tokens(implementations: OpImplementations) -> None:
    """In list a, tokens 0 and 1 are real and 2 is padding; in list b, 3 and 4 are real, 5 and 6 padding; 5 equals token 0."""
    metric = np.array([[1, 0], [0, 1], [7, 7], [1, 9], [9, 1], [1, 0], [np.nan, 0]], np.float64)[None]
    size = np.array([[1, 1, 0, 1, 1, 0, 0]], np.float64)
    lists = {"a": np.array([[0, 1, 2]], np.int32), "b": np.array([[6, 5, 4, 3]], np.int32)}

    def check(partner: list[int], similarity: list[float], **overrides: Any) -> None:
        inputs = {"metric": metric, "size": size, **lists, **overrides}

        def exact(x: Arrays, attributes: Attributes) -> Arrays:
            return {"partner": np.array([partner], np.int32), "similarity": np.array([similarity])}

        implementations.assert_matches(OP, exact, type_bindings={"T": "float16"}, inputs=inputs)

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
        implementations.assert_matches(OP, exact, type_bindings={"T": "float32"}, inputs=inputs)


MUTANTS = {
    "TokenMatch": {
        "kernel": {
            "tl.where(real_b, 2.0, 3.0)": "tl.where(real_b, 3.0, 2.0)",
            "alike > best": "alike >= best",
            "tl.where(best == top[:, None], best_at, count_b)": "best_at",
            "for_real = tl.where(real_b[None, :], cosine, -2.0)": "for_real = cosine",
            "product * scale_a[:, None] * inverse_norm(square_b)[None, :]": "product * scale_a[:, None]",
            "fine_a[:, None] & is_finite_norm(square_b)[None, :]": "fine_a[:, None]",
            "tokens + tl.minimum(tl.maximum(token, 0), tokens - 1)": "tokens + tl.maximum(token, 0) % tokens",
            "more_a = tl.load(from_a + first_d": "more_a = tl.load(from_a",
            "found = tl.minimum(tl.maximum(found, 0), tokens - 1)": "found = place",
        },
        "reference": {
            "select_last_index=0": "select_last_index=1",
            "op.Where(real_a, for_real, for_padding)": "for_real",
            "op.Where(real_b, cosine, unlike)": "cosine",
            "op.Greater(square_b, op.Constant(value_float=1e-30))": "op.Greater(square_b, zero)",
            "op.Min(op.Cast(b, to=INT64.dtype), end)": "op.Cast(b, to=INT64.dtype)",
            "op.GatherElements(at_b, best, axis=1)": "best",
        },
    },
}


def mutation_cases(op: Op) -> Iterator[OpCase]:
    random = np.random.default_rng(0)
    for depth, others, equal in ((256, 90, False), (4, 3, False), (4, 6, True)):
        metric = scaled_signs(random, 2, 30, depth)
        metric[:, ::5] = 0.0
        metric[:, 1::7] *= 2.0**-60
        metric[:, 3::6] *= 2.0**63
        if equal:
            metric[:, :12], metric[:, 12::2], metric[:, 13::2] = 1.0, 2.0**63, -1.0
        a = random.integers(-2, 12, size=(2, 9), dtype=np.int32)
        b = random.integers(12, 33, size=(2, others), dtype=np.int32)
        yield OpCase(inputs={"metric": metric, "size": random.choice([1.0, 1.0, 0.0], size=(2, 30)), "a": a, "b": b})


test_mutants_are_detected = mutant_test(oracle_comparison(oracle, mutation_cases), MUTANTS)


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
