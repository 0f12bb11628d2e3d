"""TokenEnergy against Python loops over pairs: both sides of the margin, padding, zero and non-finite vectors."""

from __future__ import annotations

import math
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

OP = find_op("TokenEnergy")
TYPE_BINDINGS = [{"T": dtype} for dtype in OP.type_constraints["T"]]


def oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    margin, alpha = attributes["margin"], attributes["alpha"]
    energy = np.full(x["size"].shape, 2.0)
    for sequence, sizes in enumerate(x["size"]):
        real = [t for t, size in enumerate(sizes) if is_real_token(size)]
        for t in real:
            terms = [
                c if c >= margin else alpha * (math.exp(c - margin) - 1)
                for c in (cosine(x["metric"][sequence, t], x["metric"][sequence, s]) for s in real if s != t)
            ]
            energy[sequence, t] = sum(terms) / len(terms) if terms else 0.0
    return {"energy": energy}


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
def test_all_implementations_match_the_oracle(implementations: OpImplementations, type_bindings: dict[str, str]) -> None:
    """Cosines are multiples of 1 / D, so that no cosine is close to a margin that lies between two multiples."""
    sizes = {"B": 3, "N": 10, "D": 20}
    attributes = {"margin": st.sampled_from([-0.503, 0.007, 0.377, 0.905]), "alpha": st.sampled_from([0.0, 0.5, 1.0, 30.0])}

    cases = st.tuples(
        st.fixed_dictionaries({name: st.integers(1, high) for name, high in sizes.items()}), st.fixed_dictionaries(attributes)
    )
    implementations.assert_random_cases_match(OP, oracle, cases, counts=(13, 5), type_bindings=type_bindings)


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
@pytest.mark.parametrize("depth", [64, 200])
def test_many_tiles_and_rows_longer_than_a_block(
    implementations: OpImplementations, type_bindings: dict[str, str], depth: int
) -> None:
    random = np.random.default_rng(depth)
    center = random.normal(size=(1, 1, depth))
    metric = (center + random.normal(size=(1, 140, depth))) * 10.0 ** random.integers(-2, 3, size=(1, 140, 1))
    size = np.where(random.random((1, 140)) < 0.2, 0.0, 1.0)
    rows = metric[0] / np.linalg.norm(metric[0], axis=1, keepdims=True)
    cosines = np.sort((rows @ rows.T).ravel())
    middle = slice(cosines.size // 4, cosines.size // 2)
    gap = int(np.argmax(np.diff(cosines[middle]))) + middle.start
    attributes = {"margin": float(cosines[gap] + cosines[gap + 1]) / 2, "alpha": 1.0}
    inputs = {"metric": metric, "size": size}
    if type_bindings["T"] != "float32":  # rounding moves cosines across the margin
        attributes["margin"] = -0.9
    implementations.assert_matches(OP, oracle, attributes=attributes, type_bindings=type_bindings, inputs=inputs)


@pytest.mark.parametrize("type_bindings", TYPE_BINDINGS, ids=str)
def test_special_float_vectors_and_sizes_follow_the_formula(
    implementations: OpImplementations, type_bindings: dict[str, str]
) -> None:
    for seed in range(6):
        _, inputs = special_token_inputs(seed, type_bindings["T"])
        attributes = {"margin": 0.5, "alpha": 1.0}
        implementations.assert_matches(OP, oracle, attributes=attributes, type_bindings=type_bindings, inputs=inputs)


def test_clustered_tokens_have_more_energy_than_isolated_ones_and_padding_has_the_most(
    implementations: OpImplementations,
) -> None:
    random = np.random.default_rng(0)
    metric = np.concatenate([random.normal(size=(1, 3, 32)), 5 + random.normal(size=(1, 6, 32)), np.zeros((1, 1, 32))], axis=1)
    size = np.array([[1.0] * 9 + [0.0]])
    energies = []

    def check_outputs(arrays: Arrays, outputs: Arrays) -> str | None:
        energy = outputs["energy"][0]
        energies.append(energy)
        return None if energy[:3].max() < energy[3:9].min() < energy[3:9].max() <= 1 < energy[9] else f"{energy}"

    attributes = {"margin": 0.5, "alpha": 1.0}
    inputs = {"metric": metric, "size": size}
    type_bindings = {"T": "float16"}
    implementations.assert_matches(
        OP,
        None,
        attributes=attributes,
        type_bindings=type_bindings,
        inputs=inputs,
        output_check=check_outputs,
    )
    assert len(energies) >= 2


def test_a_single_real_token_has_energy_zero(implementations: OpImplementations) -> None:
    inputs = {"metric": np.ones((2, 3, 4)), "size": np.array([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])}

    def exact(x: Arrays, attributes: Attributes) -> Arrays:
        return {"energy": np.array([[2.0, 0.0, 2.0], [2.0, 2.0, 2.0]])}

    attributes = {"margin": 0.9, "alpha": 1.0}
    implementations.assert_matches(OP, exact, attributes=attributes, type_bindings={"T": "float32"}, inputs=inputs)


MUTANTS = {
    "TokenEnergy": {
        "kernel": {
            "cosine >= MARGIN": "cosine > MARGIN",
            "tl.exp(cosine - MARGIN)": "tl.exp(cosine + MARGIN)",
            "real_j[None, :] & (i[:, None] != j[None, :])": "real_j[None, :]",
            "real_j[None, :] & (i": "(i",
            "tl.sum(count, axis=0) - 1": "tl.sum(count, axis=0)",
            "fine_i[:, None] & is_finite_norm(square_j)[None, :]": "fine_i[:, None]",
            "more_i = tl.load(from_i + first_d": "more_i = tl.load(from_i",
            "tl.where(real_i, mean, 2.0)": "mean",
        },
        "reference": {
            "op.GreaterOrEqual(cosine, threshold)": "op.Greater(cosine, threshold)",
            "op.Constant(value_float=alpha)": "one",
            "op.Not(op.Equal(op.Unsqueeze(index, [0]), op.Unsqueeze(index, [1])))": "op.Less(index, tokens)",
            "op.Max(others, one)": "op.Add(others, one)",
            "op.LessOrEqual(size, op.Constant(value_float=LARGEST_SIZE))": "op.Less(size, one)",
        },
    },
}


def mutation_cases(op: Op) -> Iterator[OpCase]:
    random = np.random.default_rng(0)
    for depth in (16, 256):
        metric = scaled_signs(random, 2, 9, depth)
        metric[0, 0], metric[0, 1:4] = 1.0, 1.0
        metric[0, 1:4, : depth // 4] = -1.0  # a cosine of 1/2, equal to the margin
        metric[:, 5] *= 2.0**64
        size = np.array([[1.0] * 4 + [0.0] + [1.0] * 4] * 2)
        yield OpCase(inputs={"metric": metric, "size": size}, attributes={"margin": 0.5, "alpha": 0.75})


test_mutants_are_detected = mutant_test(oracle_comparison(oracle, mutation_cases), MUTANTS)


def test_unsupported_inputs_are_rejected() -> None:
    attributes, dims = {"margin": 0.5, "alpha": 1.0}, {"B": 1, "N": 4, "D": 4}
    with pytest.raises(ShapeError, match=r"N is 20000, and must be in \[1, 16384\]"):
        Specialization(OP, {"T": "float16"}, attributes, {**dims, "N": 20000})
    with pytest.raises(ShapeError, match="T is int8"):
        Specialization(OP, {"T": "int8"}, attributes, dims)
    with pytest.raises(UsageError, match=r"`margin` is 1.5, and must be in \[-1, 1\]"):
        Specialization(OP, {"T": "float16"}, {**attributes, "margin": 1.5}, dims)
    with pytest.raises(UsageError, match="needs its attribute `alpha`"):
        Specialization(OP, {"T": "float16"}, {"margin": 0.5}, dims)
