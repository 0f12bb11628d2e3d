"""VectorQuantizeFp8, -Int8 and -Int4 against Python loops in float64: codes, scales, and non-finite values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.op_implementations import Arrays, Attributes, OpImplementations, mutant_test

from ryzen_compile.errors import ShapeError
from ryzen_compile.kernels import Specialization
from ryzen_compile.registry import find_op
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import Op
from ryzen_plugins.vector_quantize import compression_ratio
from ryzen_plugins.vector_quantize.levels import LEVELS, lloyd_max

FP8, INT8, INT4 = (find_op(f"VectorQuantize{name}") for name in ("Fp8", "Int8", "Int4"))
TYPES = FP8.type_constraints["T"]
LARGEST = float(np.finfo(np.float32).max)
E4M3 = [(float(np.uint8(bits).view(ml_dtypes.float8_e4m3fn)), bits) for bits in range(127)]
ALL_LEVELS = np.array([*LEVELS, *(-level for level in LEVELS)])


def sanitize(vector: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], float]:
    """Return a vector with NaN and infinities replaced according to the formula, and its amax."""
    amax = max((abs(float(element)) for element in vector if np.isfinite(element)), default=0.0)
    sanitized = [0.0 if np.isnan(element) else min(max(float(element), -amax), amax) for element in vector]
    return np.array(sanitized), amax


def scaled_elements(vector: np.ndarray[Any, Any], limit: float, max_scale: float) -> tuple[list[float], np.float32]:
    """Return the elements of a vector divided by its scale, and the scale, each computed by one float32 division."""
    sanitized, amax = sanitize(vector)
    scale = np.float32(min(np.float32(amax) / np.float32(limit), np.float32(max_scale)))
    if scale == 0:
        return [0.0] * len(sanitized), scale
    with np.errstate(under="ignore"):
        return [float(min(max(np.float32(element) / scale, -limit), limit)) for element in sanitized], scale


def oracle_fp8(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    rows = x["x"].reshape(-1, x["x"].shape[-1])
    codes, scales = np.zeros(rows.shape, np.uint8), np.zeros(len(rows), np.float32)
    for i, row in enumerate(rows):
        ratios, scales[i] = scaled_elements(row, 448.0, LARGEST)
        for d, ratio in enumerate(ratios):
            code = min(E4M3, key=lambda entry: (abs(entry[0] - abs(ratio)), entry[1] % 2))[1]
            codes[i, d] = code + (128 if ratio < 0 and code > 0 else 0)
    return {"codes": codes.view(np.int8).reshape(x["x"].shape), "scale": scales.reshape(x["x"].shape[:-1])}


def oracle_int8(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
    rows = x["x"].reshape(-1, x["x"].shape[-1])
    codes, scales = np.zeros(rows.shape, np.int8), np.zeros(len(rows), np.float32)
    for i, row in enumerate(rows):
        ratios, scales[i] = scaled_elements(row, 127.0, 2.679388389e36)
        codes[i] = [round(ratio) for ratio in ratios]  # Python rounds half to even
    return {"codes": codes.reshape(x["x"].shape), "scale": scales.reshape(x["x"].shape[:-1])}


def rotation(width: int) -> np.ndarray[Any, Any]:
    """Return the orthonormal rotation matrix: Sylvester's Hadamard matrix with the signs of the Rudin-Shapiro sequence."""
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = [1, 1]
    while len(signs) < width:  # a(2n) = a(n), a(2n + 1) = (-1)^n a(n)
        n, odd = divmod(len(signs), 2)
        signs.append(signs[n] * (-1 if odd and n % 2 else 1))
    return matrix * np.array(signs) / np.sqrt(width)


def unpack_codes(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the 4-bit codes of rows of bytes, in element order."""
    return np.array([[nibble for byte in row.view(np.uint8) for nibble in (byte % 16, byte // 16)] for row in codes])


def check_int4(x: Arrays, outputs: Arrays) -> str | None:
    """Return an error unless every code is within 2e-5 spacings of the nearest level, and every scale within 1e-6."""
    width = x["x"].shape[-1]
    if outputs["codes"].shape != (*x["x"].shape[:-1], width // 2) or outputs["scale"].shape != x["x"].shape[:-1]:
        return f"shapes {outputs['codes'].shape} and {outputs['scale'].shape}"
    codes = unpack_codes(outputs["codes"].reshape(-1, width // 2))
    scales, ordered = outputs["scale"].reshape(-1).astype(np.float64), np.sort(ALL_LEVELS)
    for i, row in enumerate(x["x"].astype(np.float64).reshape(-1, width)):
        sanitized, _ = sanitize(row)
        norm = np.sqrt(np.sum(sanitized * sanitized))
        scale = min(norm / np.sqrt(width), LARGEST)
        if not abs(scales[i] - scale) <= 1e-6 * scale + 1e-45:
            return f"scale {i} is {scales[i]!r}, expected {scale!r}"
        if norm == 0:
            if codes[i].any() or scales[i] != 0:
                return f"row {i} is zero, but has codes {codes[i]}"
            continue
        exact = rotation(width) @ (sanitized / norm) * np.sqrt(width)
        for d, (value, code) in enumerate(zip(exact, codes[i], strict=True)):
            above = int(np.clip(np.searchsorted(ordered, value), 1, 15))
            spacing = ordered[above] - ordered[above - 1]
            if abs(value - ALL_LEVELS[code]) > np.abs(value - ALL_LEVELS).min() + 2e-5 * spacing:
                return f"row {i}: {value!r} at {d} has code {code}, level {ALL_LEVELS[code]}"
    return None


def check(implementations: OpImplementations, op: Any, x: np.ndarray[Any, Any], dtype: str) -> str | None:
    """Return the first mismatch of an implementation of `op` for the vectors `x`, cast to `dtype`, or None."""
    with np.errstate(over="ignore"):
        inputs = {"x": x.astype(numpy_dtype(dtype))}
    checks: dict[str, Any] = {
        "VectorQuantizeFp8": {"oracle": oracle_fp8},
        "VectorQuantizeInt8": {"oracle": oracle_int8},
        "VectorQuantizeInt4": {"oracle": None, "output_check": check_int4},
    }
    dims = {"ROWS": x[..., 0].size, "D": x.shape[-1]}
    return implementations.check(op, dims=dims, attributes={}, type_bindings={"T": dtype}, inputs=inputs, **checks[op.name])


@st.composite
def vectors(draw: st.DrawFn, widths: st.SearchStrategy[int]) -> np.ndarray[Any, Any]:
    """Draw vectors of every rank and norm, with outliers and zeros."""
    lead, width = draw(st.lists(st.integers(1, 3), max_size=3)), draw(widths)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = random.normal(size=(*lead, width)) * 10.0 ** random.uniform(-3, 3, size=(*lead, 1))
    x[..., random.integers(width)] *= draw(st.sampled_from([1, 20]))
    return np.where(random.random(x.shape) < draw(st.sampled_from([0.0, 0.3])), 0.0, x)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", [FP8, INT8], ids=lambda op: str(op.name))
def test_all_implementations_return_the_codes_of_the_oracle(implementations: OpImplementations, op: Any, dtype: str) -> None:
    @settings(max_examples=examples(13 if dtype == "float32" else 4))
    @given(x=vectors(st.integers(1, 70)))
    def run(x: np.ndarray[Any, Any]) -> None:
        assert check(implementations, op, x, dtype) is None

    run()
    if op is INT8:
        assert check(implementations, op, np.random.default_rng(0).normal(size=(2, 5000)), dtype) is None


@pytest.mark.parametrize("dtype", TYPES)
def test_all_implementations_select_a_nearest_level(implementations: OpImplementations, dtype: str) -> None:
    @settings(max_examples=examples(10 if dtype == "float32" else 3))
    @given(x=vectors(st.sampled_from([16, 32, 64, 128])))
    def run(x: np.ndarray[Any, Any]) -> None:
        assert check(implementations, INT4, x, dtype) is None

    run()
    for width in (256, 512):
        assert check(implementations, INT4, np.random.default_rng(width).normal(size=(3, width)), dtype) is None


def special_float_vectors(width: int) -> np.ndarray[Any, Any]:
    """Return vectors with special float values and with values at the limits of float32."""
    random = np.random.default_rng(width)
    x = random.normal(size=(16, width))
    special_values = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-40, LARGEST, -LARGEST, 65504.0, -1.0]
    x[0] = random.choice(special_values, width)
    x[1] = random.choice([np.nan, np.inf, -np.inf, 0.0, -0.0], width)
    x[2, ::3] = np.nan
    x[3, ::5] = np.inf
    x[4, 1::4] = -np.inf
    x[5], x[6] = 0.0, -0.0
    x[7] *= 1e-40
    x[8] *= 3e-43
    x[8, :2] = 8.0e-43, -8.0e-43
    x[9] *= 1e38 / np.abs(x[9]).max()
    x[10] = random.choice([LARGEST, -LARGEST], width)
    x[11], x[12] = 1.0, 0.0
    x[12, width // 2] = -3.0
    x[13] = (-1.0) ** np.arange(width)
    x[14] = np.arange(width) == 1
    x[14, 0] = 1e-38
    x[15] = 1e-45
    return x


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", [FP8, INT8, INT4], ids=lambda op: str(op.name))
def test_special_float_values_follow_the_formula(implementations: OpImplementations, op: Any, dtype: str) -> None:
    assert check(implementations, op, special_float_vectors(32), dtype) is None
    if op is not INT4:
        assert check(implementations, op, special_float_vectors(7), dtype) is None


@pytest.mark.parametrize("dtype", TYPES)
def test_ties_round_to_even_codes(implementations: OpImplementations, dtype: str) -> None:
    """amax is the largest code, so the scale is 1; midpoints of adjacent values, and the floats next to them, are exact."""
    values = np.array([value for value, _ in E4M3])
    midpoints = (values[1:] + values[:-1]) / 2
    neighbors = [
        np.nextafter(midpoints, side, dtype=np.float32).astype(np.float64) for side in (np.float32(0), np.float32(1e9))
    ]
    for x in (midpoints, *neighbors):
        assert check(implementations, FP8, np.concatenate([x, -x, [448.0]])[None], dtype) is None
    half_integers = np.arange(-127, 127) + 0.5
    for x in (
        half_integers,
        np.nextafter(half_integers, 0, dtype=np.float32),
        np.nextafter(half_integers, half_integers * 2, dtype=np.float32),
    ):
        assert check(implementations, INT8, np.concatenate([x, [127.0]])[None], dtype) is None


def test_fp8_codes_match_a_cast(implementations: OpImplementations) -> None:
    """With scale 1, every float16 in range is cast as by ml_dtypes, except that zero is always positive."""
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = x[np.abs(x) <= 448]
    x = np.stack([x, np.full_like(x, 448)], axis=1)
    outputs = implementations.references.run(FP8, {"T": "float16"}, {}, {"x": x})
    cast = x.astype(ml_dtypes.float8_e4m3fn)
    expected = np.where(cast == 0, np.zeros((), cast.dtype), cast).view(np.int8)
    assert (outputs["scale"] == 1).all()
    assert (outputs["codes"] == expected).all()


def test_the_levels_satisfy_the_lloyd_max_conditions() -> None:
    """Each level is the mean of its cell, computed on a fine grid; rounding to half precision does not increase the error."""
    exact = np.array(lloyd_max())
    t = (np.arange(4_000_000) + 0.5) / 400_000  # to 10
    density = np.exp(-t * t / 2)
    density /= density.sum()
    nearest = np.searchsorted((exact[1:] + exact[:-1]) / 2, t)
    mass, moment = np.bincount(nearest, density), np.bincount(nearest, density * t)
    assert np.abs(moment / mass - exact).max() < 2e-6
    assert tuple(map(float, exact.astype(np.float16))) == LEVELS
    error = float(np.sum(density * (t - exact[nearest]) ** 2))
    rounded = float(np.sum(density * np.abs(t[:, None] - np.array(LEVELS)).min(axis=1) ** 2))
    assert error == pytest.approx(0.0095010080, rel=1e-6)
    assert rounded < error * (1 + 5e-6)


def test_compression_ratios() -> None:
    assert compression_ratio(FP8, 128) == compression_ratio(INT8, 128) == pytest.approx(1.94, abs=5e-3)
    assert compression_ratio(INT4, 128) == pytest.approx(3.76, abs=5e-3)
    assert compression_ratio(INT4, 128, element_bytes=4) == 2 * compression_ratio(INT4, 128)


MUTANTS = {
    "VectorQuantizeFp8": {
        "kernel": {
            "tl.div_rn(amax, 448.0)": "tl.div_rn(amax, 447.0)",
            'tl.where(size < float("inf"), size, 0.0)': "size",
            "tl.where(value == value, value, 0.0)": "value",
            "tl.where(scale > 0.0, scale, 1.0)": "scale",
        },
        "reference": {
            "b2 = op.GreaterOrEqual(rest,": "b2 = op.Less(rest,",
            "op.And(op.Less(value, zero), op.Greater(code, zero))": "op.Less(value, zero)",
        },
    },
    "VectorQuantizeInt8": {
        "kernel": {
            "tl.maximum(tl.minimum(ratio, limit), -limit)": "ratio",
            "- 0x4B400000": "- 0x4B400001",
            "2.679388389e36": "2.7e36",
        },
        "reference": {
            "value_float=-127.0": "value_float=-128.0",
            "op.Cast(op.Round(ratio)": "op.Cast(op.Floor(ratio)",
        },
    },
    "VectorQuantizeInt4": {
        "kernel": {
            "(uneven << 4)": "(uneven << 5)",
            "apply_signs(columns, A, B, BLOCK_R * B)": "columns",
            "(2, 1, 0)), (B, BLOCK_R * A)": "(2, 0, 1)), (B, BLOCK_R * A)",
            "(254 - field) << 23": "(253 - field) << 23",
            "packed, mask=row[:, None] < rows": "packed, mask=row[:, None] >= 0",
            "tl.sqrt_rn(square * (1.0 / D))": "tl.sqrt_rn(square)",
        },
        "reference": {
            "[1.0, 16.0]": "[16.0, 1.0]",
            "range(1, 10)": "range(2, 11)",
            "value_float=2.0**-96)), op.Constant(value_float=2.0**120)": "value_float=2.0**-96)), one",
            "op.Greater(size, op.Constant(value_float=T6))": "op.Greater(size, op.Constant(value_float=T5))",
        },
    },
}


def find_any_mismatch(implementations: OpImplementations, op: Op) -> str | None:
    normal = np.random.default_rng(1).normal(size=(3, 32))
    return check(implementations, op, normal, "float32") or check(implementations, op, special_float_vectors(32), "float32")


test_mutants_are_detected = mutant_test(find_any_mismatch, MUTANTS)


def test_unsupported_inputs_are_rejected() -> None:
    for op, dtype, width, message in (
        (INT4, "float32", 96, r"needs power_of_two\(D\) == D, and here D = 96"),
        (INT4, "float32", 1024, r"D is 1024, and must be in \[16, 512\]"),
        (FP8, "float32", 10000, r"D is 10000, and must be in \[1, 8192\]"),
        (INT8, "float64", 8, "T is float64"),
    ):
        with pytest.raises(ShapeError, match=message):
            Specialization(op, {"T": dtype}, {}, {"ROWS": 4, "D": width})
    with pytest.raises(ShapeError, match=r"ROWS is 0, and must be in"):
        INT8.bind_dims({"x": (2, 0, 8)}, {})
