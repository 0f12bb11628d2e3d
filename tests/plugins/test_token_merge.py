"""TokenMerge and TokenUnmerge against loops over tokens: what stays exact, padding, sums that are no number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.op_implementations import Arrays, Attributes, OpImplementations

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.kernels import Specialization
from ryzen_compile.ops.equivalence import cast_inputs
from ryzen_compile.registry import find_op
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import Op

MERGE, UNMERGE = find_op("TokenMerge"), find_op("TokenUnmerge")
ELEMENTS = [{"T": element} for element in MERGE.type_constraints["T"]]


def merge_oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    b, n, d = x["x"].shape
    slots = n - int(attributes["merged"])
    out = {"y": np.zeros((b, slots, d)), "size_out": np.zeros((b, slots))}
    for sequence, slot in np.ndindex(b, slots):
        sizes = x["size"][sequence]
        tokens = [t for t in range(n) if x["target"][sequence, t] == slot and 2.0**-64 <= sizes[t] <= 2.0**64]
        total = sum(sizes[t] for t in tokens)
        out["size_out"][sequence, slot] = total
        if len(tokens) == 1:
            out["y"][sequence, slot] = x["x"][sequence, tokens[0]]
        for at in range(d if len(tokens) > 1 else 0):
            parts = [sizes[t] * x["x"][sequence, t, at] for t in tokens]
            out["y"][sequence, slot, at] = sum(parts) / total if all(abs(part) < 2.0**96 for part in parts) else np.nan
    return out


def unmerge_oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    b, n = x["target"].shape
    out = np.empty((b, n, x["y"].shape[2]), x["y"].dtype)
    for sequence, t in np.ndindex(b, n):
        out[sequence, t] = x["y"][sequence, min(max(int(x["target"][sequence, t]), 0), x["y"].shape[1] - 1)]
    return {"x": out}


def each_life(
    lives: OpImplementations, op: Op, elements: dict[str, str], attributes: Attributes, inputs: Arrays
) -> list[Arrays]:
    """Return what the reference and every tactic of the kernel make of `inputs`."""
    given = cast_inputs(op, elements, inputs)
    known = op.bind_dims({name: array.shape for name, array in given.items()}, attributes)
    sizes = {name: size for name, size in known.items() if name not in attributes}
    assert op.kernel is not None
    tactics = [Specialization(op, elements, attributes, sizes, tactic) for tactic in range(len(op.kernel.tactics))]
    found: list[Arrays] = [lives.references.run(op, elements, attributes, given)]
    return found + [lives.interpreter.run(instance, given) for instance in tactics]


@st.composite
def merges(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int]]:
    tokens = draw(st.integers(1, 20))
    dims = {"B": draw(st.integers(1, 3)), "N": tokens, "D": draw(st.sampled_from([1, 3, 8, 600]))}
    return dims, {"merged": draw(st.integers(0, tokens - 1))}


@pytest.mark.parametrize("elements", ELEMENTS, ids=str)
def test_every_life_merges_as_the_oracle_does(lives: OpImplementations, elements: dict[str, str]) -> None:
    @settings(max_examples=25 if elements["T"] == "float32" else 8)
    @given(case=merges(), seed=st.integers(0, 2**32))
    def check(case: tuple[dict[str, int], dict[str, int]], seed: int) -> None:
        dims, attributes = case
        assert lives.check(MERGE, merge_oracle, dims=dims, attributes=attributes, type_bindings=elements, seed=seed) is None

    check()


@pytest.mark.parametrize("tokens", [64, 65, 200])
def test_tokens_of_many_groups_and_slots_of_many_blocks(lives: OpImplementations, tokens: int) -> None:
    dims, attributes, elements = {"B": 2, "N": tokens, "D": 1030}, {"merged": tokens // 2}, {"T": "float16"}
    random = np.random.default_rng(tokens)
    assert MERGE.make_inputs is not None
    inputs = dict(MERGE.make_inputs(random, dims, attributes))
    inputs["target"] = random.permuted(inputs["target"], axis=1)  # from the order of time to none
    assert lives.check(MERGE, merge_oracle, dims=dims, attributes=attributes, type_bindings=elements, inputs=inputs) is None


@pytest.mark.parametrize("elements", ELEMENTS, ids=str)
def test_strange_values_sizes_and_targets_have_a_rule(lives: OpImplementations, elements: dict[str, str]) -> None:
    wide = elements["T"] != "float16"
    values = [np.nan, np.inf, -np.inf, 0.0, -0.0, 6e-8, 1e-45, 1.0, 3.0, -2.0, *([2.0**95, -(2.0**96), 3e38] if wide else [])]
    for seed in range(6):
        random = np.random.default_rng(seed)
        x = np.where(random.random((2, 24, 3)) < 0.2, random.choice(values, size=(2, 24, 3)), random.normal(size=(2, 24, 3)))
        size = random.choice([1.0, 1.0, 2.0, 1e-9, 0.0, -0.0, -1.0, np.nan, np.inf, 1e-30, 1e30, 2.0**64], size=(2, 24))
        target = random.integers(-2, 18, size=(2, 24), dtype=np.int32)
        target[0, 0], target[0, 1] = -(2**31), 2**31 - 1
        inputs = {"x": x, "size": size, "target": target}
        dims, attributes = {"B": 2, "N": 24, "D": 3}, {"merged": 9}
        assert lives.check(MERGE, merge_oracle, dims=dims, attributes=attributes, type_bindings=elements, inputs=inputs) is None


@pytest.mark.parametrize("elements", ELEMENTS, ids=str)
def test_without_padding_and_with_nothing_merged_the_way_there_and_back_is_the_identity(
    lives: OpImplementations, elements: dict[str, str]
) -> None:
    random = np.random.default_rng(0)
    tiny = 6e-8 if elements["T"] == "bfloat16" else 1e-40  # Triton's interpreter flushes what is below normal in bfloat16
    values = random.choice([0.0, -0.0, 6e-8, tiny, -3.0, 60000.0, 1 / 3], size=(2, 9, 5))
    inputs = {
        "x": values,
        "size": random.integers(1, 50, size=(2, 9)).astype(np.float64),
        "target": np.tile(np.arange(9, dtype=np.int32), (2, 1)),
    }
    x = values.astype(numpy_dtype(elements["T"]))
    for there in each_life(lives, MERGE, elements, {"merged": 0}, inputs):
        assert there["y"].tobytes() == x.tobytes()
        assert (there["size_out"] == inputs["size"]).all()
        for back in each_life(lives, UNMERGE, elements, {}, {"y": there["y"], "target": inputs["target"]}):
            assert back["x"].tobytes() == x.tobytes()


@pytest.mark.parametrize("elements", ELEMENTS, ids=str)
def test_who_is_alone_in_a_slot_and_who_shares_it_with_padding_keeps_every_bit(
    lives: OpImplementations, elements: dict[str, str]
) -> None:
    """49 * x / 49 is not x in float32; and padding holds what would spoil every sum."""
    random = np.random.default_rng(0)
    x = random.normal(size=(1, 12, 33))
    x[0, 8:] = random.choice([np.nan, np.inf, -np.inf, 6e4], size=(4, 33))
    size = np.array([[49.0] * 6 + [2.0, 3.0] + [0.0] * 4])
    target = np.array([[0, 1, 2, 3, 4, 5, 6, 6, 0, 0, 6, 7]], np.int32)
    given = x.astype(numpy_dtype(elements["T"]))
    for found in each_life(lives, MERGE, elements, {"merged": 4}, {"x": x, "size": size, "target": target}):
        assert found["y"][0, :6].tobytes() == given[0, :6].tobytes()
        mean = (2 * given[0, 6].astype(np.float64) + 3 * given[0, 7].astype(np.float64)) / 5
        assert np.abs(found["y"][0, 6].astype(np.float64) - mean).max() < 0.03
        assert (found["y"][0, 7] == 0).all()
        assert found["size_out"].tolist() == [[49.0] * 6 + [5.0, 0.0]]


def test_no_token_is_lost(lives: OpImplementations) -> None:
    """The sizes of all slots add up to those of all tokens, and so do the weighted rows."""
    dims, attributes, elements = {"B": 3, "N": 40, "D": 4}, {"merged": 17}, {"T": "float32"}
    assert MERGE.make_inputs is not None
    inputs = dict(MERGE.make_inputs(np.random.default_rng(0), dims, attributes))
    inputs["x"] = np.where(np.isfinite(inputs["x"]), inputs["x"], 0.0)
    for found in each_life(lives, MERGE, elements, attributes, inputs):
        assert (found["size_out"].sum(axis=1) == inputs["size"].sum(axis=1)).all()
        before = (inputs["x"] * inputs["size"][..., None]).sum(axis=1)
        after = (found["y"] * found["size_out"][..., None]).sum(axis=1)
        assert np.abs(before - after).max() < 1e-3


def test_sequences_do_not_know_of_each_other(lives: OpImplementations) -> None:
    dims, attributes, elements = {"B": 4, "N": 30, "D": 520}, {"merged": 11}, {"T": "float16"}
    assert MERGE.make_inputs is not None
    inputs = MERGE.make_inputs(np.random.default_rng(0), dims, attributes)
    order = [2, 0, 3, 1]
    straight = each_life(lives, MERGE, elements, attributes, inputs)
    turned = each_life(lives, MERGE, elements, attributes, {name: array[order] for name, array in inputs.items()})
    for one, other in zip(straight, turned, strict=True):
        assert one["y"][order].tobytes() == other["y"].tobytes()
        assert one["size_out"][order].tobytes() == other["size_out"].tobytes()


@pytest.mark.parametrize("element", UNMERGE.type_constraints["T"])
def test_every_life_unmerges_as_the_oracle_does(lives: OpImplementations, element: str) -> None:
    depths = st.sampled_from([1, 3, 8, 600, 1030])
    sizes = {"B": st.integers(1, 3), "M": st.integers(1, 12), "N": st.integers(1, 20), "D": depths}

    @settings(max_examples=10)
    @given(dims=st.fixed_dictionaries(sizes), seed=st.integers(0, 2**32))
    def check(dims: dict[str, int], seed: int) -> None:
        assert UNMERGE.make_inputs is not None
        random = np.random.default_rng(seed)
        inputs = dict(UNMERGE.make_inputs(random, dims, {}))
        inputs["target"] = np.where(random.random(inputs["target"].shape) < 0.1, random.choice([-1, 2**31 - 1, -(2**31)],
                                    size=inputs["target"].shape), inputs["target"])  # fmt: skip
        assert (
            lives.check(UNMERGE, unmerge_oracle, dims=dims, attributes={}, type_bindings={"T": element}, inputs=inputs) is None
        )

    check()


def test_unmerging_moves_bits(lives: OpImplementations) -> None:
    y = np.array([[[np.nan, -0.0], [np.inf, 1e-40], [6e-8, -np.inf]]])
    target = np.array([[2, 0, 0, 1]], np.int32)
    for element in ("float32", "float16", "bfloat16"):
        given = y.astype(numpy_dtype(element))
        for found in each_life(lives, UNMERGE, {"T": element}, {}, {"y": y, "target": target}):
            assert found["x"].tobytes() == given[:, target[0]].tobytes()


MERGE_MUTANTS = [
    ("kernel", "to[None, :] == slot[:, None]) & real[None, :]", "to[None, :] == slot[:, None])"),
    ("kernel", "tl.where((count > 1)[:, None], mean, total)", "mean"),
    ("kernel", "tl.where((count == 0)[:, None], row, held + part)", "tl.where((count == 0)[:, None], part, held + part)"),
    ("kernel", "first = total * weight[:, None]", "first = total"),
    ("kernel", "mine & (n[None, :] > pick[:, None])", "mine & (n[None, :] > pick[:, None] + 1)"),
    ("kernel", "(visited > 0) & (g > group)", "(visited > 0) & (g > group + 1)"),
    ("kernel", "(goes_to < SLOTS)", "(goes_to < 1)"),
    ("kernel", "weight += share", "weight += found.to(tl.float32)"),
    ("kernel", "tl.where(tl.abs(part) < TOO_LARGE, part, float(\"nan\"))", "part"),
    ("kernel", "& (tl.program_id(2) == 0)", "& (tl.program_id(2) == 9)"),
    ("kernel", "d = tl.program_id(2) * BLOCK_D", "d = 0 * BLOCK_D"),
    ("reference", "op.Equal(count, one)", "op.LessOrEqual(count, one)"),
    ("reference", "op.Where(real, size, zero)", "op.Where(real, one, zero)"),
    ("reference", "op.Less(total, op.Constant(value_float=POISONED))", "op.Less(zero, one)"),
    ("reference", "op.Where(op.Equal(count, one), first, means)", "means"),
    ("reference", "op.Where(op.Less(op.Abs(part), ", "op.Where(op.Less(part, "),
    ("reference", "op.Constant(value_int=merged)", "op.Constant(value_int=0)"),
]  # fmt: skip
UNMERGE_MUTANTS = [
    ("kernel", "slot = tl.minimum(tl.maximum(slot, 0), slots - 1)", "slot = tl.maximum(slot, 0)"),
    ("kernel", "(sequence * slots + slot)", "(sequence * tokens + slot)"),
    ("kernel", "d = tl.program_id(2) * BLOCK_D", "d = 0 * BLOCK_D"),
    ("reference", "op.Shape(y, start=1, end=2)", "op.Shape(target, start=1, end=2)"),
    ("reference", "op.Constant(value_ints=[0])", "op.Constant(value_ints=[1])"),
    ("reference", "op.Min(op.Cast(target, to=INT64.dtype), end)", "op.Cast(target, to=INT64.dtype)"),
]


@pytest.mark.parametrize(("part", "old", "new"), MERGE_MUTANTS)
def test_a_mutant_of_merging_is_noticed(lives: OpImplementations, part: str, old: str, new: str) -> None:
    attributes = {"merged": 60}
    cases = []
    for dims in ({"B": 2, "N": 200, "D": 3}, {"B": 1, "N": 62, "D": 1030}):
        assert MERGE.make_inputs is not None
        random = np.random.default_rng(0)
        inputs = dict(MERGE.make_inputs(random, dims, attributes))
        inputs["target"][:, 3::5] = random.permuted(inputs["target"][:, 3::5], axis=1)
        inputs["x"][0, 60, 1], inputs["x"][0, 61, 0] = 1e30, -1e30
        inputs["size"][0, 60:62], inputs["target"][0, 60:62] = 1.0, 1
        cases.append((dims, inputs))

    def check(op: Any) -> str | None:
        for dims, inputs in cases:
            said = lives.check(
                op, merge_oracle, dims=dims, attributes=attributes, type_bindings={"T": "float32"}, inputs=inputs
            )
            if said is not None:
                return said
        return None

    assert check(MERGE) is None
    assert lives.detects_mutation(MERGE, part, old, new, check)


@pytest.mark.parametrize(("part", "old", "new"), UNMERGE_MUTANTS)
def test_a_mutant_of_unmerging_is_noticed(lives: OpImplementations, part: str, old: str, new: str) -> None:
    dims = {"B": 2, "M": 5, "N": 9, "D": 1030}
    assert UNMERGE.make_inputs is not None
    inputs = dict(UNMERGE.make_inputs(np.random.default_rng(0), dims, {}))
    inputs["target"][:, 2], inputs["target"][:, 4] = -3, 7

    def check(op: Any) -> str | None:
        return lives.check(op, unmerge_oracle, dims=dims, attributes={}, type_bindings={"T": "int8"}, inputs=inputs)

    assert check(UNMERGE) is None
    assert lives.detects_mutation(UNMERGE, part, old, new, check)


def test_what_they_cannot_do_is_refused() -> None:
    dims = {"B": 1, "N": 6, "D": 4}
    with pytest.raises(ShapeError, match="needs merged < N, and here N = 6, merged = 6"):
        Specialization(MERGE, {"T": "float16"}, {"merged": 6}, dims)
    with pytest.raises(ShapeError, match=r"N is 20000, and must be in \[1, 16384\]"):
        Specialization(MERGE, {"T": "float16"}, {"merged": 6}, {**dims, "N": 20000})
    with pytest.raises(UsageError, match=r"`merged` is -1, and must be in \[0, 16383\]"):
        Specialization(MERGE, {"T": "float16"}, {"merged": -1}, dims)
    with pytest.raises(ShapeError, match="T is int8"):
        Specialization(MERGE, {"T": "int8"}, {"merged": 1}, dims)
    with pytest.raises(ShapeError, match="T is float64"):
        Specialization(UNMERGE, {"T": "float64"}, {}, {**dims, "M": 3})
    with pytest.raises(ShapeError, match=r"M is 0, and must be in \[1, 16384\]"):
        Specialization(UNMERGE, {"T": "int8"}, {}, {**dims, "M": 0})
