"""TokenMerge and TokenUnmerge against Python loops over tokens: exactness, padding and non-finite sums."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.op_implementations import Arrays, Attributes, OpCase, OpImplementations, mutant_test, op_inputs, oracle_comparison

from ryzen_compile.errors import ShapeError
from ryzen_compile.kernels import Specialization
from ryzen_compile.ops.equivalence import cast_inputs
from ryzen_compile.registry import find_op
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import Op

MERGE, UNMERGE = find_op("TokenMerge"), find_op("TokenUnmerge")
TYPE_BINDINGS = [{"T": dtype} for dtype in MERGE.type_constraints["T"]]


def merge_oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    b, n, d = x["x"].shape
    slots = len(x["slots"])
    out = {"y": np.zeros((b, slots, d)), "size_out": np.zeros((b, slots))}
    for sequence, slot in np.ndindex(b, slots):
        sizes = x["size"][sequence]
        tokens = [t for t in range(n) if x["target"][sequence, t] == slot and 2.0**-64 <= sizes[t] <= 2.0**64]
        total = sum(sizes[t] for t in tokens)
        out["size_out"][sequence, slot] = total
        if len(tokens) == 1:
            out["y"][sequence, slot] = x["x"][sequence, tokens[0]]
        for element in range(d if len(tokens) > 1 else 0):
            parts = [sizes[t] * x["x"][sequence, t, element] for t in tokens]
            out["y"][sequence, slot, element] = sum(parts) / total if all(abs(part) < 2.0**96 for part in parts) else np.nan
    return out


def unmerge_oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    b, n = x["target"].shape
    out = np.empty((b, n, x["y"].shape[2]), x["y"].dtype)
    for sequence, t in np.ndindex(b, n):
        out[sequence, t] = x["y"][sequence, min(max(int(x["target"][sequence, t]), 0), x["y"].shape[1] - 1)]
    return {"x": out}


def run_all(
    implementations: OpImplementations, op: Op, type_bindings: dict[str, str], attributes: Attributes, inputs: Arrays
) -> list[Arrays]:
    """Return the outputs of the reference and of every tactic of the kernel for `inputs`."""
    arrays = cast_inputs(op, type_bindings, inputs)
    bound = op.bind_dims({name: array.shape for name, array in arrays.items()}, attributes)
    sizes = {name: size for name, size in bound.items() if name not in attributes}
    assert op.kernel is not None
    specializations = [Specialization(op, type_bindings, attributes, sizes, tactic) for tactic in range(len(op.kernel.tactics))]
    outputs: list[Arrays] = [implementations.references.run(op, type_bindings, attributes, arrays)]
    return outputs + [implementations.interpreter.run(specialization, arrays) for specialization in specializations]


@st.composite
def merges(draw: st.DrawFn) -> tuple[dict[str, int], Attributes]:
    tokens = draw(st.integers(1, 20))
    dims = {"B": draw(st.integers(1, 3)), "N": tokens, "D": draw(st.sampled_from([1, 3, 8, 600]))}
    return {**dims, "M": draw(st.integers(1, tokens + 2))}, {}


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
def test_all_implementations_of_merge_match_the_oracle(
    implementations: OpImplementations, type_bindings: dict[str, str]
) -> None:
    implementations.assert_random_cases_match(MERGE, merge_oracle, merges(), counts=(13, 4), type_bindings=type_bindings)


@pytest.mark.parametrize("tokens", [64, 65, 200])
def test_tokens_of_many_groups_and_slots_of_many_blocks(implementations: OpImplementations, tokens: int) -> None:
    dims, type_bindings = {"B": 2, "N": tokens, "D": 1030, "M": tokens - tokens // 2}, {"T": "float16"}
    random = np.random.default_rng(tokens)
    inputs = op_inputs(MERGE, dims, {}, random)
    inputs["target"] = random.permuted(inputs["target"], axis=1)  # tokens of a slot in random order
    implementations.assert_matches(MERGE, merge_oracle, attributes={}, type_bindings=type_bindings, inputs=inputs)


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
def test_special_float_values_sizes_and_targets_follow_the_formula(
    implementations: OpImplementations, type_bindings: dict[str, str]
) -> None:
    wide_range = type_bindings["T"] != "float16"
    values = [
        np.nan,
        np.inf,
        -np.inf,
        0.0,
        -0.0,
        6e-8,
        1e-45,
        1.0,
        3.0,
        -2.0,
        *([2.0**95, -(2.0**96), 3e38] if wide_range else []),
    ]
    for seed in range(6):
        random = np.random.default_rng(seed)
        x = np.where(random.random((2, 24, 3)) < 0.2, random.choice(values, size=(2, 24, 3)), random.normal(size=(2, 24, 3)))
        size = random.choice([1.0, 1.0, 2.0, 1e-9, 0.0, -0.0, -1.0, np.nan, np.inf, 1e-30, 1e30, 2.0**64], size=(2, 24))
        target = random.integers(-2, 18, size=(2, 24), dtype=np.int32)
        target[0, 0], target[0, 1] = -(2**31), 2**31 - 1
        inputs = {"x": x, "size": size, "target": target, "slots": np.zeros(15, np.int32)}
        implementations.assert_matches(MERGE, merge_oracle, attributes={}, type_bindings=type_bindings, inputs=inputs)


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
def test_merge_and_unmerge_without_padding_and_merged_tokens_is_the_identity(
    implementations: OpImplementations, type_bindings: dict[str, str]
) -> None:
    random = np.random.default_rng(0)
    tiny = 6e-8 if type_bindings["T"] == "bfloat16" else 1e-40  # Triton's interpreter flushes subnormal bfloat16 to 0
    values = random.choice([0.0, -0.0, 6e-8, tiny, -3.0, 60000.0, 1 / 3], size=(2, 9, 5))
    inputs = {
        "x": values,
        "size": random.integers(1, 50, size=(2, 9)).astype(np.float64),
        "target": np.tile(np.arange(9, dtype=np.int32), (2, 1)),
        "slots": np.zeros(9, np.int32),
    }
    x = values.astype(numpy_dtype(type_bindings["T"]))
    for merged in run_all(implementations, MERGE, type_bindings, {}, inputs):
        assert merged["y"].tobytes() == x.tobytes()
        assert (merged["size_out"] == inputs["size"]).all()
        for unmerged in run_all(implementations, UNMERGE, type_bindings, {}, {"y": merged["y"], "target": inputs["target"]}):
            assert unmerged["x"].tobytes() == x.tobytes()


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
def test_a_single_real_token_of_a_slot_is_unchanged(implementations: OpImplementations, type_bindings: dict[str, str]) -> None:
    """49 * x / 49 is not exactly x in float32, and the padding contains NaN and infinities."""
    random = np.random.default_rng(0)
    x = random.normal(size=(1, 12, 33))
    x[0, 8:] = random.choice([np.nan, np.inf, -np.inf, 6e4], size=(4, 33))
    size = np.array([[49.0] * 6 + [2.0, 3.0] + [0.0] * 4])
    target = np.array([[0, 1, 2, 3, 4, 5, 6, 6, 0, 0, 6, 7]], np.int32)
    cast = x.astype(numpy_dtype(type_bindings["T"]))
    inputs = {"x": x, "size": size, "target": target, "slots": np.zeros(8, np.int32)}
    for outputs in run_all(implementations, MERGE, type_bindings, {}, inputs):
        assert outputs["y"][0, :6].tobytes() == cast[0, :6].tobytes()
        mean = (2 * cast[0, 6].astype(np.float64) + 3 * cast[0, 7].astype(np.float64)) / 5
        assert np.abs(outputs["y"][0, 6].astype(np.float64) - mean).max() < 0.03
        assert (outputs["y"][0, 7] == 0).all()
        assert outputs["size_out"].tolist() == [[49.0] * 6 + [5.0, 0.0]]


def test_sizes_and_weighted_rows_are_preserved(implementations: OpImplementations) -> None:
    """The sizes of all slots sum to the sizes of all tokens, and so do the weighted rows."""
    dims, type_bindings = {"B": 3, "N": 40, "D": 4, "M": 23}, {"T": "float32"}
    inputs = op_inputs(MERGE, dims, {})
    inputs["x"] = np.where(np.isfinite(inputs["x"]), inputs["x"], 0.0)
    for outputs in run_all(implementations, MERGE, type_bindings, {}, inputs):
        assert (outputs["size_out"].sum(axis=1) == inputs["size"].sum(axis=1)).all()
        before = (inputs["x"] * inputs["size"][..., None]).sum(axis=1)
        after = (outputs["y"] * outputs["size_out"][..., None]).sum(axis=1)
        assert np.abs(before - after).max() < 1e-3


def test_sequences_are_independent(implementations: OpImplementations) -> None:
    dims, type_bindings = {"B": 4, "N": 30, "D": 520, "M": 19}, {"T": "float16"}
    inputs = op_inputs(MERGE, dims, {})
    order = [2, 0, 3, 1]
    original = run_all(implementations, MERGE, type_bindings, {}, inputs)
    reordered = {name: array if name == "slots" else array[order] for name, array in inputs.items()}
    permuted = run_all(implementations, MERGE, type_bindings, {}, reordered)
    for expected, actual in zip(original, permuted, strict=True):
        assert expected["y"][order].tobytes() == actual["y"].tobytes()
        assert expected["size_out"][order].tobytes() == actual["size_out"].tobytes()


@pytest.mark.parametrize("dtype", UNMERGE.type_constraints["T"])
def test_all_implementations_of_unmerge_match_the_oracle(implementations: OpImplementations, dtype: str) -> None:
    depths = st.sampled_from([1, 3, 8, 600, 1030])
    sizes = {"B": st.integers(1, 3), "M": st.integers(1, 12), "N": st.integers(1, 20), "D": depths}

    @settings(max_examples=examples(5))
    @given(dims=st.fixed_dictionaries(sizes), seed=st.integers(0, 2**32))
    def check(dims: dict[str, int], seed: int) -> None:
        random = np.random.default_rng(seed)
        inputs = op_inputs(UNMERGE, dims, {}, random)
        inputs["target"] = np.where(random.random(inputs["target"].shape) < 0.1, random.choice([-1, 2**31 - 1, -(2**31)],
                                    size=inputs["target"].shape), inputs["target"])  # fmt: skip
        implementations.assert_matches(UNMERGE, unmerge_oracle, type_bindings={"T": dtype}, inputs=inputs)

    check()


def test_unmerge_copies_bits(implementations: OpImplementations) -> None:
    y = np.array([[[np.nan, -0.0], [np.inf, 1e-40], [6e-8, -np.inf]]])
    target = np.array([[2, 0, 0, 1]], np.int32)
    for dtype in ("float32", "float16", "bfloat16"):
        cast = y.astype(numpy_dtype(dtype))
        for outputs in run_all(implementations, UNMERGE, {"T": dtype}, {}, {"y": y, "target": target}):
            assert outputs["x"].tobytes() == cast[:, target[0]].tobytes()


MERGE_MUTANTS = {
    "TokenMerge": {
        "kernel": {
            "to[None, :] == slot[:, None]) & real[None, :]": "to[None, :] == slot[:, None])",
            "tl.where((count > 1)[:, None], mean, total)": "mean",
            "tl.where((count == 0)[:, None], row, held + part)": "tl.where((count == 0)[:, None], part, held + part)",
            "first = total * weight[:, None]": "first = total",
            "mine & (n[None, :] > pick[:, None])": "mine & (n[None, :] > pick[:, None] + 1)",
            "(visited > 0) & (g > group)": "(visited > 0) & (g > group + 1)",
            "(goes_to < SLOTS)": "(goes_to < 1)",
            "weight += share": "weight += found.to(tl.float32)",
            'tl.where(tl.abs(part) < TOO_LARGE, part, float("nan"))': "part",
            "& (tl.program_id(2) == 0)": "& (tl.program_id(2) == 9)",
            "d = tl.program_id(2) * BLOCK_D": "d = 0 * BLOCK_D",
        },
        "reference": {
            "op.Equal(count, one)": "op.LessOrEqual(count, one)",
            "op.Where(real, size, zero)": "op.Where(real, one, zero)",
            "op.Less(total, op.Constant(value_float=POISONED))": "op.Less(zero, one)",
            "op.Where(op.Equal(count, one), first, means)": "means",
            "op.Where(op.Less(op.Abs(part), ": "op.Where(op.Less(part, ",
            "op.Squeeze(op.Shape(slots))": "op.Squeeze(op.Shape(size, start=1, end=2))",
        },
    },
}
UNMERGE_MUTANTS = {
    "TokenUnmerge": {
        "kernel": {
            "slot = tl.minimum(tl.maximum(slot, 0), slots - 1)": "slot = tl.maximum(slot, 0)",
            "(sequence * slots + slot)": "(sequence * tokens + slot)",
            "d = tl.program_id(2) * BLOCK_D": "d = 0 * BLOCK_D",
        },
        "reference": {
            "op.Shape(y, start=1, end=2)": "op.Shape(target, start=1, end=2)",
            "op.Constant(value_ints=[0])": "op.Constant(value_ints=[1])",
            "op.Min(op.Cast(target, to=INT64.dtype), end)": "op.Cast(target, to=INT64.dtype)",
        },
    },
}


def merge_mutation_cases(op: Op) -> Iterator[OpCase]:
    for dims in ({"B": 2, "N": 200, "D": 3, "M": 140}, {"B": 1, "N": 62, "D": 1030, "M": 2}):
        random = np.random.default_rng(0)
        inputs = op_inputs(op, dims, {}, random)
        inputs["target"][:, 3::5] = random.permuted(inputs["target"][:, 3::5], axis=1)
        inputs["x"][0, 60, 1], inputs["x"][0, 61, 0] = 1e30, -1e30
        inputs["size"][0, 60:62], inputs["target"][0, 60:62] = 1.0, 1
        yield OpCase(inputs=inputs, attributes={})


test_mutants_of_merge_are_detected = mutant_test(oracle_comparison(merge_oracle, merge_mutation_cases), MERGE_MUTANTS)


def find_unmerge_mismatch(implementations: OpImplementations, op: Op) -> str | None:
    inputs = op_inputs(UNMERGE, {"B": 2, "M": 5, "N": 9, "D": 1030})
    inputs["target"][:, 2], inputs["target"][:, 4] = -3, 7
    return implementations.check(op, unmerge_oracle, type_bindings={"T": "int8"}, inputs=inputs)


test_mutants_of_unmerge_are_detected = mutant_test(find_unmerge_mismatch, UNMERGE_MUTANTS)


def test_unsupported_inputs_are_rejected() -> None:
    dims = {"B": 1, "N": 6, "D": 4, "M": 3}
    with pytest.raises(ShapeError, match=r"N is 20000, and must be in \[1, 16384\]"):
        Specialization(MERGE, {"T": "float16"}, {}, {**dims, "N": 20000})
    with pytest.raises(ShapeError, match="T is int8"):
        Specialization(MERGE, {"T": "int8"}, {}, dims)
    with pytest.raises(ShapeError, match="T is float64"):
        Specialization(UNMERGE, {"T": "float64"}, {}, dims)
    with pytest.raises(ShapeError, match=r"M is 0, and must be in \[1, 16384\]"):
        Specialization(UNMERGE, {"T": "int8"}, {}, {**dims, "M": 0})
