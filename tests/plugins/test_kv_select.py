"""KVSelect against a sort in Python: the selected slots and their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from support.op_implementations import Arrays, Attributes, OpCase, OpImplementations, mutant_test, op_inputs, oracle_comparison

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.kernels import Specialization
from ryzen_compile.registry import find_op
from ryzen_compile.spec.op import Op

OP = find_op("KVSelect")
LARGEST = float(np.finfo(np.float32).max)


def oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    keep, sinks, recent = (int(attributes[name]) for name in ("keep", "sinks", "recent"))
    b, h, c = x["score"].shape
    index, length = np.full((b, h, keep), -1, np.int32), np.zeros(b, np.int64)
    for sequence, head in np.ndindex(b, h):
        tokens = []
        newest = max(int(position) for position in x["position"][sequence, head])
        for slot in range(c):
            position, score = int(x["position"][sequence, head, slot]), float(x["score"][sequence, head, slot])
            if position < 0:
                continue
            score = -LARGEST if np.isnan(score) else min(max(score, -LARGEST), LARGEST)
            if position in range(sinks) or newest - position < recent:
                score = np.inf
            tokens.append((-score, slot, position))
        selected = sorted((position, slot) for _, slot, position in sorted(tokens)[:keep])
        index[sequence, head, : len(selected)] = [slot for _, slot in selected]
        if head == 0:
            length[sequence] = len(selected)
    return {"index": index, "length": length}


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int]]:
    sinks, recent = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    keep = draw(st.integers(max(1, sinks + recent), sinks + recent + 8))
    capacity = draw(st.integers(keep, keep + 20))
    sizes = {"B": draw(st.integers(1, 3)), "H": draw(st.integers(1, 3)), "C": capacity}
    return sizes, {"keep": keep, "sinks": sinks, "recent": recent}


def test_all_implementations_select_the_slots_of_the_oracle(implementations: OpImplementations) -> None:
    implementations.assert_random_cases_match(OP, oracle, cases(), counts=(20, 20))


SPECIAL_SCORES = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, LARGEST, -LARGEST, 1.0]


def test_special_float_scores_are_ordered(implementations: OpImplementations) -> None:
    for seed, keep in enumerate((2, 3, 6, 9, 12)):
        dims, attributes = {"B": 4, "H": 4, "C": 12}, {"keep": keep, "sinks": 1, "recent": 1}
        random = np.random.default_rng(seed)
        inputs = op_inputs(OP, dims, attributes, random)
        inputs["score"] = random.choice(SPECIAL_SCORES, size=inputs["score"].shape)
        implementations.assert_matches(OP, oracle, attributes=attributes, inputs=inputs)


@pytest.mark.parametrize("top", [0, 1, 3, 4, 2**20 + 3, 2**31 - 2])
def test_positions_of_any_size_are_sorted_and_may_repeat(implementations: OpImplementations, top: int) -> None:
    random = np.random.default_rng(top % 1000)
    position = random.integers(0, top, size=(3, 3, 70), endpoint=True).astype(np.int32)
    position[..., 5] = top
    position[1, :, ::3] = -1
    position[2] = -7  # all slots are free
    inputs = {"score": np.round(random.normal(size=position.shape)), "position": position}
    for keep in (1, 33, 70):
        attributes = {"keep": keep, "sinks": 0, "recent": 1}
        implementations.assert_matches(OP, oracle, attributes=attributes, inputs=inputs)


def test_a_cache_of_thousands_of_slots(implementations: OpImplementations) -> None:
    dims, attributes = {"B": 1, "H": 2, "C": 5000}, {"keep": 1500, "sinks": 4, "recent": 64}
    for seed in range(2):
        implementations.assert_matches(OP, oracle, dims=dims, attributes=attributes, seed=seed)


def test_the_maximum_number_of_ties(implementations: OpImplementations) -> None:
    """Slot counts have 16 bits, which is sufficient for 2**15 slots."""
    slots = 32768
    inputs = {
        "score": np.zeros((1, 1, slots)),
        "position": np.arange(slots, dtype=np.int32)[::-1].copy().reshape(1, 1, slots),
    }
    for keep in (slots, 3):
        attributes = {"keep": keep, "sinks": 0, "recent": 0}
        implementations.assert_matches(OP, oracle, attributes=attributes, inputs=inputs)


MUTANTS = {
    "KVSelect": {
        "kernel": {
            "at > newest - RECENT": "at >= newest - RECENT",
            "(at < SINKS) | ": "",
            "sort_key(worth, c * 0)": "sort_key(-worth, c * 0)",
            "tl.where(at >= 0, key": "tl.where(at >= -1, key",
            "range(0, digits, 2)": "range(0, digits - 1, 2)",
            "0x1000100010000": "0x100010000",
            "(now > later).to(tl.int32), axis=0) > 0": "(now > later).to(tl.int32), axis=0) > 1",
            "tl.store(length + row // heads": "tl.store(length + row",
            "tl.where(worth >= LOWEST, worth, LOWEST)": "worth",
        },
        "reference": {
            "largest=0, sorted=1": "largest=1, sorted=1",
            "op.Greater(at, op.Sub(newest": "op.GreaterOrEqual(at, op.Sub(newest",
            "op.IsNaN(score)": "op.IsInf(score)",
            "op.Constant(value_int=sinks)": "op.Constant(value_int=0)",
            "op.Where(filled, worth, op.Constant(value_float=-INF))": "worth",
        },
    },
}


def mutation_cases(op: Op) -> Iterator[OpCase]:
    for seed, (keep, capacity, sinks, recent) in enumerate([(7, 12, 2, 2), (5, 7, 2, 1), (20, 24, 1, 3), (6, 9, 3, 3)]):
        attributes = {"keep": keep, "sinks": sinks, "recent": recent}
        random = np.random.default_rng(seed)
        inputs = op_inputs(op, {"B": 4, "H": 3, "C": capacity}, attributes, random)
        inputs["score"][..., ::2] = random.choice(SPECIAL_SCORES, size=inputs["score"][..., ::2].shape)
        yield OpCase(inputs=inputs, attributes=attributes, type_bindings={})


test_mutants_are_detected = mutant_test(oracle_comparison(oracle, mutation_cases), MUTANTS)


def test_unsupported_inputs_are_rejected() -> None:
    dims = {"B": 1, "H": 1, "C": 5}
    with pytest.raises(ShapeError, match=r"needs sinks \+ recent <= keep, and here keep = 4, recent = 3, sinks = 2"):
        Specialization(OP, {}, {"keep": 4, "sinks": 2, "recent": 3}, dims)
    with pytest.raises(ShapeError, match=r"needs keep <= C, and here C = 5, keep = 6"):
        Specialization(OP, {}, {"keep": 6, "sinks": 2, "recent": 3}, dims)
    with pytest.raises(ShapeError, match=r"C is 40000, and must be in \[1, 32768\]"):
        Specialization(OP, {}, {"keep": 6, "sinks": 2, "recent": 3}, {**dims, "C": 40000})
    with pytest.raises(UsageError, match="`keep` is 0, and must be in"):
        Specialization(OP, {}, {"keep": 0, "sinks": 0, "recent": 0}, dims)
