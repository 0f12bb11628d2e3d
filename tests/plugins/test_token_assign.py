"""TokenAssign against a sort and a Python loop: ties, special float similarities, merging none and all of the pairs."""

from __future__ import annotations

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

OP = find_op("TokenAssign")
LARGEST = float(np.finfo(np.float32).max)


def oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    target = np.empty(x["size"].shape, np.int32)
    last = target.shape[1] - 1
    for sequence in range(target.shape[0]):
        pairs = []
        for i, similarity in enumerate(x["similarity"][sequence]):
            priority = -LARGEST if np.isnan(similarity) else max(float(similarity), -LARGEST)
            token, partner = (min(max(int(x[name][sequence, i]), 0), last) for name in ("a", "partner"))
            pairs.append((-priority, i, token, partner))
        partner_of = {token: partner for _, _, token, partner in sorted(pairs)[: max(0, last + 1 - len(x["slots"]))]}
        slot: dict[int, int] = {}
        for token in range(last + 1):
            if token not in partner_of:
                slot[token] = len(slot)
        target[sequence] = [slot[partner_of.get(token, token)] for token in range(last + 1)]
    return {"target": target}


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, int], Attributes]:
    tokens = draw(st.integers(2, 24))
    pairs = draw(st.integers(1, tokens - 1))
    return {"B": draw(st.integers(1, 3)), "N": tokens, "A": pairs, "M": draw(st.integers(1, tokens + 2))}, {}


def test_all_implementations_match_the_oracle(implementations: OpImplementations) -> None:
    implementations.assert_random_cases_match(OP, oracle, cases(), counts=(25, 25))


@pytest.mark.parametrize("merged", [0, 1, 150, 299, 300])
def test_long_sequences(implementations: OpImplementations, merged: int) -> None:
    dims = {"B": 2, "N": 700, "A": 300, "M": 700 - merged}
    implementations.assert_matches(OP, oracle, dims=dims, attributes={}, seed=merged)


SPECIAL_SIMILARITIES = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, LARGEST, -LARGEST, 1.0, -1.0, 3.0, 2.0, -2.0]


@pytest.mark.parametrize("merged", [1, 5, 9])
def test_special_float_similarities_are_ordered(implementations: OpImplementations, merged: int) -> None:
    dims = {"B": 8, "N": 20, "A": 9, "M": 20 - merged}
    for seed in range(4):
        random = np.random.default_rng(seed)
        inputs = {**op_inputs(OP, dims, {}, random), "similarity": random.choice(SPECIAL_SIMILARITIES, size=(8, 9))}
        implementations.assert_matches(OP, oracle, attributes={}, inputs=inputs)


def test_an_index_out_of_range_is_clamped(implementations: OpImplementations) -> None:
    inputs = {
        "size": np.ones((1, 5)),
        "a": np.array([[9, -7]], np.int32),
        "partner": np.array([[2, 2**31 - 1]], np.int32),
        "similarity": np.array([[0.5, 0.25]]),
        "slots": np.zeros(4, np.int32),
    }

    def exact(x: Arrays, attributes: Attributes) -> Arrays:
        return {"target": np.array([[0, 1, 2, 3, 2]], np.int32)}

    implementations.assert_matches(OP, exact, attributes={}, inputs=inputs)


def test_overlapping_lists_give_targets_in_range(implementations: OpImplementations) -> None:
    """The result is unspecified, except that every target is a slot or -1."""
    random = np.random.default_rng(0)

    def check_outputs(inputs: Arrays, outputs: Arrays) -> str | None:
        return None if ((outputs["target"] >= -1) & (outputs["target"] < 12)).all() else str(outputs["target"])

    inputs = {
        "size": np.ones((4, 12)),
        "a": random.integers(0, 12, size=(4, 10), dtype=np.int32),
        "partner": random.integers(0, 12, size=(4, 10), dtype=np.int32),
        "similarity": random.normal(size=(4, 10)),
        "slots": np.zeros(4, np.int32),
    }
    implementations.assert_matches(OP, None, attributes={}, inputs=inputs, output_check=check_outputs)


def test_unmerged_tokens_keep_their_order(implementations: OpImplementations) -> None:
    dims = {"B": 3, "N": 30, "A": 12, "M": 23}

    def check_outputs(inputs: Arrays, outputs: Arrays) -> str | None:
        for sequence, target in enumerate(outputs["target"]):
            if sorted({*target.tolist()}) != [*range(23)]:
                return f"{sequence}: the slots are {sorted({*target.tolist()})}"
            outside = np.setdiff1d(np.arange(30), inputs["a"][sequence])
            if not (np.diff(target[outside]) > 0).all():
                return f"{sequence}: tokens that may not be merged have slots {target[outside]}"
        return None

    for seed in range(5):
        implementations.assert_matches(OP, None, dims=dims, attributes={}, seed=seed, output_check=check_outputs)


MUTANTS = {
    "TokenAssign": {
        "kernel": {
            "key < (threshold | bit)": "key <= (threshold | bit)",
            "turn <= merged - ahead": "turn <= merged",
            "bits ^ 0x7FFFFFFF": "bits",
            "tl.where(alike == 0.0, 0.0, alike)": "alike",
            "tl.cumsum(stays, axis=0) - 1": "tl.cumsum(stays, axis=0)",
            "theirs = tl.load(here + other": "theirs = tl.load(here + source",
            "    here = target + sequence * tokens\n": "    here = target + sequence * pairs\n",
            "range(32)": "range(31)",
            "source = tl.minimum(tl.maximum(source, 0), tokens - 1)": "source = tl.maximum(source, 0)",
        },
        "reference": {
            "largest=1": "largest=0",
            "goes = op.Less(rank, merged)": "goes = op.Less(rank, count)",
            "op.IsNaN(similarity)": "op.IsInf(similarity)",
            "op.Where(goes, theirs, own)": "theirs",
            "slot = op.Sub(op.CumSum(stays, one), one)": "slot = op.CumSum(stays, one)",
            "op.Sub(one, leaves)": "leaves",
        },
    },
}


def mutation_cases(op: Op) -> Iterator[OpCase]:
    for seed, merged in enumerate([3, 0, 5, 8]):
        random = np.random.default_rng(seed)
        inputs = op_inputs(op, {"B": 4, "N": 17, "A": 9, "M": 17 - merged}, {}, random)
        inputs["similarity"][:, ::3] = random.choice([np.nan, 0.0, -0.0, np.inf, 1.0, 1.0 + 2.0**-23], size=(4, 3))
        inputs["a"][inputs["a"] == 16] = 30
        yield OpCase(inputs=inputs, attributes={}, type_bindings={})


test_mutants_are_detected = mutant_test(oracle_comparison(oracle, mutation_cases), MUTANTS)


def test_unsupported_inputs_are_rejected() -> None:
    dims = {"B": 1, "N": 6, "A": 3, "M": 4}
    with pytest.raises(ShapeError, match=r"needs A <= N, and here A = 7, N = 6"):
        Specialization(OP, {}, {}, {**dims, "A": 7})
    with pytest.raises(ShapeError, match=r"N is 20000, and must be in \[1, 16384\]"):
        Specialization(OP, {}, {}, {**dims, "N": 20000})
