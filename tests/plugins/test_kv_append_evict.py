"""KVAppendEvict against a Python loop: the written slots, with ties and padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.op_implementations import Arrays, Attributes, OpCase, OpImplementations, mutant_test, op_inputs, oracle_comparison

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.kernels import Specialization
from ryzen_compile.registry import find_op
from ryzen_compile.spec.op import Op

OP = find_op("KVAppendEvict")
LARGEST = float(np.finfo(np.float32).max)
TYPE_BINDINGS = [{"T": dtype} for dtype in OP.type_constraints["T"]]


def oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    sinks, recent, window = attributes["sinks"], attributes["recent"], attributes["window"]
    out = {f"{name}_out": x[name].copy() for name in ("k", "v", "score", "position")}
    b, h, c = x["score"].shape
    s = x["new_position"].shape[1]
    out["slot"], out["length"] = np.full((b, h, s), -1, np.int32), np.zeros(b, np.int64)
    for sequence, head in np.ndindex(b, h):
        tokens = [(position, score, slot) for slot, (position, score) in enumerate(zip(
            x["position"][sequence, head], x["score"][sequence, head], strict=True)) if position >= 0]  # fmt: skip
        tokens += [(position, score, c + i) for i, (position, score) in enumerate(zip(
            x["new_position"][sequence], x["new_score"][sequence, head], strict=True)) if position >= 0]  # fmt: skip
        now = int(x["new_position"][sequence].max())
        unseen = {token[2] for token in tokens if window and token[0] <= now - window}
        tokens = [token for token in tokens if token[2] not in unseen]
        candidates = [token for token in tokens if sinks <= token[0] <= now - recent]
        candidates.sort(key=lambda token: (-np.inf if np.isnan(token[1]) else min(token[1], LARGEST), token[2]))
        evicted = {token[2] for token in candidates[: max(0, len(tokens) - c)]}
        free = [slot for slot in range(c) if x["position"][sequence, head, slot] < 0 or slot in evicted | unseen]
        arriving = [token for token in tokens if token[2] >= c and token[2] not in evicted]
        for slot, (position, score, number) in zip(free, arriving, strict=False):
            i = number - c
            out["slot"][sequence, head, i] = slot
            out["k_out"][sequence, head, slot] = x["new_k"][sequence, head, i]
            out["v_out"][sequence, head, slot] = x["new_v"][sequence, head, i]
            out["score_out"][sequence, head, slot] = score
            out["position_out"][sequence, head, slot] = position
        if head == 0:
            out["length"][sequence] = min(len(tokens) - len(evicted), c)
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int]]:
    sinks, recent = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    capacity = draw(st.integers(sinks + recent, sinks + recent + 9))
    sizes = {name: draw(st.integers(1, high)) for name, high in {"B": 3, "H": 3, "S": 7, "D": 9, "E": 9}.items()}
    window = draw(st.one_of(st.just(0), st.integers(1, capacity + 8)))
    return {**sizes, "C": capacity}, {"sinks": sinks, "recent": recent, "window": window}


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
def test_all_implementations_write_the_slots_of_the_oracle(
    implementations: OpImplementations, type_bindings: dict[str, str]
) -> None:
    implementations.assert_random_cases_match(OP, oracle, cases(), counts=(13, 4), type_bindings=type_bindings)


SPECIAL_SCORES = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, LARGEST, -LARGEST, 1.0]


@pytest.mark.parametrize("chunk", [1, 4])
def test_special_float_scores_are_ordered(implementations: OpImplementations, chunk: int) -> None:
    dims = {"B": 4, "H": 4, "C": 8, "S": chunk, "D": 4, "E": 4}
    attributes = {"sinks": 1, "recent": 2, "window": 0}
    for seed in range(4):
        random = np.random.default_rng(seed)
        inputs = op_inputs(OP, dims, attributes, random)
        inputs["score"] = random.choice(SPECIAL_SCORES, size=inputs["score"].shape)
        inputs["new_score"] = random.choice(SPECIAL_SCORES, size=inputs["new_score"].shape)
        type_bindings = {"T": "float16"}
        implementations.assert_matches(OP, oracle, attributes=attributes, type_bindings=type_bindings, inputs=inputs)


POSITIONS = np.array([0, 1, 2, 3, 4, -1, np.iinfo(np.int32).min, np.iinfo(np.int32).max], np.int32)


def inputs_without_victims(random: np.random.Generator, dims: dict[str, int], attributes: dict[str, int]) -> dict[str, Any]:
    """Return a step with repeated, unordered positions, so that there may be fewer eviction candidates than surplus tokens."""
    inputs = op_inputs(OP, dims, attributes, random)
    for name in ("position", "new_position"):
        shape = inputs[name].shape
        repeated = random.choice(POSITIONS[POSITIONS >= 0], size=(shape[0], *[1] * (len(shape) - 1)))
        inputs[name] = np.where(random.random(shape) < 0.3, random.choice(POSITIONS, size=shape), repeated).astype(np.int32)
    return inputs


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_tokens_without_a_slot_are_dropped(implementations: OpImplementations, dtype: str) -> None:
    dropped = 0

    @settings(max_examples=examples(13 if dtype == "float32" else 4))
    @given(case=cases(), seed=st.integers(0, 2**32 - 1))
    def check(case: tuple[dict[str, int], dict[str, int]], seed: int) -> None:
        nonlocal dropped
        dims, attributes = case
        inputs = inputs_without_victims(np.random.default_rng(seed), dims, attributes)
        dropped += int((oracle(inputs, attributes)["slot"] < 0).sum())
        implementations.assert_matches(OP, oracle, attributes=attributes, type_bindings={"T": dtype}, inputs=inputs)

    check()
    assert dropped > 0


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_full_cache_without_an_eviction_candidate_is_unchanged(implementations: OpImplementations, chunk: int) -> None:
    """All tokens of a sequence have the same position, so each of them is the newest; the last sequence receives padding."""
    dims, attributes = {"B": 4, "H": 2, "C": 5, "S": chunk, "D": 2, "E": 3}, {"sinks": 0, "recent": 1, "window": 0}

    def check_outputs(inputs: Arrays, outputs: Arrays) -> str | None:
        same = all(np.array_equal(outputs[f"{name}_out"], inputs[name]) for name in ("k", "v", "score", "position"))
        return None if same and (outputs["slot"] == -1).all() and (outputs["length"] == 5).all() else "the cache was modified"

    inputs = op_inputs(OP, dims, attributes)
    for name, last in (("position", 7), ("new_position", np.iinfo(np.int32).min)):
        positions = np.array([0, 7, np.iinfo(np.int32).max, last], np.int32)
        inputs[name] = np.broadcast_to(positions.reshape(4, *[1] * (inputs[name].ndim - 1)), inputs[name].shape)
    type_bindings = {"T": "float32"}
    implementations.assert_matches(
        OP, oracle, attributes=attributes, type_bindings=type_bindings, inputs=inputs, output_check=check_outputs
    )


def test_scores_equal_to_positions_make_a_sliding_window_with_sinks(implementations: OpImplementations) -> None:
    """After many steps the cache contains exactly the sinks and the most recent tokens."""
    sinks, window = 2, 3
    state = {
        "k": np.zeros((1, 1, 5, 2)), "v": np.zeros((1, 1, 5, 2)),
        "score": np.zeros((1, 1, 5)), "position": np.full((1, 1, 5), -1, np.int32),
    }  # fmt: skip
    attributes, type_bindings = {"sinks": sinks, "recent": 1, "window": 0}, {"T": "float32"}
    for now in range(12):
        row = np.full((1, 1, 1, 2), float(now))
        step = {"new_k": row, "new_v": -row, "new_score": row[..., 0], "new_position": np.array([[now]], np.int32)}
        inputs = {**state, **step}
        implementations.assert_matches(OP, oracle, attributes=attributes, type_bindings=type_bindings, inputs=inputs)
        out = implementations.references.run(OP, type_bindings, attributes, inputs)
        state = {name: out[f"{name}_out"] for name in state}
        held = sorted(position for position in state["position"].ravel() if position >= 0)
        assert held == sorted({*range(min(now + 1, sinks)), *range(max(0, now + 1 - window), now + 1)})
        assert (state["k"][0, 0, :, 0][state["position"][0, 0] >= 0] == state["position"][state["position"] >= 0]).all()


def test_tokens_behind_the_window_leave_before_any_other(implementations: OpImplementations) -> None:
    """A cache of at least `window` slots never loses a token in the window, whatever the scores; sinks leave with it."""
    window, slots = 4, 5
    state = {
        "k": np.zeros((1, 2, slots, 1)), "v": np.zeros((1, 2, slots, 1)),
        "score": np.zeros((1, 2, slots)), "position": np.full((1, 2, slots), -1, np.int32),
    }  # fmt: skip
    attributes, type_bindings = {"sinks": 2, "recent": 1, "window": window}, {"T": "float32"}
    random, now = np.random.default_rng(0), -1
    for count in (1, 1, 3, 1, 7, 2, 1, 1, 4, 1, 1, 1, 1):
        positions = now + 1 + np.arange(count)
        now += count
        rows = np.broadcast_to(positions.reshape(1, 1, count, 1), (1, 2, count, 1)).astype(float)
        scores = random.normal(size=(1, 2, count)) - 9 * positions
        step = {"new_k": rows, "new_v": -rows, "new_score": scores, "new_position": positions[None].astype(np.int32)}
        inputs = {**state, **step}
        implementations.assert_matches(OP, oracle, attributes=attributes, type_bindings=type_bindings, inputs=inputs)
        out = implementations.references.run(OP, type_bindings, attributes, inputs)
        state = {name: out[f"{name}_out"] for name in state}
        seen = set(range(max(0, now + 1 - window), now + 1))
        assert all(seen <= set(head) for head in state["position"][0].tolist())


MUTANTS = {
    "KVAppendEvict": {
        "kernel": {
            "tl.where(held_at <= unseen_until, -1, held_at)": "held_at",
            "tl.where(new_at <= unseen_until, -1, new_at)": "new_at",
            "tl.where(now >= WINDOW, now - WINDOW, -1)": "tl.where(now >= WINDOW, now - WINDOW + 1, -1)",
            "if WINDOW > 0:": "if WINDOW >= 0:",
            "newest_old = now - RECENT": "newest_old = now + RECENT",
            "sort_key(new_worth, slots + s)": "sort_key(new_worth, s)",
            "(held_at >= SINKS) & (held_at <= newest_old)": "(held_at <= newest_old)",
            "(held_at >= SINKS) & (held_at <= now - RECENT)": "(held_at <= now - RECENT)",
            "tl.where(empty, c.to(tl.int64), key)": (
                "key",
                "tl.where(empty, slots - c.to(tl.int64), key)",
            ),
            "placed = (now >= 0) & (lowest < KEY_UPPER_BOUND)": (
                "placed = lowest < KEY_UPPER_BOUND",
                "placed = now >= 0",
            ),
            "axis=0) - slots": "axis=0) - slots - 1",
            "mask=(d < D) & (to >= 0)": "mask=d < D",
            "keys, mask=(d < D) & placed": "keys, mask=d < D",
            "to) * E + d, values, mask=(d < E) & (to >= 0)": "to) * D + d, values, mask=(to >= 0)",
            "left = tl.minimum(held + placed.to(tl.int32), slots)": (
                "left = held + placed.to(tl.int32)",
                "left = held",
                "left = slots",
            ),
            "left = slots + tl.minimum(surplus, 0)": (
                "left = slots + surplus",
                "left = slots",
                "left = held",
            ),
            "(worth, c), KEY_UPPER_BOUND)\n        new_key": "(worth, c), KEY_UPPER_BOUND - 1)\n        new_key",
            "sort_key(new_worth, slots + s), KEY_UPPER_BOUND)": "sort_key(new_worth, slots + s), KEY_UPPER_BOUND - 1)",
            "placed = arrives & (arrival_rank < room)": (
                "placed = arrives",
                "placed = arrives & (arrival_rank <= room)",
            ),
        },
        "reference": {
            "op.Sub(now, op.Constant(value_int=window))": "op.Sub(now, op.Constant(value_int=recent))",
            "op.Where(op.LessOrEqual(at, unseen_until), op.Constant(value_int=-1), at)": "op.Identity(at)",
            "op.Greater(op.Constant(value_int=window), op.Constant(value_int=0))": (
                "op.GreaterOrEqual(op.Constant(value_int=window), op.Constant(value_int=0))"
            ),
            "op.TopK(worth, chunk, axis=2, largest=0": "op.TopK(worth, chunk, axis=2, largest=1",
            "op.Sub(now, op.Constant(value_int=recent))": "op.Add(now, op.Constant(value_int=recent))",
            "op.Constant(value_int=sinks)": "op.Constant(value_int=0)",
            "op.Add(op.Where(placed, rank, first), op.Constant(value_int=1))": "op.Where(placed, rank, first)",
            "op.IsNaN(worth)": "op.IsInf(worth)",
            "op.And(op.Less(rank, surplus), op.Less(lowest, op.Constant(value_float=INF)))": "op.Less(rank, surplus)",
            "op.Less(lowest, op.Constant(value_float=INF))": "op.LessOrEqual(lowest, op.Constant(value_float=INF))",
            "op.Less(rank, surplus)": "op.LessOrEqual(rank, surplus)",
            "op.And(op.Greater(arrives, ": "op.And(op.Greater(total, ",
            "op.Less(target, capacity))": (
                "op.LessOrEqual(target, capacity))",
                "op.LessOrEqual(target, total))",
            ),
            "number), chunk, axis=2, largest=0": "number), chunk, axis=2, largest=1",
            "op.Mul(stays, total)": "op.Mul(stays, chunk)",
            "op.Min(tokens, capacity)": (
                "tokens",
                "op.Min(capacity, capacity)",
            ),
        },
    },
}


def mutation_cases(op: Op) -> Iterator[OpCase]:
    """Yield steps that cover all branches."""
    ordinary, without_victims = [(1, 1, 0)] * 4 + [(4, 3, 0)] * 3, [(1, 1, 0), (4, 1, 0), (4, 1, 0)]
    windowed = [(1, 1, 5), (1, 2, 3), (4, 3, 2), (4, 1, 5), (4, 2, 7)]
    has_victims = [True] * len(ordinary) + [False] * len(without_victims) + [True] * len(windowed)
    for seed, (chunk, recent, window) in enumerate(ordinary + without_victims + windowed):
        dims = {"B": 3, "H": 2, "C": 6, "S": chunk, "D": 3, "E": 5}
        attributes = {"sinks": 2, "recent": recent, "window": window}
        random = np.random.default_rng(seed)
        if has_victims[seed]:
            inputs = op_inputs(op, dims, attributes, random)
            inputs["new_position"][0], inputs["position"][0, :, -1] = -1, -1  # no new tokens for a cache with free slots
        else:
            inputs = inputs_without_victims(random, dims, attributes)
            inputs["position"][0], inputs["new_position"][0] = 7, [-1, 7, 7, 7][:chunk]  # no slot for any new token
            inputs["position"][1], inputs["new_position"][1] = [7, 3, 7, 7, 7, 7], 7  # one slot, for the first new token
        inputs["score"][..., 1::3] = np.nan
        yield OpCase(inputs=inputs, attributes=attributes)


def test_the_unmodified_op_matches_the_oracle(implementations: OpImplementations) -> None:
    assert implementations.find_mismatch(OP, oracle, mutation_cases(OP)) is None


test_mutants_are_detected = mutant_test(oracle_comparison(oracle, mutation_cases), MUTANTS)


def test_unsupported_inputs_are_rejected() -> None:
    dims = {"B": 1, "H": 1, "C": 5, "S": 1, "D": 4, "E": 4}
    with pytest.raises(ShapeError, match=r"needs sinks \+ recent <= C, and here C = 5, recent = 4, sinks = 2"):
        Specialization(OP, {"T": "float32"}, {"sinks": 2, "recent": 4, "window": 0}, dims)
    with pytest.raises(ShapeError, match=r"C is 40000, and must be in \[1, 32768\]"):
        Specialization(OP, {"T": "float32"}, {"sinks": 2, "recent": 4, "window": 0}, {**dims, "C": 40000})
    with pytest.raises(UsageError, match="needs its attribute `recent`"):
        Specialization(OP, {"T": "float32"}, {"sinks": 2}, dims)
    with pytest.raises(ShapeError, match="T is float64"):
        Specialization(OP, {"T": "float64"}, {"sinks": 2, "recent": 2, "window": 0}, dims)
