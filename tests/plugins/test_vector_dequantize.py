"""VectorDequantizeFp8, -Int8 and -Int4 against Python loops in float64, and the error of a quantization round trip."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.op_implementations import Arrays, Attributes, OpImplementations, mutant_test, op_inputs

from ryzen_compile.errors import ShapeError
from ryzen_compile.kernels import Specialization
from ryzen_compile.registry import find_op
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import Op

OPS = FP8, INT8, ROTATED, INT4 = [find_op(f"VectorDequantize{name}") for name in ("Fp8", "Int8", "RotatedInt4", "Int4")]
PACKED_OPS = (ROTATED.name, INT4.name)
TYPES = FP8.type_constraints["T"]
LEVELS = (0.12841796875, 0.387939453125, 0.65673828125, 0.9423828125, 1.255859375, 1.6181640625, 2.068359375, 2.732421875)


def decode_e4m3(bits: int) -> float:
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
    """Return the values of codes before scaling and rotation."""
    rows = codes.reshape(-1, codes.shape[-1]).astype(np.int64)
    if op.name == INT8.name:
        return rows.astype(np.float64)
    if op.name == FP8.name:
        return np.array([[decode_e4m3(byte & 255) for byte in row] for row in rows])
    nibbles = [[nibble for byte in row for nibble in (byte & 15, (byte >> 4) & 15)] for row in rows]
    return np.array([[-LEVELS[nibble - 8] if nibble > 7 else LEVELS[nibble] for nibble in row] for row in nibbles])


def oracle(op: Op) -> Any:
    """Return the oracle of `op` in float64; the tolerance of T covers the rounding."""

    def exact(x: Arrays, attributes: Attributes) -> dict[str, np.ndarray[Any, Any]]:
        result = values(op, x["codes"])
        if op.name == INT4.name:
            result = result @ rotation(result.shape[1])
        with np.errstate(invalid="ignore"):
            result = result * x["scale"].reshape(-1, 1)
        return {"x": result.reshape(*x["scale"].shape, -1)}

    return exact


def exact_output_check(op: Op, dtype: str) -> Any:
    """Return a check for codes without rotation: each output is one float32 product, rounded to T, compared bitwise.

    For bfloat16 the result may also be truncated, and subnormal results are not checked, because of Triton's interpreter.
    """

    def find_error(x: Arrays, outputs: Arrays) -> str | None:
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            product = values(op, x["codes"]).astype(np.float32) * x["scale"].reshape(-1, 1)
            allowed = [product.astype(numpy_dtype(dtype))]
            if dtype == "bfloat16":
                allowed.append((product.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(allowed[0].dtype))
        actual = outputs["x"].reshape(product.shape)
        differs = ~np.any([(actual == value) | (np.isnan(actual) & np.isnan(value)) for value in allowed], axis=0)
        differs &= (np.abs(product) >= 2.0**-126) | (dtype != "bfloat16")
        if actual.dtype != allowed[0].dtype or differs.any():
            index = tuple(map(int, np.argwhere(differs)[0]))
            return f"at {index} it is {actual[index]}, expected {allowed[0][index]}"
        return None

    return find_error


def check(implementations: OpImplementations, op: Op, x: Arrays, dtype: str) -> str | None:
    """Return the first mismatch of an implementation of `op` for the inputs `x`, or None."""
    exact = op.name != INT4.name
    return implementations.check(
        op,
        None if exact else oracle(op),
        dims={"ROWS": x["scale"].size, "BYTES" if op.name in PACKED_OPS else "D": x["codes"].shape[-1]},
        attributes={},
        type_bindings={"T": dtype},
        inputs={**x, "like": np.zeros((), numpy_dtype(dtype))},
        output_check=exact_output_check(op, dtype) if exact else None,
    )


@st.composite
def code_inputs(draw: st.DrawFn, widths: st.SearchStrategy[int]) -> dict[str, np.ndarray[Any, Any]]:
    """Draw codes of every rank and value, and scales of every magnitude, including zero."""
    lead, width = draw(st.lists(st.integers(1, 3), max_size=3)), draw(widths)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** random.uniform(-4, 1, size=lead) * (random.random(lead) < 0.9)
    return {
        "codes": random.integers(-128, 128, size=(*lead, width)).astype(np.int8),
        "scale": np.asarray(scale, np.float32),
    }


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_all_implementations_match_the_oracle(implementations: OpImplementations, op: Op, dtype: str) -> None:
    widths = st.sampled_from([8, 16, 32, 64]) if op.name in PACKED_OPS else st.integers(1, 70)

    @settings(max_examples=examples(10 if dtype == "float32" else 3))
    @given(x=code_inputs(widths))
    def run(x: Arrays) -> None:
        assert check(implementations, op, x, dtype) is None

    run()
    if op.name in PACKED_OPS:
        for width in (128, 256):
            inputs = op_inputs(INT4, {"ROWS": 3, "BYTES": width}, seed=width)
            x = {"codes": inputs["codes"], "scale": inputs["scale"].astype(np.float32)}
            assert check(implementations, op, x, dtype) is None


SPECIAL_SCALES = [0.0, -0.0, 1e-45, 1e-40, 1e-30, 1e-7, 0.3, -2.5, 300.0, 6e4, 1e30, 3e35, 3e38, np.inf, np.nan]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", OPS[:3], ids=str)
def test_every_code_with_special_float_scales(implementations: OpImplementations, op: Op, dtype: str) -> None:
    codes = np.tile(np.arange(-128, 128).astype(np.int8), (len(SPECIAL_SCALES), 1))
    assert check(implementations, op, {"codes": codes, "scale": np.array(SPECIAL_SCALES, np.float32)}, dtype) is None


def test_scales_at_the_limits_of_float32_are_supported(implementations: OpImplementations) -> None:
    codes = np.random.default_rng(0).integers(-128, 128, size=(4, 32)).astype(np.int8)
    for scale in (5e37, 1e-40, 3e-45):
        x = {"codes": codes, "scale": np.full(4, scale, np.float32), "like": np.zeros((), np.float32)}
        float64 = {**x, "scale": x["scale"].astype(np.float64)}
        exact = oracle(INT4)(float64, {})["x"]
        for output in (
            implementations.references.run(INT4, {"T": "float32"}, {}, x)["x"],
            implementations.interpreter.run(Specialization(INT4, {"T": "float32"}, {}, {"ROWS": 4, "BYTES": 32}), x)["x"],
        ):
            assert np.abs(output - exact).max() <= 1e-5 * scale + 1.5e-45


def round_trip(
    implementations: OpImplementations, variant: str, x: np.ndarray[Any, Any], *, rotated: str = ""
) -> tuple[Any, Any]:
    """Quantize and dequantize `x` with the references on ONNX Runtime; return the result and the scales."""
    type_bindings = {"T": str(x.dtype)}
    quantized = implementations.references.run(find_op(f"VectorQuantize{variant}"), type_bindings, {}, {"x": x})
    dequantized = implementations.references.run(
        find_op(f"VectorDequantize{rotated}{variant}"), type_bindings, {}, {**quantized, "like": np.zeros((), x.dtype)}
    )
    return dequantized["x"], quantized["scale"]


def relative_error(x: np.ndarray[Any, Any], restored: np.ndarray[Any, Any]) -> float:
    """Return the mean of ||x - restored||^2 / ||x||^2 over the vectors."""
    x, restored = x.astype(np.float64), restored.astype(np.float64)
    return float(np.mean(np.sum((x - restored) ** 2, axis=-1) / np.sum(x * x, axis=-1)))


@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_error_of_4_bit_codes_on_gaussian_vectors_matches_theory(implementations: OpImplementations, width: int) -> None:
    x = np.random.default_rng(width).normal(size=(400_000 // width, width)).astype(np.float32)
    restored, _ = round_trip(implementations, "Int4", x)
    assert relative_error(x, restored) == pytest.approx(0.0095, rel=0.05)


def test_4_bit_codes_handle_outliers_better_than_uniform_codes(implementations: OpImplementations) -> None:
    """Vectors with two channels 20 times larger, compared with the best uniform 4-bit quantization with one scale per token."""
    x = np.random.default_rng(0).normal(size=(3000, 128)).astype(np.float32)
    x[:, [5, 77]] *= 20
    restored, _ = round_trip(implementations, "Int4", x)
    assert relative_error(x, restored) < 0.0095
    amax = np.abs(x).max(axis=1, keepdims=True)
    uniform = [np.clip(np.rint(x / amax * max_code), -8, 7) * amax / max_code for max_code in (7, 7.5, 8)]
    uniform.append((np.clip(np.floor(x / amax * 7.5), -8, 7) + 0.5) * amax / 7.5)
    assert min(relative_error(x, candidate) for candidate in uniform) > 5 * relative_error(x, restored)


@pytest.mark.parametrize("width", [16, 64, 128, 512])
def test_structured_vectors_have_a_small_error(implementations: OpImplementations, width: int) -> None:
    """Constants, alternations, steps, ramps, waves, single elements: a Hadamard matrix alone may map them to one spike."""
    i = np.arange(width)
    waves = [np.cos(2 * np.pi * f * i / width + phase) for f in (1, 2, 3, 5, width // 4) for phase in (0.0, 0.7)]
    x = np.array([i * 0 + 1, (-1) ** i, i < width // 2, i + 1, i == 0, i == 3, *waves], np.float32)
    restored, _ = round_trip(implementations, "Int4", x)
    for vector, result in zip(x, restored, strict=True):
        assert relative_error(vector[None], result[None]) < 0.03


@settings(max_examples=examples(15))
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 200), size=st.floats(-30, 33))
def test_the_error_of_8_bit_codes_matches_theory(
    implementations: OpImplementations, seed: int, width: int, size: float
) -> None:
    """Fp8: 2^-4 of each element, or half a step of the subnormals; Int8: half a step; no value becomes infinite."""
    random = np.random.default_rng(seed)
    x = (random.normal(size=(5, width)) * random.exponential(size=(5, width)) ** 3 * 10.0**size).astype(np.float32)
    restored, scale = round_trip(implementations, "Fp8", x)
    error = np.abs(x.astype(np.float64) - restored)
    assert (error <= np.maximum(np.abs(x.astype(np.float64)) * 2.0**-4, scale[:, None] * 2.0**-10) * (1 + 1e-6)).all()
    restored, scale = round_trip(implementations, "Int8", x)
    assert (np.abs(x.astype(np.float64) - restored) <= scale[:, None] * (0.5 + 127 * 2.0**-23)).all()


@pytest.mark.parametrize("variant", ["Fp8", "Int8"])
def test_the_largest_values_stay_finite_and_zero_stays_zero(implementations: OpImplementations, variant: str) -> None:
    for dtype in TYPES:
        largest = ml_dtypes.finfo(numpy_dtype(dtype)).max
        x = np.array([[largest, -largest, 1], [0, -0.0, 0], [np.nan, np.inf, -2]], numpy_dtype(dtype))
        restored, scale = round_trip(implementations, variant, x)
        float64 = restored.astype(np.float64)
        assert np.isfinite(float64).all()
        assert np.abs(float64[0, :2] / [float(largest), -float(largest)] - 1).max() < 1e-2
        assert (float64[1] == 0).all() and scale[1] == 0  # noqa: PT018
        assert np.abs(float64[2] - [0, 2, -2]).max() < 1e-2


def test_rotated_queries_and_keys_preserve_dot_products(implementations: OpImplementations) -> None:
    """<q, k> of unrotated keys k equals <H diag(s) q, k'> of the keys k' in the rotated basis."""
    random = np.random.default_rng(4)
    keys, query = random.normal(size=(50, 64)).astype(np.float32), random.normal(size=64)
    rotated, _ = round_trip(implementations, "Int4", keys, rotated="Rotated")
    restored, _ = round_trip(implementations, "Int4", keys)
    assert np.abs(rotated @ (rotation(64) @ query) - restored @ query).max() < 1e-4
    assert relative_error(keys @ rotation(64).T, rotated) < 0.011


MUTANTS = {
    "VectorDequantizeFp8": {
        "kernel": {
            "decode_e4m3(code) * tl.load": "decode_e4m3(code) / tl.load",
            "decode_e4m3(code)": "decode_e4m3(code & 127)",
        },
        "reference": {
            "exponent - 10": "exponent - 9",
            "(-1 if byte >= 128 else 1)": "1",
        },
    },
    "VectorDequantizeInt8": {
        "kernel": {
            "code.to(tl.float32)": "(code & 127).to(tl.float32)",
        },
        "reference": {
            "number = op.Cast(codes, to=FLOAT.dtype)": "number = op.Abs(op.Cast(codes, to=FLOAT.dtype))",
        },
    },
    "VectorDequantizeRotatedInt4": {
        "kernel": {
            "decode_level(packed >> 4)": "decode_level(packed >> 3)",
            "if UNROTATE:": "if True:",
        },
        "reference": {
            "(byte % 16, byte // 16)": "(byte // 16, byte % 16)",
        },
    },
    "VectorDequantizeInt4": {
        "kernel": {
            "apply_signs(hadamard(turned, A, BLOCK_R * B), A, B, BLOCK_R * B)": "hadamard(turned, A, BLOCK_R * B)",
            "(1, 2, 0)), (BLOCK_R, D)": "(2, 1, 0)), (BLOCK_R, D)",
            "1.0 / D": "2.0 / D",
            "element_ty), mask=row[:, None] < rows)": "element_ty), mask=row[:, None] >= 0)",
        },
        "reference": {
            "odd)), perm=[1, 0])": "odd)), perm=[0, 1])",
        },
    },
}


def find_any_mismatch(implementations: OpImplementations, op: Op) -> str | None:
    random = np.random.default_rng(3)
    codes, scale = random.integers(-128, 128, size=(3, 32)).astype(np.int8), random.exponential(size=3).astype(np.float32)
    return check(implementations, op, {"codes": codes, "scale": scale}, "float32")


test_mutants_are_detected = mutant_test(find_any_mismatch, MUTANTS)


def test_unsupported_inputs_are_rejected() -> None:
    with pytest.raises(ShapeError, match=r"needs power_of_two\(BYTES\) == BYTES, and here BYTES = 48"):
        Specialization(INT4, {"T": "float32"}, {}, {"ROWS": 4, "BYTES": 48})
    with pytest.raises(ShapeError, match=r"BYTES is 4, and must be in \[8, 256\]"):
        Specialization(INT4, {"T": "float32"}, {}, {"ROWS": 4, "BYTES": 4})
    with pytest.raises(ShapeError, match="`scale` has leading dims"):
        FP8.bind_dims({"codes": (2, 3, 8), "scale": (3, 2), "like": ()}, {})
    with pytest.raises(ShapeError, match="`like` has 1 dimensions"):
        INT8.bind_dims({"codes": (2, 8), "scale": (2,), "like": (1,)}, {})
    with pytest.raises(ShapeError, match="T is int8"):
        Specialization(INT8, {"T": "int8"}, {}, {"ROWS": 4, "D": 8})
