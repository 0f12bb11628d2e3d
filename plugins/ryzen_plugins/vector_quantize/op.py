"""Declarations of the ops VectorQuantizeFp8, VectorQuantizeInt8 and VectorQuantizeInt4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import FLOATS, KernelSpec, Op, TensorParam
from ryzen_plugins._declaration import RyzenOp
from ryzen_plugins._vector_kernels import ROW_LIMITS, byte_kernel_spec, packed_kernel_spec

_X = TensorParam("x", "T", "... D", "vectors along the last axis")
_SCALE = TensorParam("scale", "float32", "...", "factor by which the decoded codes are multiplied")
_NOT_FINITE = """
        amax  = the largest finite |x[d]|;  v[d] = x[d], with NaN replaced by 0 and +-infinity by +-amax"""


def compression_ratio(op: Op, vector_size: int, *, element_bytes: int = 2) -> float:
    """Return the compression ratio of `op` for vectors of `vector_size` elements of `element_bytes` bytes, including scales."""
    shapes = op.output_shapes({"...": (), "D": vector_size})
    stored_bytes: int = sum(math.prod(shapes[param.name]) * numpy_dtype(param.type_str).itemsize for param in op.outputs)
    return vector_size * element_bytes / stored_bytes


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return vectors [ROWS, 1, D] of varying norms, each with an outlier; one of them may be zero."""
    rows, width = dims["ROWS"], dims["D"]
    x = random.normal(size=(rows, width)) * np.exp(random.normal(size=(rows, 1)) * 2)
    x[:, random.integers(width)] *= 20
    x[random.integers(rows)] *= rows == 1 or random.random() < 0.5
    return {"x": x[:, None]}


def _quantize_op(
    codes_format: str,
    *,
    description: str,
    formula: str,
    codes: TensorParam,
    kernel: KernelSpec,
    widths: tuple[int, int] = (1, 8192),
    constraints: tuple[str, ...] = (),
    tolerance: float = 0.0,
    bytes_moved: str = "ROWS * (D * (size_T + 1) + 4)",
    test_widths: tuple[int, int] = (40, 128),
) -> Op:
    """Return the op that quantizes vectors of `widths` (minimum and maximum) elements to `codes` and one scale per vector.

    The defaults are those of ops with one code per byte.
    """
    return RyzenOp(
        name=f"VectorQuantize{codes_format}",
        description=description,
        formula=_NOT_FINITE + formula,
        inputs=(_X,),
        outputs=(codes, _SCALE),
        type_constraints={"T": FLOATS},
        reference=f"ryzen_plugins.vector_quantize.reference:VectorQuantize{codes_format}",
        dim_limits={"ROWS": ROW_LIMITS, "D": widths},
        constraints=constraints,
        tolerance=dict.fromkeys(FLOATS, tolerance),
        kernel=kernel,
        bytes_moved=bytes_moved,
        typical_dims={"ROWS": 32768, "D": 128},
        test_cases=({"ROWS": 3, "D": test_widths[0]}, {"ROWS": 5, "D": test_widths[1]}),
        make_inputs=_make_inputs,
    )


VECTOR_QUANTIZE_FP8 = _quantize_op(
    "Fp8",
    description="quantize vectors to float8 e4m3 with one scale per vector",
    formula="""
        scale = amax / 448                                 in float32
        codes = the bits of v[d] / scale, clamped to +-448 and rounded to the nearest float8 e4m3, ties to even; zero has code 0
                if the scale is 0 (x is zero, or amax / 448 underflows in float32), all codes are 0
    """,
    codes=TensorParam("codes", "int8", "... D", "bits of float8 e4m3"),
    kernel=byte_kernel_spec("ryzen_plugins.vector_quantize.kernel:vector_quantize_fp8"),
)

VECTOR_QUANTIZE_INT8 = _quantize_op(
    "Int8",
    description="quantize vectors to 8-bit integers with one scale per vector",
    formula="""
        scale = amax / 127                                 in float32, at most 2.679388389e36, so that 127 * scale is finite
        codes = v[d] / scale rounded to the nearest integer, ties to even, clamped to +-127; if the scale is 0, all codes are 0
    """,
    codes=TensorParam("codes", "int8", "... D", "integers in [-127, 127]"),
    kernel=byte_kernel_spec("ryzen_plugins.vector_quantize.kernel:vector_quantize_int8"),
)

VECTOR_QUANTIZE_INT4 = _quantize_op(
    "Int4",
    description="quantize vectors to 4 bits per element in a rotated basis, with one scale per vector",
    formula="""
        s[j]  = -1 if j & (j >> 1) has an odd number of ones, else 1;  H[i, j] = (-1)^(number of ones of i & j) / sqrt(D)
        n     = ||v||;  y = sqrt(D) * H diag(s) v / n, or 0 if n is 0;  scale = n / sqrt(D)
        level = 0.12841796875, 0.387939453125, 0.65673828125, 0.9423828125,
                1.255859375, 1.6181640625, 2.068359375, 2.732421875 and their negatives: the Lloyd-Max levels of N(0, 1)
        code  = the index 0..7 of the magnitude of the level nearest to y[d], plus 8 if y[d] < 0
        codes = code[2 e] + 16 * code[2 e + 1]
    """,
    codes=TensorParam("codes", "int8", "... D//2", "two codes per byte, the even element in the low bits"),
    widths=(16, 512),
    constraints=("power_of_two(D) == D",),
    tolerance=1e-6,
    kernel=packed_kernel_spec(
        "ryzen_plugins.vector_quantize.kernel:vector_quantize_int4",
        dim="D",
        constants={"D": "D", "A": "max(16, D // 16)", "B": "min(D // 16, 16)", "BLOCK_R": "max(1, ELEMENTS // D)"},
    ),
    bytes_moved="ROWS * (D * size_T + D // 2 + 4)",
    test_widths=(16, 128),
)
