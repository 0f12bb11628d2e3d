"""KVCompact and KVCompactRotary against a Python loop with exact rational angles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from support.op_implementations import Arrays, Attributes, OpCase, OpImplementations, mutant_test, op_inputs, oracle_comparison

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.kernels import Specialization
from ryzen_compile.registry import find_op
from ryzen_compile.spec.op import Op

COMPACT, ROTARY = find_op("KVCompact"), find_op("KVCompactRotary")
BOTH = pytest.mark.parametrize("op", [COMPACT, ROTARY], ids=lambda op: str(op.name))
TURN = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459")


def oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    b, h, c = x["position"].shape
    m = x["index"].shape[2]
    out = {
        "k_out": np.zeros((b, h, m, x["k"].shape[3])),
        "v_out": np.zeros((b, h, m, x["v"].shape[3])),
        "score_out": np.zeros((b, h, m)),
        "position_out": np.full((b, h, m), -1, np.int32),
    }
    for row in np.ndindex(b, h, m):
        slot = int(x["index"][row])
        if slot not in range(c) or x["position"][row[:2]][slot] < 0:
            continue
        position = int(x["position"][row[:2]][slot])
        key = x["k"][row[:2]][slot]
        out["v_out"][row] = x["v"][row[:2]][slot]
        out["score_out"][row] = x["score"][row[:2]][slot]
        out["position_out"][row] = row[2] if "frequency" in x else position
        out["k_out"][row] = rotate_key(key, row[2] - position, x["frequency"], attributes) if "frequency" in x else key
    return out


def rotate_key(
    key: np.ndarray[Any, Any], distance: int, frequency: np.ndarray[Any, Any], attributes: Attributes
) -> np.ndarray[Any, Any]:
    out = key.copy()
    for f, radians in enumerate(frequency):
        first, second = (2 * f, 2 * f + 1) if attributes["interleaved"] else (f, f + len(frequency))
        exact = distance * Fraction(float(radians)) if abs(radians) < 32 else Fraction(0)
        angle = float(exact - TURN * round(exact / TURN))
        out[first] = key[first] * math.cos(angle) - key[second] * math.sin(angle)
        out[second] = key[second] * math.cos(angle) + key[first] * math.sin(angle)
    return out


@st.composite
def cases(draw: st.DrawFn, op: Op) -> tuple[dict[str, int], dict[str, int]]:
    sizes = {name: draw(st.integers(1, high)) for name, high in {"B": 2, "H": 2, "C": 9, "M": 9, "D": 9, "E": 9}.items()}
    if op is COMPACT:
        return sizes, {}
    sizes["F"] = draw(st.integers(1, 4))
    return {**sizes, "D": 2 * sizes["F"] + draw(st.integers(0, 3))}, {"interleaved": draw(st.integers(0, 1))}


@pytest.mark.parametrize(
    ("op", "dtype"), [(op, dtype) for op in (COMPACT, ROTARY) for dtype in op.type_constraints["T"]], ids=str
)
def test_all_implementations_gather_the_rows_of_the_oracle(implementations: OpImplementations, op: Op, dtype: str) -> None:
    implementations.assert_random_cases_match(op, oracle, cases(op), counts=(10, 3), type_bindings={"T": dtype})


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(("width", "pairs"), [(64, 32), (80, 20)])
def test_rows_of_many_blocks(implementations: OpImplementations, interleaved: int, width: int, pairs: int) -> None:
    dims = {"B": 1, "H": 2, "C": 50, "M": 45, "D": width, "E": 33}
    implementations.assert_matches(COMPACT, oracle, dims=dims, type_bindings={"T": "float32"})
    dims, attributes = {**dims, "F": pairs}, {"interleaved": interleaved}
    implementations.assert_matches(ROTARY, oracle, dims=dims, attributes=attributes, type_bindings={"T": "float32"})


FREQUENCIES = [
    1.0, 0.99999994, 31.999998, 6.2831855, 3.1415927, 1.5707964, 0.1, 1e-3, 1e-7, 1e-12, 2.0**-60, 1e-30, 1e-45, 0.0,
    -1.0, -0.3, -1e-8, 0.7853982,
]  # fmt: skip


@pytest.mark.parametrize("furthest", [10, 2**20, 2**24 + 1, 2**31 - 1])
def test_angles_are_as_accurate_at_large_positions_as_at_small_ones(implementations: OpImplementations, furthest: int) -> None:
    """Cosine and sine are within 6e-7 of the exact values; the keys are unit vectors, so the outputs are these values."""
    pairs = len(FREQUENCIES)
    position = np.array([*range(8), *(furthest - i for i in range(8))], np.int32).reshape(1, 1, 16)
    key = np.zeros((1, 1, 16, 2 * pairs))
    key[..., ::2] = 1
    inputs = {
        "k": key, "v": key, "score": key[..., 0], "position": position,
        "index": np.random.default_rng(0).permutation(16).astype(np.int32).reshape(1, 1, 16),
        "frequency": np.array(FREQUENCIES),
    }  # fmt: skip

    def check_outputs(arrays: Arrays, outputs: Arrays) -> str | None:
        exact = oracle({**arrays, "frequency": arrays["frequency"].astype(np.float64)}, {"interleaved": 1})
        error = float(np.abs(outputs["k_out"] - exact["k_out"]).max())
        return f"off by {error}" if error > 6e-7 else None

    attributes, type_bindings = {"interleaved": 1}, {"T": "float32"}
    implementations.assert_matches(
        ROTARY, oracle, attributes=attributes, type_bindings=type_bindings, inputs=inputs, output_check=check_outputs
    )


def test_invalid_frequencies_do_not_rotate(implementations: OpImplementations) -> None:
    dims = {"B": 1, "H": 1, "C": 6, "M": 6, "D": 12, "E": 2, "F": 6}
    inputs = op_inputs(ROTARY, dims, {"interleaved": 0}, seed=5)
    inputs["frequency"] = np.array([np.nan, np.inf, -np.inf, 32.0, -1e30, 0.5])
    implementations.assert_matches(ROTARY, oracle, attributes={"interleaved": 0}, type_bindings={"T": "float32"}, inputs=inputs)


@BOTH
def test_special_float_values_are_moved_unchanged(implementations: OpImplementations, op: Op) -> None:
    """Values, scores and unrotated key elements are moved exactly; a rotated pair with a non-finite element is not finite."""
    dims = {"B": 2, "H": 2, "C": 7, "M": 9, "D": 9, "E": 5, **({"F": 3} if op is ROTARY else {})}
    attributes = {"interleaved": 1} if op is ROTARY else {}
    special_values = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 65504.0, 1.0]
    for seed, dtype in enumerate(("float32", "float16")):
        random = np.random.default_rng(seed)
        inputs = op_inputs(op, dims, attributes, random)
        for name in ("k", "v", "score"):
            inputs[name] = random.choice(special_values, size=inputs[name].shape)

        def check_outputs(arrays: Arrays, outputs: Arrays) -> str | None:
            float64 = {name: array if array.dtype.kind == "i" else array.astype(np.float64) for name, array in arrays.items()}
            unrotated = oracle_without_rotation(float64)
            for name in ("v_out", "score_out", *(["k_out"] if op is COMPACT else [])):
                if not np.array_equal(outputs[name].astype(np.float64), unrotated[name], equal_nan=True):
                    return name
            if op is COMPACT:
                return None
            k_out, source = (array.astype(np.float64).reshape(-1, 9) for array in (outputs["k_out"], unrotated["k_out"]))
            if not np.array_equal(k_out[:, 6:], source[:, 6:], equal_nan=True):
                return "unrotated elements"
            pair, pair_before = k_out[:, :6].reshape(-1, 3, 2), source[:, :6].reshape(-1, 3, 2)
            not_finite = ~np.isfinite(pair_before).all(axis=2)
            return "a rotated pair" if np.isfinite(pair[not_finite]).any() or np.isnan(pair[~not_finite]).any() else None

        implementations.assert_matches(
            op, None, attributes=attributes, type_bindings={"T": dtype}, inputs=inputs, output_check=check_outputs
        )


def oracle_without_rotation(x: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """Return the outputs of the oracle without the rotation of keys."""
    return oracle({name: array for name, array in x.items() if name != "frequency"}, {})


def test_keys_of_any_norm_are_rotated_with_the_same_relative_accuracy(implementations: OpImplementations) -> None:
    dims = {"B": 1, "H": 2, "C": 8, "M": 8, "D": 8, "E": 2, "F": 4}
    attributes, type_bindings = {"interleaved": 0}, {"T": "float32"}
    for norm in (1e30, 1e-30):
        inputs = op_inputs(ROTARY, dims, attributes, seed=1)
        inputs["k"] = inputs["k"] * norm

        def check_outputs(arrays: Arrays, outputs: Arrays, norm: float = norm) -> str | None:
            float64 = {name: array if array.dtype.kind == "i" else array.astype(np.float64) for name, array in arrays.items()}
            error = float(np.abs(outputs["k_out"] - oracle(float64, attributes)["k_out"]).max()) / norm
            return f"off by {error}" if error > 4e-6 else None

        implementations.assert_matches(
            ROTARY,
            None,
            attributes=attributes,
            type_bindings=type_bindings,
            inputs=inputs,
            output_check=check_outputs,
        )


MUTANTS = {
    "KVCompact": {
        "kernel": {
            "(slot < slots)": "(slot <= slots)",
            "tl.where(occupied, score, 0.0)": "score",
            "tl.where(held[:, None], keys, tl.zeros_like(keys))": "keys",
            "keys = _load_rows(k, head, slot,": "keys = _load_rows(k, head, m,",
        },
        "reference": {
            "op.Where(held, op.GatherElements(score, slot, axis=2), op.Constant(value_float=0.0))\n\n    row": (
                "op.GatherElements(score, slot, axis=2)\n\n    row"
            ),
        },
    },
    "KVCompactRotary": {
        "kernel": {
            "x32 * cos - y32 * sin": "x32 * cos + y32 * sin",
            "m - at": "at - m",
            ">> 32).to(tl.int32)": ">> 31).to(tl.int32)",
            "(quarter + 1) & 2": "quarter & 2",
            "upper + lower)\n": "upper)\n",
            "exponent < -18": "exponent < -17",
            "tl.where(bits < 0": "tl.where(bits < -2147483648",
            "mask=inside, other=-1)": "mask=inside, other=0)",
            "(k, head, slot, inside, slots, F, F, D, BLOCK_F)": "(k, head, slot, inside, slots, 1, F, D, BLOCK_F)",
        },
        "reference": {
            "op.Sub(new, at)": "op.Sub(at, new)",
            "TURN_LOW = 960041044": "TURN_LOW = 0",
            "turn = op.Add(turn, op.Div(op.Mul(fine, high)": "turn = op.Sub(turn, op.Div(op.Mul(fine, high)",
            "op.Less(op.Abs(frequency)": "op.LessOrEqual(op.Abs(frequency)",
            "half = op.Div(element, two)": "half = op.Div(element, one)",
            "turned = op.Where(turning, turned, keys)": "turned = op.Identity(turned)",
        },
    },
}


def mutation_cases(op: Op) -> Iterator[OpCase]:
    for seed in range(2):
        dims = {"B": 2, "H": 2, "C": 7, "M": 6, "D": 13, "E": 3, **({"F": 6} if op.name == ROTARY.name else {})}
        attributes = {"interleaved": seed} if op.name == ROTARY.name else {}
        inputs = op_inputs(op, dims, attributes, seed=seed)
        inputs["index"][0, 0] = [7, -1, 0, 3, 8, -3]
        inputs["position"][0] = np.array([1, 0, 3, -1, 2**21, 2**30, 5])
        if op.name == ROTARY.name:
            inputs["frequency"] = np.array([1.0, 0.9, -0.7, 1e-4, 1e-8, 32.0])
        yield OpCase(inputs=inputs, attributes=attributes)


test_mutants_are_detected = mutant_test(oracle_comparison(oracle, mutation_cases), MUTANTS)


def test_unsupported_inputs_are_rejected() -> None:
    dims = {"B": 1, "H": 1, "C": 5, "M": 3, "D": 4, "E": 4}
    with pytest.raises(ShapeError, match=r"needs 2 \* F <= D, and here D = 4, F = 3"):
        Specialization(ROTARY, {"T": "float32"}, {"interleaved": 0}, {**dims, "F": 3})
    with pytest.raises(ShapeError, match="T is int8"):
        Specialization(ROTARY, {"T": "int8"}, {"interleaved": 0}, {**dims, "F": 2})
    with pytest.raises(UsageError, match="`interleaved` is 2"):
        Specialization(ROTARY, {"T": "float32"}, {"interleaved": 2}, {**dims, "F": 2})
    with pytest.raises(ShapeError, match=r"D is 2000, and must be in \[1, 1024\]"):
        Specialization(COMPACT, {"T": "int8"}, {}, {**dims, "D": 2000})
