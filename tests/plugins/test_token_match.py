"""TokenMatch against loops over pairs: ties, padding, vectors without a length, indices that are none."""

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

OP = find_op("TokenMatch")
ELEMENTS = [{"T": element} for element in OP.type_constraints["T"]]


def real(size: float) -> bool:
    return bool(2.0**-64 <= size <= 2.0**64)


def likeness(x: Arrays, sequence: int, s: int, t: int) -> float:
    """Return how much the token s wants the token t."""
    if not real(x["size"][sequence, s]):
        return 2.0 if real(x["size"][sequence, t]) else 3.0
    if not real(x["size"][sequence, t]):
        return -2.0
    one, other = x["metric"][sequence, s], x["metric"][sequence, t]
    with np.errstate(all="ignore"):
        if not (one @ one < 1e38 and other @ other < 1e38):
            return -2.0
    if one @ one <= 1e-30 or other @ other <= 1e-30:
        return 0.0
    return float(one @ other / (np.sqrt(one @ one) * np.sqrt(other @ other)))


def oracle(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    out = {"partner": np.empty(x["a"].shape, np.int32), "similarity": np.empty(x["a"].shape)}
    last = x["size"].shape[1] - 1
    for sequence, i in np.ndindex(x["a"].shape):
        s = min(max(int(x["a"][sequence, i]), 0), last)
        best = -np.inf
        for t in x["b"][sequence]:
            t = min(max(int(t), 0), last)
            if (found := likeness(x, sequence, s, t)) > best:
                best = out["similarity"][sequence, i] = found
                out["partner"][sequence, i] = t
    return out


def judge(x: Arrays, found: Arrays) -> str | None:
    """Say what is wrong where cosines may be too close to be told apart: a partner must be as good as the best."""
    for sequence, i in np.ndindex(x["a"].shape):
        wide = {name: array.astype(np.float64) for name, array in x.items()}
        every = [likeness(wide, sequence, x["a"][sequence, i], t) for t in x["b"][sequence]]
        places = np.flatnonzero(x["b"][sequence] == found["partner"][sequence, i])
        if places.size == 0:
            return f"the partner at {sequence}, {i} is not in the list"
        if abs(every[places[0]] - max(every)) > 4e-5 or abs(found["similarity"][sequence, i] - max(every)) > 4e-5:
            return f"at {sequence}, {i} {found['similarity'][sequence, i]} was found, and {max(every)} is the best"
    return None


@pytest.mark.parametrize("elements", ELEMENTS, ids=str)
def test_every_life_finds_the_partners_that_the_oracle_finds(lives: OpImplementations, elements: dict[str, str]) -> None:
    sizes = {"B": 3, "N": 9, "D": 20, "A": 6, "M": 6}

    @settings(max_examples=25 if elements["T"] == "float32" else 10)
    @given(dims=st.fixed_dictionaries({name: st.integers(1, high) for name, high in sizes.items()}), seed=st.integers(0, 2**32))
    def check(dims: dict[str, int], seed: int) -> None:
        assert lives.check(OP, oracle, dims=dims, attributes={}, type_bindings=elements, seed=seed) is None

    check()


@pytest.mark.parametrize("elements", ELEMENTS, ids=str)
@pytest.mark.parametrize("depth", [64, 200])
def test_lists_of_many_tiles_and_rows_of_many_pieces(lives: OpImplementations, elements: dict[str, str], depth: int) -> None:
    """Vectors of any direction: a partner may be another that float32 cannot tell from the best, and no worse."""
    random = np.random.default_rng(depth)
    order = random.permutation(220).astype(np.int32)
    metric = random.normal(size=(1, 220, depth)) * 10.0 ** random.integers(-2, 3, size=(1, 220, 1))
    inputs = {"metric": metric, "size": np.ones((1, 220)), "a": order[None, :70], "b": order[None, 70:]}
    dims = {"B": 1, "N": 220, "D": depth, "A": 70, "M": 150}
    assert lives.check(OP, None, dims=dims, attributes={}, type_bindings=elements, inputs=inputs, output_check=judge) is None


@pytest.mark.parametrize("elements", ELEMENTS, ids=str)
def test_strange_vectors_and_sizes_have_a_rule(lives: OpImplementations, elements: dict[str, str]) -> None:
    wide = elements["T"] != "float16"
    scales = [1.0, 0.0, -0.0, np.nan, np.inf, 2.0**63 if wide else 1024.0, 2.0**-60 if wide else 2.0**-24, 2.0**14, 1e-40]
    for seed in range(6):
        random = np.random.default_rng(seed)
        metric = random.choice([-1.0, 1.0], size=(2, 20, 4)) * random.choice(scales, size=(2, 20, 1))
        metric[1, 3, 2] = np.nan
        size = random.choice([1.0, 1.0, 3.0, 2.0**60, 1e-9, 0.0, -0.0, -1.0, np.nan, np.inf, 1e-30, 1e30], size=(2, 20))
        a = random.integers(-3, 24, size=(2, 12), dtype=np.int32)
        b = random.integers(-3, 24, size=(2, 9), dtype=np.int32)
        inputs = {"metric": metric, "size": size, "a": a, "b": b}
        dims = {"B": 2, "N": 20, "D": 4, "A": 12, "M": 9}
        assert lives.check(OP, oracle, dims=dims, attributes={}, type_bindings=elements, inputs=inputs) is None


def test_padding_goes_to_padding_and_nobody_else_does(lives: OpImplementations) -> None:
    """Tokens 0, 1 are real in a; 2 is padding. In b 3, 4 are real, 5, 6 padding; token 5 holds what is most like token 0."""
    metric = np.array([[1, 0], [0, 1], [7, 7], [1, 9], [9, 1], [1, 0], [np.nan, 0]], np.float64)[None]
    size = np.array([[1, 1, 0, 1, 1, 0, 0]], np.float64)
    lists = {"a": np.array([[0, 1, 2]], np.int32), "b": np.array([[6, 5, 4, 3]], np.int32)}

    def check(partner: list[int], similarity: list[float], **changed: Any) -> None:
        inputs = {"metric": metric, "size": size, **lists, **changed}

        def exact(x: Arrays, attributes: Attributes) -> Arrays:
            return {"partner": np.array([partner], np.int32), "similarity": np.array([similarity])}

        dims = {"B": 1, "N": 7, "D": 2, "A": 3, "M": inputs["b"].shape[1]}
        assert lives.check(OP, exact, dims=dims, attributes={}, type_bindings={"T": "float16"}, inputs=inputs) is None

    near = 9 / np.sqrt(82)
    check([4, 3, 6], [near, near, 3.0])
    check([4, 3, 4], [near, near, 2.0], b=np.array([[4, 3]], np.int32))
    check([6, 6, 6], [-2.0, -2.0, 3.0], b=np.array([[6, 5]], np.int32))


def test_of_equals_the_first_of_the_list_is_taken(lives: OpImplementations) -> None:
    """Also where they lie in other tiles, and where an earlier tile has a worse one in the same column."""
    for places in ([149, 3, 70], [70, 6], [64, 1], [5], [63, 128]):
        metric = np.zeros((1, 200, 16))
        metric[0, :, 0] = 1.0
        metric[0, 10:, 1:] = np.random.default_rng(0).choice([-1.0, 1.0], size=(190, 15))
        metric[0, :10] = 1.0
        b = np.arange(10, 170, dtype=np.int32)[::-1]
        for place in places:
            metric[0, b[place]] = 1.0

        def exact(x: Arrays, attributes: Attributes, first: int = b[min(places)]) -> Arrays:
            return {"partner": np.full((1, 10), first, np.int32), "similarity": np.ones((1, 10))}

        inputs = {"metric": metric, "size": np.ones((1, 200)), "a": np.arange(10, dtype=np.int32)[None], "b": b[None]}
        dims = {"B": 1, "N": 200, "D": 16, "A": 10, "M": 160}
        assert lives.check(OP, exact, dims=dims, attributes={}, type_bindings={"T": "float32"}, inputs=inputs) is None


MUTANTS = [
    ("kernel", "tl.where(real_b, 2.0, 3.0)", "tl.where(real_b, 3.0, 2.0)"),
    ("kernel", "alike > best", "alike >= best"),
    ("kernel", "tl.where(best == top[:, None], best_at, count_b)", "best_at"),
    ("kernel", "for_real = tl.where(real_b[None, :], cosine, -2.0)", "for_real = cosine"),
    ("kernel", "product * scale_a[:, None] * scale(square_b)[None, :]", "product * scale_a[:, None]"),
    ("kernel", "fine_a[:, None] & is_fine(square_b)[None, :]", "fine_a[:, None]"),
    ("kernel", "at_b = start + tl.minimum(tl.maximum(at_b, 0), tokens - 1)", "at_b = start + tl.maximum(at_b, 0) % tokens"),
    ("kernel", "more_a = tl.load(from_a + first_d", "more_a = tl.load(from_a"),
    ("kernel", "found = tl.minimum(tl.maximum(found, 0), tokens - 1)", "found = place"),
    ("reference", "select_last_index=0", "select_last_index=1"),
    ("reference", "op.Where(real_a, for_real, for_padding)", "for_real"),
    ("reference", "op.Where(real_b, cosine, unlike)", "cosine"),
    ("reference", "op.Greater(square_b, op.Constant(value_float=1e-30))", "op.Greater(square_b, zero)"),
    ("reference", "op.Min(op.Cast(b, to=INT64.dtype), end)", "op.Cast(b, to=INT64.dtype)"),
    ("reference", "op.GatherElements(at_b, best, axis=1)", "best"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "old", "new"), MUTANTS)
def test_a_mutant_is_noticed(lives: OpImplementations, part: str, old: str, new: str) -> None:
    random = np.random.default_rng(0)
    cases = []
    for depth, others in ((256, 90), (4, 3), (4, 6)):
        metric = random.choice([-1.0, 1.0], size=(2, 30, depth)) * 2.0 ** random.integers(-3, 4, size=(2, 30, 1))
        metric[:, ::5] = 0.0
        metric[:, 1::7] *= 2.0**-60
        metric[:, 3::6] *= 2.0**63
        if len(cases) == 2:
            metric[:, :12], metric[:, 12::2], metric[:, 13::2] = 1.0, 2.0**63, -1.0
        a = random.integers(-2, 12, size=(2, 9), dtype=np.int32)
        b = random.integers(12, 33, size=(2, others), dtype=np.int32)
        cases.append({"metric": metric, "size": random.choice([1.0, 1.0, 0.0], size=(2, 30)), "a": a, "b": b})

    def check(op: Any) -> str | None:
        for inputs in cases:
            dims = {"B": 2, "N": 30, "D": inputs["metric"].shape[2], "A": 9, "M": inputs["b"].shape[1]}
            said = lives.check(op, oracle, dims=dims, attributes={}, type_bindings={"T": "float32"}, inputs=inputs)
            if said is not None:
                return said
        return None

    assert check(OP) is None
    assert lives.detects_mutation(OP, part, old, new, check)


def test_what_it_cannot_do_is_refused() -> None:
    dims = {"B": 1, "N": 4, "D": 4, "A": 2, "M": 2}
    with pytest.raises(ShapeError, match=r"N is 20000, and must be in \[1, 16384\]"):
        Specialization(OP, {"T": "float16"}, {}, {**dims, "N": 20000})
    with pytest.raises(ShapeError, match=r"M is 0, and must be in"):
        Specialization(OP, {"T": "float16"}, {}, {**dims, "M": 0})
    with pytest.raises(ShapeError, match="T is int8"):
        Specialization(OP, {"T": "int8"}, {}, dims)
    with pytest.raises(UsageError, match="no attribute `merged`"):
        Specialization(OP, {"T": "float16"}, {"merged": 1}, dims)
