"""KVCompact and KVCompactRotary against a Python loop whose angles are exact fractions of a turn."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.op_implementations import Arrays, Attributes, OpImplementations

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.kernels import Specialization
from ryzen_compile.registry import find_op
from ryzen_compile.spec.op import Op

MOVE, ROTATE = find_op("KVCompact"), find_op("KVCompactRotary")
BOTH = pytest.mark.parametrize("op", [MOVE, ROTATE], ids=lambda op: str(op.name))
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
    for at in np.ndindex(b, h, m):
        slot = int(x["index"][at])
        if slot not in range(c) or x["position"][at[:2]][slot] < 0:
            continue
        position = int(x["position"][at[:2]][slot])
        key = x["k"][at[:2]][slot]
        out["v_out"][at] = x["v"][at[:2]][slot]
        out["score_out"][at] = x["score"][at[:2]][slot]
        out["position_out"][at] = at[2] if "frequency" in x else position
        out["k_out"][at] = rotated(key, at[2] - position, x["frequency"], attributes) if "frequency" in x else key
    return out


def rotated(
    key: np.ndarray[Any, Any], distance: int, frequency: np.ndarray[Any, Any], attributes: Attributes
) -> np.ndarray[Any, Any]:
    out = key.copy()
    for f, radians in enumerate(frequency):
        one, other = (2 * f, 2 * f + 1) if attributes["interleaved"] else (f, f + len(frequency))
        exact = distance * Fraction(float(radians)) if abs(radians) < 32 else Fraction(0)
        angle = float(exact - TURN * round(exact / TURN))
        out[one] = key[one] * math.cos(angle) - key[other] * math.sin(angle)
        out[other] = key[other] * math.cos(angle) + key[one] * math.sin(angle)
    return out


@st.composite
def cases(draw: st.DrawFn, op: Op) -> tuple[dict[str, int], dict[str, int]]:
    sizes = {name: draw(st.integers(1, high)) for name, high in {"B": 2, "H": 2, "C": 9, "M": 9, "D": 9, "E": 9}.items()}
    if op is MOVE:
        return sizes, {}
    sizes["F"] = draw(st.integers(1, 4))
    return {**sizes, "D": 2 * sizes["F"] + draw(st.integers(0, 3))}, {"interleaved": draw(st.integers(0, 1))}


@pytest.mark.parametrize(
    ("op", "element"), [(op, element) for op in (MOVE, ROTATE) for element in op.type_constraints["T"]], ids=str
)
def test_every_life_moves_the_rows_that_the_oracle_moves(lives: OpImplementations, op: Op, element: str) -> None:
    @settings(max_examples=20 if element == "float32" else 6)
    @given(case=cases(op), seed=st.integers(0, 2**32 - 1))
    def check(case: tuple[dict[str, int], dict[str, int]], seed: int) -> None:
        dims, attributes = case
        assert lives.check(op, oracle, dims=dims, attributes=attributes, type_bindings={"T": element}, seed=seed) is None

    check()


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(("width", "pairs"), [(64, 32), (80, 20)])
def test_rows_of_many_blocks(lives: OpImplementations, interleaved: int, width: int, pairs: int) -> None:
    dims = {"B": 1, "H": 2, "C": 50, "M": 45, "D": width, "E": 33}
    assert lives.check(MOVE, oracle, dims=dims, attributes={}, type_bindings={"T": "float32"}) is None
    dims, attributes = {**dims, "F": pairs}, {"interleaved": interleaved}
    assert lives.check(ROTATE, oracle, dims=dims, attributes=attributes, type_bindings={"T": "float32"}) is None


FREQUENCIES = [
    1.0, 0.99999994, 31.999998, 6.2831855, 3.1415927, 1.5707964, 0.1, 1e-3, 1e-7, 1e-12, 2.0**-60, 1e-30, 1e-45, 0.0,
    -1.0, -0.3, -1e-8, 0.7853982,
]  # fmt: skip


@pytest.mark.parametrize("furthest", [10, 2**20, 2**24 + 1, 2**31 - 1])
def test_an_angle_is_as_exact_at_a_far_position_as_at_a_near_one(lives: OpImplementations, furthest: int) -> None:
    """Within 6e-7 of the exact cosine and sine: the keys are unit vectors, so that these are what comes out."""
    pairs = len(FREQUENCIES)
    position = np.array([*range(8), *(furthest - i for i in range(8))], np.int32).reshape(1, 1, 16)
    key = np.zeros((1, 1, 16, 2 * pairs))
    key[..., ::2] = 1
    inputs = {
        "k": key, "v": key, "score": key[..., 0], "position": position,
        "index": np.random.default_rng(0).permutation(16).astype(np.int32).reshape(1, 1, 16),
        "frequency": np.array(FREQUENCIES),
    }  # fmt: skip
    dims = {"B": 1, "H": 1, "C": 16, "M": 16, "D": 2 * pairs, "E": 2 * pairs, "F": pairs}

    def judge(given: Arrays, found: Arrays) -> str | None:
        exact = oracle({**given, "frequency": given["frequency"].astype(np.float64)}, {"interleaved": 1})
        off = float(np.abs(found["k_out"] - exact["k_out"]).max())
        return f"off by {off}" if off > 6e-7 else None

    attributes, elements = {"interleaved": 1}, {"T": "float32"}
    assert (
        lives.check(ROTATE, oracle, dims=dims, attributes=attributes, type_bindings=elements, inputs=inputs, output_check=judge)
        is None
    )


def test_frequencies_that_are_none_turn_nothing(lives: OpImplementations) -> None:
    dims = {"B": 1, "H": 1, "C": 6, "M": 6, "D": 12, "E": 2, "F": 6}
    assert ROTATE.make_inputs is not None
    inputs = dict(ROTATE.make_inputs(np.random.default_rng(5), dims, {"interleaved": 0}))
    inputs["frequency"] = np.array([np.nan, np.inf, -np.inf, 32.0, -1e30, 0.5])
    said = lives.check(ROTATE, oracle, dims=dims, attributes={"interleaved": 0}, type_bindings={"T": "float32"}, inputs=inputs)
    assert said is None


@BOTH
def test_strange_values_are_moved_as_they_are(lives: OpImplementations, op: Op) -> None:
    """Values, scores and what is not rotated of a key: not a number is none afterwards; a rotated pair is lost as a pair."""
    dims = {"B": 2, "H": 2, "C": 7, "M": 9, "D": 9, "E": 5, **({"F": 3} if op is ROTATE else {})}
    attributes = {"interleaved": 1} if op is ROTATE else {}
    strange = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 65504.0, 1.0]
    for seed, element in enumerate(("float32", "float16")):
        random = np.random.default_rng(seed)
        assert op.make_inputs is not None
        inputs = dict(op.make_inputs(random, dims, attributes))
        for name in ("k", "v", "score"):
            inputs[name] = random.choice(strange, size=inputs[name].shape)

        def judge(given: Arrays, found: Arrays) -> str | None:
            wide = {name: array if array.dtype.kind == "i" else array.astype(np.float64) for name, array in given.items()}
            still = unturned(wide)
            for name in ("v_out", "score_out", *(["k_out"] if op is MOVE else [])):
                if not np.array_equal(found[name].astype(np.float64), still[name], equal_nan=True):
                    return name
            if op is MOVE:
                return None
            found_k, source = (a.astype(np.float64).reshape(-1, 9) for a in (found["k_out"], still["k_out"]))
            if not np.array_equal(found_k[:, 6:], source[:, 6:], equal_nan=True):
                return "what is not rotated"
            pair, pair_before = found_k[:, :6].reshape(-1, 3, 2), source[:, :6].reshape(-1, 3, 2)
            lost = ~np.isfinite(pair_before).all(axis=2)
            return "a pair" if np.isfinite(pair[lost]).any() or np.isnan(pair[~lost]).any() else None

        said = lives.check(
            op, None, dims=dims, attributes=attributes, type_bindings={"T": element}, inputs=inputs, output_check=judge
        )
        assert said is None


def unturned(x: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """Return what is where after the move, before keys are rotated."""
    return oracle({name: array for name, array in x.items() if name != "frequency"}, {})


def test_keys_of_any_norm_are_rotated_as_precisely(lives: OpImplementations) -> None:
    dims = {"B": 1, "H": 2, "C": 8, "M": 8, "D": 8, "E": 2, "F": 4}
    attributes, elements = {"interleaved": 0}, {"T": "float32"}
    for norm in (1e30, 1e-30):
        assert ROTATE.make_inputs is not None
        inputs = dict(ROTATE.make_inputs(np.random.default_rng(1), dims, attributes))
        inputs["k"] = inputs["k"] * norm

        def judge(given: Arrays, found: Arrays, norm: float = norm) -> str | None:
            wide = {name: array if array.dtype.kind == "i" else array.astype(np.float64) for name, array in given.items()}
            off = float(np.abs(found["k_out"] - oracle(wide, attributes)["k_out"]).max()) / norm
            return f"off by {off}" if off > 4e-6 else None

        said = lives.check(
            ROTATE, None, dims=dims, attributes=attributes, type_bindings=elements, inputs=inputs, output_check=judge
        )
        assert said is None


MUTANTS = [
    (MOVE, "kernel", "(slot < slots)", "(slot <= slots)"),
    (MOVE, "kernel", "tl.where(held, worth, 0.0)", "worth"),
    (MOVE, "kernel", "tl.where(held[:, None], keys, tl.zeros_like(keys))", "keys"),
    (MOVE, "kernel", "keys = _row(k, head, slot,", "keys = _row(k, head, m,"),
    (MOVE, "reference", "score_out = op.Where(held, op.GatherElements(score, slot, axis=2), op.Constant(value_float=0.0))\n\n"
     "    row", "score_out = op.GatherElements(score, slot, axis=2)\n\n    row"),
    (ROTATE, "kernel", "x32 * cos - y32 * sin", "x32 * cos + y32 * sin"),
    (ROTATE, "kernel", "m - at", "at - m"),
    (ROTATE, "kernel", ">> 32).to(tl.int32)", ">> 31).to(tl.int32)"),
    (ROTATE, "kernel", "(quarter + 1) & 2", "quarter & 2"),
    (ROTATE, "kernel", "upper + lower)\n", "upper)\n"),
    (ROTATE, "kernel", "exponent < -18", "exponent < -17"),
    (ROTATE, "kernel", "tl.where(bits < 0", "tl.where(bits < -2147483648"),
    (ROTATE, "kernel", "mask=inside, other=-1)", "mask=inside, other=0)"),
    (ROTATE, "kernel", "_row(k, head, slot, inside, slots, F, F, D, BLOCK_F)",
     "_row(k, head, slot, inside, slots, 1, F, D, BLOCK_F)"),
    (ROTATE, "reference", "op.Sub(new, at)", "op.Sub(at, new)"),
    (ROTATE, "reference", "TURN_LOW = 960041044", "TURN_LOW = 0"),
    (ROTATE, "reference", "turn = op.Add(turn, op.Div(op.Mul(fine, high)", "turn = op.Sub(turn, op.Div(op.Mul(fine, high)"),
    (ROTATE, "reference", "op.Less(op.Abs(frequency)", "op.LessOrEqual(op.Abs(frequency)"),
    (ROTATE, "reference", "half = op.Div(element, two)", "half = op.Div(element, one)"),
    (ROTATE, "reference", "turned = op.Where(turning, turned, keys)", "turned = op.Identity(turned)"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "part", "old", "new"), MUTANTS, ids=range(len(MUTANTS)))
def test_a_mutant_is_noticed(lives: OpImplementations, op: Op, part: str, old: str, new: str) -> None:
    def check(changed: Any) -> str | None:
        for seed, interleaved in enumerate((0, 1)):
            dims = {"B": 2, "H": 2, "C": 7, "M": 6, "D": 13, "E": 3, **({"F": 6} if op is ROTATE else {})}
            attributes = {"interleaved": interleaved} if op is ROTATE else {}
            inputs = changed.draw(np.random.default_rng(seed), dims, attributes)
            inputs["index"][0, 0] = [7, -1, 0, 3, 8, -3]
            inputs["position"][0] = np.array([1, 0, 3, -1, 2**21, 2**30, 5])
            if op is ROTATE:
                inputs["frequency"] = np.array([1.0, 0.9, -0.7, 1e-4, 1e-8, 32.0])
            said = lives.check(changed, oracle, dims=dims, attributes=attributes, type_bindings={"T": "float32"}, inputs=inputs)
            if said is not None:
                return said
        return None

    assert check(op) is None
    assert lives.detects_mutation(op, part, old, new, check)


def test_what_they_cannot_do_is_refused() -> None:
    dims = {"B": 1, "H": 1, "C": 5, "M": 3, "D": 4, "E": 4}
    with pytest.raises(ShapeError, match=r"needs 2 \* F <= D, and here D = 4, F = 3"):
        Specialization(ROTATE, {"T": "float32"}, {"interleaved": 0}, {**dims, "F": 3})
    with pytest.raises(ShapeError, match="T is int8"):
        Specialization(ROTATE, {"T": "int8"}, {"interleaved": 0}, {**dims, "F": 2})
    with pytest.raises(UsageError, match="`interleaved` is 2"):
        Specialization(ROTATE, {"T": "float32"}, {"interleaved": 2}, {**dims, "F": 2})
    with pytest.raises(ShapeError, match=r"D is 2000, and must be in \[1, 1024\]"):
        Specialization(MOVE, {"T": "int8"}, {}, {**dims, "D": 2000})
