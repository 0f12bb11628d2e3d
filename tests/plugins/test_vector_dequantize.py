"""VectorDequantizeFp8, Int8 and Int4 against Python loops in float64, and what a vector loses on the way there and back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.op_implementations import Arrays, Attributes, OpImplementations

from ryzen_compile.errors import ShapeError
from ryzen_compile.kernels import Specialization
from ryzen_compile.registry import find_op
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import Op

EVERY = FP8, INT8, ROTATED, INT4 = [find_op(f"VectorDequantize{name}") for name in ("Fp8", "Int8", "RotatedInt4", "Int4")]
PAIRS = (ROTATED.name, INT4.name)
TYPES = FP8.type_constraints["T"]
LEVELS = (0.12841796875, 0.387939453125, 0.65673828125, 0.9423828125, 1.255859375, 1.6181640625, 2.068359375, 2.732421875)


def e4m3(bits: int) -> float:
    sign, exponent, fraction = bits >> 7, (bits >> 3) & 15, bits & 7
    if bits & 127 == 127:
        return float("nan")
    size = (fraction / 8) * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def rotation(width: int) -> np.ndarray[Any, Any]:
    """Return H diag(s), bit by bit."""
    return np.array(
        [
            [(-1.0) ** ((i & j).bit_count() + (j & (j >> 1)).bit_count()) / np.sqrt(width) for j in range(width)]
            for i in range(width)
        ]
    )


def values(op: Op, codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what codes stand for before they are scaled or turned."""
    rows = codes.reshape(-1, codes.shape[-1]).astype(np.int64)
    if op.name == INT8.name:
        return rows.astype(np.float64)
    if op.name == FP8.name:
        return np.array([[e4m3(byte & 255) for byte in row] for row in rows])
    nibbles = [[nibble for byte in row for nibble in (byte & 15, (byte >> 4) & 15)] for row in rows]
    return np.array([[-LEVELS[one - 8] if one > 7 else LEVELS[one] for one in row] for row in nibbles])


def oracle(op: Op) -> Any:
    """Return the oracle of `op`: everything in float64; the tolerance of T takes in its rounding."""

    def exact(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
        found = values(op, x["codes"])
        if op.name == INT4.name:
            found = found @ rotation(found.shape[1])
        with np.errstate(invalid="ignore"):
            found = found * x["scale"].reshape(-1, 1)
        return {"x": found.reshape(*x["scale"].shape, -1)}

    return exact


def judge(op: Op, element: str) -> Any:
    """Return a judge of codes without a rotation: one product of float32, rounded to T, to the bit.

    For bfloat16 the result may be cut off as well, and anything where it is subnormal: so Triton's interpreter does it.
    """

    def wrong(x: Arrays, found: Arrays) -> str | None:
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            wide = values(op, x["codes"]).astype(np.float32) * x["scale"].reshape(-1, 1)
            meant = [wide.astype(numpy_dtype(element))]
            if element == "bfloat16":
                meant.append((wide.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(meant[0].dtype))
        got = found["x"].reshape(wide.shape)
        off = ~np.any([(got == one) | (np.isnan(got) & np.isnan(one)) for one in meant], axis=0)
        off &= (np.abs(wide) >= 2.0**-126) | (element != "bfloat16")
        if got.dtype != meant[0].dtype or off.any():
            at = tuple(map(int, np.argwhere(off)[0]))
            return f"at {at} it is {got[at]}, not {meant[0][at]}"
        return None

    return wrong


def check(lives: OpImplementations, op: Op, x: Arrays, element: str) -> str | None:
    """Return where a life of `op` is wrong about `x`, or None."""
    exact = op.name != INT4.name
    return lives.check(
        op,
        None if exact else oracle(op),
        dims={"ROWS": x["scale"].size, "BYTES" if op.name in PAIRS else "D": x["codes"].shape[-1]},
        attributes={},
        type_bindings={"T": element},
        inputs={**x, "like": np.zeros((), numpy_dtype(element))},
        output_check=judge(op, element) if exact else None,
    )


@st.composite
def coded(draw: st.DrawFn, widths: st.SearchStrategy[int]) -> dict[str, np.ndarray[Any, Any]]:
    """Draw codes of every rank and kind, and scales of every size, zeros among them."""
    lead, width = draw(st.lists(st.integers(1, 3), max_size=3)), draw(widths)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** random.uniform(-4, 1, size=lead) * (random.random(lead) < 0.9)
    return {
        "codes": random.integers(-128, 128, size=(*lead, width)).astype(np.int8),
        "scale": np.asarray(scale, np.float32),
    }


@pytest.mark.parametrize("element", TYPES)
@pytest.mark.parametrize("op", EVERY, ids=str)
def test_every_life_returns_what_codes_stand_for(lives: OpImplementations, op: Op, element: str) -> None:
    widths = st.sampled_from([8, 16, 32, 64]) if op.name in PAIRS else st.integers(1, 70)

    @settings(max_examples=20 if element == "float32" else 6)
    @given(x=coded(widths))
    def run(x: Arrays) -> None:
        assert check(lives, op, x, element) is None

    run()
    if op.name in PAIRS:
        for width in (128, 256):
            drawn = INT4.make_inputs(np.random.default_rng(width), {"ROWS": 3, "BYTES": width}, {})  # type: ignore[misc]
            x = {"codes": drawn["codes"], "scale": drawn["scale"].astype(np.float32)}
            assert check(lives, op, x, element) is None


HOSTILE = [0.0, -0.0, 1e-45, 1e-40, 1e-30, 1e-7, 0.3, -2.5, 300.0, 6e4, 1e30, 3e35, 3e38, np.inf, np.nan]


@pytest.mark.parametrize("element", TYPES)
@pytest.mark.parametrize("op", EVERY[:3], ids=str)
def test_every_code_times_hostile_scales(lives: OpImplementations, op: Op, element: str) -> None:
    codes = np.tile(np.arange(-128, 128).astype(np.int8), (len(HOSTILE), 1))
    assert check(lives, op, {"codes": codes, "scale": np.array(HOSTILE, np.float32)}, element) is None


def test_sizes_at_the_ends_of_float32_are_unrotated(lives: OpImplementations) -> None:
    codes = np.random.default_rng(0).integers(-128, 128, size=(4, 32)).astype(np.int8)
    for scale in (5e37, 1e-40, 3e-45):
        x = {"codes": codes, "scale": np.full(4, scale, np.float32), "like": np.zeros((), np.float32)}
        wide = {**x, "scale": x["scale"].astype(np.float64)}
        exact = oracle(INT4)(wide, {})["x"]
        for found in (
            lives.references.run(INT4, {"T": "float32"}, {}, x)["x"],
            lives.interpreter.run(Specialization(INT4, {"T": "float32"}, {}, {"ROWS": 4, "BYTES": 32}), x)["x"],
        ):
            assert np.abs(found - exact).max() <= 1e-5 * scale + 1.5e-45


def there_and_back(lives: OpImplementations, kind: str, x: np.ndarray[Any, Any], *, rotated: str = "") -> tuple[Any, Any]:
    """Return what becomes of `x` as codes and back, and its scales: by the references, on ONNX Runtime."""
    elements = {"T": str(x.dtype)}
    made = lives.references.run(find_op(f"VectorQuantize{kind}"), elements, {}, {"x": x})
    back = lives.references.run(
        find_op(f"VectorDequantize{rotated}{kind}"), elements, {}, {**made, "like": np.zeros((), x.dtype)}
    )
    return back["x"], made["scale"]


def lost(x: np.ndarray[Any, Any], back: np.ndarray[Any, Any]) -> float:
    """Return the mean over vectors of ||x - back||^2 / ||x||^2."""
    x, back = x.astype(np.float64), back.astype(np.float64)
    return float(np.mean(np.sum((x - back) ** 2, axis=-1) / np.sum(x * x, axis=-1)))


@pytest.mark.parametrize("width", [64, 128, 256])
def test_four_bits_lose_of_gaussian_vectors_what_the_theory_says(lives: OpImplementations, width: int) -> None:
    x = np.random.default_rng(width).normal(size=(400_000 // width, width)).astype(np.float32)
    back, _ = there_and_back(lives, "Int4", x)
    assert lost(x, back) == pytest.approx(0.0095, rel=0.05)


def test_four_bits_take_outliers_that_a_scale_per_token_does_not(lives: OpImplementations) -> None:
    """Vectors with two channels 20 times the others, against the best of the evenly spaced codes of a scale per token."""
    x = np.random.default_rng(0).normal(size=(3000, 128)).astype(np.float32)
    x[:, [5, 77]] *= 20
    back, _ = there_and_back(lives, "Int4", x)
    assert lost(x, back) < 0.0095
    amax = np.abs(x).max(axis=1, keepdims=True)
    plain = [np.clip(np.rint(x / amax * most), -8, 7) * amax / most for most in (7, 7.5, 8)]
    plain.append((np.clip(np.floor(x / amax * 7.5), -8, 7) + 0.5) * amax / 7.5)
    assert min(lost(x, one) for one in plain) > 5 * lost(x, back)


@pytest.mark.parametrize("width", [16, 64, 128, 512])
def test_structured_vectors_lose_little(lives: OpImplementations, width: int) -> None:
    """Constants, alternations, steps, ramps, waves, single elements: what a Hadamard matrix alone may turn into one spike."""
    i = np.arange(width)
    waves = [np.cos(2 * np.pi * f * i / width + phase) for f in (1, 2, 3, 5, width // 4) for phase in (0.0, 0.7)]
    x = np.array([i * 0 + 1, (-1) ** i, i < width // 2, i + 1, i == 0, i == 3, *waves], np.float32)
    back, _ = there_and_back(lives, "Int4", x)
    for vector, found in zip(x, back, strict=True):
        assert lost(vector[None], found[None]) < 0.03


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 200), size=st.floats(-30, 33))
def test_eight_bits_lose_what_the_theory_says(lives: OpImplementations, seed: int, width: int, size: float) -> None:
    """fp8: 2^-4 of each element, or half a step of its smallest numbers; int8: half a step. And nothing becomes infinite."""
    random = np.random.default_rng(seed)
    x = (random.normal(size=(5, width)) * random.exponential(size=(5, width)) ** 3 * 10.0**size).astype(np.float32)
    back, scale = there_and_back(lives, "Fp8", x)
    error = np.abs(x.astype(np.float64) - back)
    assert (error <= np.maximum(np.abs(x.astype(np.float64)) * 2.0**-4, scale[:, None] * 2.0**-10) * (1 + 1e-6)).all()
    back, scale = there_and_back(lives, "Int8", x)
    assert (np.abs(x.astype(np.float64) - back) <= scale[:, None] * (0.5 + 127 * 2.0**-23)).all()


@pytest.mark.parametrize("kind", ["Fp8", "Int8"])
def test_what_is_largest_stays_finite_and_zero_stays_zero(lives: OpImplementations, kind: str) -> None:
    for element in TYPES:
        largest = ml_dtypes.finfo(numpy_dtype(element)).max
        x = np.array([[largest, -largest, 1], [0, -0.0, 0], [np.nan, np.inf, -2]], numpy_dtype(element))
        back, scale = there_and_back(lives, kind, x)
        wide = back.astype(np.float64)
        assert np.isfinite(wide).all()
        assert np.abs(wide[0, :2] / [float(largest), -float(largest)] - 1).max() < 1e-2
        assert (wide[1] == 0).all() and scale[1] == 0  # noqa: PT018
        assert np.abs(wide[2] - [0, 2, -2]).max() < 1e-2


def test_a_rotated_query_meets_rotated_keys(lives: OpImplementations) -> None:
    """<q, k> of the keys as they were is <H diag(s) q, k'> of the keys that are left as they lie."""
    random = np.random.default_rng(4)
    keys, query = random.normal(size=(50, 64)).astype(np.float32), random.normal(size=64)
    turned, _ = there_and_back(lives, "Int4", keys, rotated="Rotated")
    back, _ = there_and_back(lives, "Int4", keys)
    assert np.abs(turned @ (rotation(64) @ query) - back @ query).max() < 1e-4
    assert lost(keys @ rotation(64).T, turned) < 0.011


MUTANTS = [
    (FP8, "kernel", "of_e4m3(code) * step[:, None]", "of_e4m3(code) / step[:, None]"),
    (FP8, "kernel", "of_e4m3(code)", "of_e4m3(code & 127)"),
    (INT8, "kernel", "code.to(tl.float32)", "(code & 127).to(tl.float32)"),
    (ROTATED, "kernel", "of_level(packed >> 4)", "of_level(packed >> 3)"),
    (ROTATED, "kernel", "if UNROTATE:", "if True:"),
    (INT4, "kernel", "flipped(hadamard(turned, A, BLOCK_R * B), A, B, BLOCK_R * B)", "hadamard(turned, A, BLOCK_R * B)"),
    (INT4, "kernel", "(1, 2, 0)), (BLOCK_R, D)", "(2, 1, 0)), (BLOCK_R, D)"),
    (INT4, "kernel", "1.0 / D", "2.0 / D"),
    (INT4, "kernel", "element_ty), mask=row[:, None] < rows)", "element_ty), mask=row[:, None] >= 0)"),
    (FP8, "reference", "exponent - 10", "exponent - 9"),
    (FP8, "reference", "(-1 if byte >= 128 else 1)", "1"),
    (INT8, "reference", "number = op.Cast(codes, to=FLOAT.dtype)", "number = op.Abs(op.Cast(codes, to=FLOAT.dtype))"),
    (ROTATED, "reference", "(byte % 16, byte // 16)", "(byte // 16, byte % 16)"),
    (INT4, "reference", "odd)), perm=[1, 0])", "odd)), perm=[0, 1])"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "part", "old", "new"), MUTANTS)
def test_a_mutant_is_noticed(lives: OpImplementations, op: Op, part: str, old: str, new: str) -> None:
    random = np.random.default_rng(3)
    x = {
        "codes": random.integers(-128, 128, size=(3, 32)).astype(np.int8),
        "scale": random.exponential(size=3).astype(np.float32),
    }

    def run(op: Op) -> str | None:
        return check(lives, op, x, "float32")

    assert run(op) is None
    assert lives.detects_mutation(op, part, old, new, run)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"needs power_of_two\(BYTES\) == BYTES, and here BYTES = 48"):
        Specialization(INT4, {"T": "float32"}, {}, {"ROWS": 4, "BYTES": 48})
    with pytest.raises(ShapeError, match=r"BYTES is 4, and must be in \[8, 256\]"):
        Specialization(INT4, {"T": "float32"}, {}, {"ROWS": 4, "BYTES": 4})
    with pytest.raises(ShapeError, match="`scale` begins with"):
        FP8.bind_dims({"codes": (2, 3, 8), "scale": (3, 2), "like": ()}, {})
    with pytest.raises(ShapeError, match="`like` has 1 dimensions"):
        INT8.bind_dims({"codes": (2, 8), "scale": (2,), "like": (1,)}, {})
    with pytest.raises(ShapeError, match="T is int8"):
        Specialization(INT8, {"T": "int8"}, {}, {"ROWS": 4, "D": 8})
