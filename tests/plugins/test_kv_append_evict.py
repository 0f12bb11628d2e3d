"""KVAppendEvict against a Python loop: which slots are taken, ties and padding included."""

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

OP = find_op("KVAppendEvict")
LARGEST = float(np.finfo(np.float32).max)
ELEMENTS = [{"T": element} for element in OP.type_constraints["T"]]


def oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    sinks, recent = attributes["sinks"], attributes["recent"]
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
        candidates = [token for token in tokens if sinks <= token[0] <= now - recent]
        candidates.sort(key=lambda token: (-np.inf if np.isnan(token[1]) else min(token[1], LARGEST), token[2]))
        evicted = {token[2] for token in candidates[: max(0, len(tokens) - c)]}
        free = [slot for slot in range(c) if x["position"][sequence, head, slot] < 0 or slot in evicted]
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
    return {**sizes, "C": capacity}, {"sinks": sinks, "recent": recent}


@pytest.mark.parametrize("elements", ELEMENTS, ids=str)
def test_every_life_takes_the_slots_that_the_oracle_takes(lives: OpImplementations, elements: dict[str, str]) -> None:
    @settings(max_examples=25 if elements["T"] == "float32" else 8)
    @given(case=cases(), seed=st.integers(0, 2**32 - 1))
    def check(case: tuple[dict[str, int], dict[str, int]], seed: int) -> None:
        dims, attributes = case
        assert lives.check(OP, oracle, dims=dims, attributes=attributes, type_bindings=elements, seed=seed) is None

    check()


HOSTILE = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, LARGEST, -LARGEST, 1.0]


@pytest.mark.parametrize("chunk", [1, 4])
def test_strange_scores_have_an_order(lives: OpImplementations, chunk: int) -> None:
    dims = {"B": 4, "H": 4, "C": 8, "S": chunk, "D": 4, "E": 4}
    attributes = {"sinks": 1, "recent": 2}
    assert OP.make_inputs is not None
    for seed in range(4):
        random = np.random.default_rng(seed)
        inputs = dict(OP.make_inputs(random, dims, attributes))
        inputs["score"] = random.choice(HOSTILE, size=inputs["score"].shape)
        inputs["new_score"] = random.choice(HOSTILE, size=inputs["new_score"].shape)
        elements = {"T": "float16"}
        assert lives.check(OP, oracle, dims=dims, attributes=attributes, type_bindings=elements, inputs=inputs) is None


ODD = np.array([0, 1, 2, 3, 4, -1, np.iinfo(np.int32).min, np.iinfo(np.int32).max], np.int32)


def crowded(random: np.random.Generator, dims: dict[str, int], attributes: dict[str, int]) -> dict[str, Any]:
    """Return a step whose positions repeat and know no order: there may be fewer tokens to evict than there are too many."""
    assert OP.make_inputs is not None
    inputs = dict(OP.make_inputs(random, dims, attributes))
    for name in ("position", "new_position"):
        shape = inputs[name].shape
        few = random.choice(ODD[ODD >= 0], size=(shape[0], *[1] * (len(shape) - 1)))
        inputs[name] = np.where(random.random(shape) < 0.3, random.choice(ODD, size=shape), few).astype(np.int32)
    return inputs


@pytest.mark.parametrize("element", ["float32", "int8"])
def test_tokens_that_find_no_slot_are_dropped(lives: OpImplementations, element: str) -> None:
    dropped = 0

    @settings(max_examples=25 if element == "float32" else 8)
    @given(case=cases(), seed=st.integers(0, 2**32 - 1))
    def check(case: tuple[dict[str, int], dict[str, int]], seed: int) -> None:
        nonlocal dropped
        dims, attributes = case
        inputs = crowded(np.random.default_rng(seed), dims, attributes)
        dropped += int((oracle(inputs, attributes)["slot"] < 0).sum())
        assert lives.check(OP, oracle, dims=dims, attributes=attributes, type_bindings={"T": element}, inputs=inputs) is None

    check()
    assert dropped > 0


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_full_cache_without_a_victim_stays_as_it_is(lives: OpImplementations, chunk: int) -> None:
    """All tokens of a sequence are of one position, so that each is the newest; the last sequence gets padding."""
    dims, attributes = {"B": 4, "H": 2, "C": 5, "S": chunk, "D": 2, "E": 3}, {"sinks": 0, "recent": 1}

    def judge(given_: Arrays, found: Arrays) -> str | None:
        same = all(np.array_equal(found[f"{name}_out"], given_[name]) for name in ("k", "v", "score", "position"))
        return None if same and (found["slot"] == -1).all() and (found["length"] == 5).all() else "something was written"

    assert OP.make_inputs is not None
    inputs = dict(OP.make_inputs(np.random.default_rng(0), dims, attributes))
    for name, last in (("position", 7), ("new_position", np.iinfo(np.int32).min)):
        at = np.array([0, 7, np.iinfo(np.int32).max, last], np.int32)
        inputs[name] = np.broadcast_to(at.reshape(4, *[1] * (inputs[name].ndim - 1)), inputs[name].shape)
    elements = {"T": "float32"}
    said = lives.check(OP, oracle, dims=dims, attributes=attributes, type_bindings=elements, inputs=inputs, output_check=judge)
    assert said is None


def test_a_ring_is_the_case_whose_scores_are_the_positions(lives: OpImplementations) -> None:
    """Sinks and a window: after many steps the cache holds the first tokens and the latest, and nothing else."""
    sinks, window = 2, 3
    state = {
        "k": np.zeros((1, 1, 5, 2)), "v": np.zeros((1, 1, 5, 2)),
        "score": np.zeros((1, 1, 5)), "position": np.full((1, 1, 5), -1, np.int32),
    }  # fmt: skip
    attributes, elements = {"sinks": sinks, "recent": 1}, {"T": "float32"}
    for now in range(12):
        row = np.full((1, 1, 1, 2), float(now))
        step = {"new_k": row, "new_v": -row, "new_score": row[..., 0], "new_position": np.array([[now]], np.int32)}
        dims = {"B": 1, "H": 1, "C": 5, "S": 1, "D": 2, "E": 2}
        given_ = {**state, **step}
        assert lives.check(OP, oracle, dims=dims, attributes=attributes, type_bindings=elements, inputs=given_) is None
        out = lives.references.run(OP, elements, attributes, given_)
        state = {name: out[f"{name}_out"] for name in state}
        held = sorted(position for position in state["position"].ravel() if position >= 0)
        assert held == sorted({*range(min(now + 1, sinks)), *range(max(0, now + 1 - window), now + 1)})
        assert (state["k"][0, 0, :, 0][state["position"][0, 0] >= 0] == state["position"][state["position"] >= 0]).all()


MUTANTS = [
    ("kernel", "newest_old = tl.max(new_at, axis=0) - RECENT", "newest_old = tl.max(new_at, axis=0) + RECENT"),
    ("kernel", "ordered(new_worth, slots + s)", "ordered(new_worth, s)"),
    ("kernel", "(held_at >= SINKS) & (held_at <= newest_old)", "(held_at <= newest_old)"),
    ("kernel", "(held_at >= SINKS) & (held_at <= now - RECENT)", "(held_at <= now - RECENT)"),
    ("kernel", "tl.where(empty, c.to(tl.int64), key)", "key"),
    ("kernel", "tl.where(empty, c.to(tl.int64), key)", "tl.where(empty, slots - c.to(tl.int64), key)"),
    ("kernel", "placed = (now >= 0) & (lowest < NONE)", "placed = lowest < NONE"),
    ("kernel", "axis=0) - slots", "axis=0) - slots - 1"),
    ("kernel", "mask=(d < D) & (to >= 0)", "mask=d < D"),
    ("kernel", "keys, mask=(d < D) & placed", "keys, mask=d < D"),
    (
        "kernel",
        "(row * slots + to) * E + d, values, mask=(d < E) & (to >= 0)",
        "(row * slots + to) * D + d, values, mask=(to >= 0)",
    ),
    ("kernel", "left = tl.minimum(held + placed.to(tl.int32), slots)", "left = held + placed.to(tl.int32)"),
    ("kernel", "left = tl.minimum(held + placed.to(tl.int32), slots)", "left = held"),
    ("kernel", "left = tl.minimum(held + placed.to(tl.int32), slots)", "left = slots"),
    ("kernel", "left = slots + tl.minimum(surplus, 0)", "left = slots + surplus"),
    ("kernel", "left = slots + tl.minimum(surplus, 0)", "left = slots"),
    ("kernel", "left = slots + tl.minimum(surplus, 0)", "left = held"),
    ("kernel", "placed = (now >= 0) & (lowest < NONE)", "placed = now >= 0"),
    ("kernel", "ordered(worth, c), NONE)\n        new_key", "ordered(worth, c), NONE - 1)\n        new_key"),
    ("kernel", "ordered(new_worth, slots + s), NONE)", "ordered(new_worth, slots + s), NONE - 1)"),
    ("kernel", "placed = arrives & (arrival_rank < room)", "placed = arrives"),
    ("kernel", "placed = arrives & (arrival_rank < room)", "placed = arrives & (arrival_rank <= room)"),
    ("reference", "op.TopK(worth, chunk, axis=2, largest=0", "op.TopK(worth, chunk, axis=2, largest=1"),
    ("reference", "op.Sub(now, op.Constant(value_int=recent))", "op.Add(now, op.Constant(value_int=recent))"),
    ("reference", "op.Constant(value_int=sinks)", "op.Constant(value_int=0)"),
    ("reference", "op.Add(op.Where(placed, rank, first), op.Constant(value_int=1))", "op.Where(placed, rank, first)"),
    ("reference", "op.IsNaN(worth)", "op.IsInf(worth)"),
    ("reference", "op.And(op.Less(rank, surplus), op.Less(lowest, op.Constant(value_float=INF)))", "op.Less(rank, surplus)"),
    ("reference", "op.Less(lowest, op.Constant(value_float=INF))", "op.LessOrEqual(lowest, op.Constant(value_float=INF))"),
    ("reference", "op.Less(rank, surplus)", "op.LessOrEqual(rank, surplus)"),
    ("reference", "op.And(op.Greater(arrives, ", "op.And(op.Greater(total, "),
    ("reference", "op.Less(target, capacity))", "op.LessOrEqual(target, capacity))"),
    ("reference", "op.Less(target, capacity))", "op.LessOrEqual(target, total))"),
    ("reference", "number), chunk, axis=2, largest=0", "number), chunk, axis=2, largest=1"),
    ("reference", "op.Mul(stays, total)", "op.Mul(stays, chunk)"),
    ("reference", "op.Min(tokens, capacity)", "tokens"),
    ("reference", "op.Min(tokens, capacity)", "op.Min(capacity, capacity)"),
]


def noticed(lives: OpImplementations, op: Any) -> str | None:
    """Return what is wrong with `op` in steps that reach all of it, or None."""
    ordinary, crowds = [(1, 1)] * 4 + [(4, 3)] * 3, [(1, 1), (4, 1), (4, 1)]
    for seed, (chunk, recent) in enumerate(ordinary + crowds):
        dims, attributes = {"B": 3, "H": 2, "C": 6, "S": chunk, "D": 3, "E": 5}, {"sinks": 2, "recent": recent}
        random = np.random.default_rng(seed)
        if seed < len(ordinary):
            inputs = op.draw(random, dims, attributes)
            inputs["new_position"][0], inputs["position"][0, :, -1] = -1, -1  # nothing new for a cache with room
        else:
            inputs = crowded(random, dims, attributes)
            inputs["position"][0], inputs["new_position"][0] = 7, [-1, 7, 7, 7][:chunk]  # no slot for any
            inputs["position"][1], inputs["new_position"][1] = [7, 3, 7, 7, 7, 7], 7  # one slot for the first
        inputs["score"][..., 1::3] = np.nan
        said = lives.check(op, oracle, dims=dims, attributes=attributes, type_bindings={"T": "float32"}, inputs=inputs)
        if said is not None:
            return said
    return None


def test_what_mutants_are_held_against_is_right(lives: OpImplementations) -> None:
    assert noticed(lives, OP) is None


@pytest.mark.parametrize(("part", "old", "new"), MUTANTS)
def test_a_mutant_is_noticed(lives: OpImplementations, part: str, old: str, new: str) -> None:
    assert lives.detects_mutation(OP, part, old, new, lambda op: noticed(lives, op))


def test_what_it_cannot_do_is_refused() -> None:
    dims = {"B": 1, "H": 1, "C": 5, "S": 1, "D": 4, "E": 4}
    with pytest.raises(ShapeError, match=r"needs sinks \+ recent <= C, and here C = 5, recent = 4, sinks = 2"):
        Specialization(OP, {"T": "float32"}, {"sinks": 2, "recent": 4}, dims)
    with pytest.raises(ShapeError, match=r"C is 40000, and must be in \[1, 32768\]"):
        Specialization(OP, {"T": "float32"}, {"sinks": 2, "recent": 4}, {**dims, "C": 40000})
    with pytest.raises(UsageError, match="needs its attribute `recent`"):
        Specialization(OP, {"T": "float32"}, {"sinks": 2}, dims)
    with pytest.raises(ShapeError, match="T is float64"):
        Specialization(OP, {"T": "float64"}, {"sinks": 2, "recent": 2}, dims)
