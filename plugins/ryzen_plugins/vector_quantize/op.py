"""The declarations of VectorQuantizeFp8, VectorQuantizeInt8 and VectorQuantizeInt4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import FLOATS, KernelSpec, Op, TensorParam

_X = TensorParam("x", "T", "... D", "the vectors, along the last axis")
_SCALE = TensorParam("scale", "float32", "...", "what the values that the codes stand for are multiplied by")
_NOT_FINITE = """
        amax  = the largest finite |x[d]|;  v[d] = x[d], where NaN counts as 0 and an infinity as amax with its sign"""


def compression_ratio(op: Op, vector_size: int, *, element_bytes: int = 2) -> float:
    """Return how many times smaller the outputs of `op` are than a vector of `width` elements of `element_bytes` each."""
    shapes = op.output_shapes({"...": (), "D": vector_size})
    kept: int = sum(math.prod(shapes[port.name]) * numpy_dtype(port.type_str).itemsize for port in op.outputs)
    return vector_size * element_bytes / kept


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return vectors [ROWS, 1, D] of many sizes, an outlier in each, maybe one of zeros."""
    rows, width = dims["ROWS"], dims["D"]
    x = random.normal(size=(rows, width)) * np.exp(random.normal(size=(rows, 1)) * 2)
    x[:, random.integers(width)] *= 20
    x[random.integers(rows)] *= rows == 1 or random.random() < 0.5
    return {"x": x[:, None]}


def _byte_kernel_spec(function: str) -> KernelSpec:
    """Return how a kernel of one code a byte is run."""
    return KernelSpec(
        source=f"ryzen_plugins.vector_quantize.kernel:{function}",
        scalars={"rows": "ROWS"},
        constants={"D": "D", "BLOCK_D": "power_of_two(D)", "BLOCK_R": "max(1, ELEMENTS // power_of_two(D))"},
        static_dims=frozenset("D"),
        grid=("ceil_div(ROWS, BLOCK_R)",),
        tactics=(
            {"ELEMENTS": 1024, "num_warps": 2},
            {"ELEMENTS": 4096, "num_warps": 4},
            {"ELEMENTS": 4096, "num_warps": 8},
        ),
    )


VECTOR_QUANTIZE_FP8 = Op(
    domain="ryzen",
    name="VectorQuantizeFp8",
    version=1,
    description="quantise vectors to float8 e4m3 with a scale each",
    formula=_NOT_FINITE
    + """
        scale = amax / 448                                 in float32
        codes = the bits of the float8 e4m3 nearest to v[d] / scale, half to even, at most 448; a zero has code 0
                all codes are 0 where the scale is: x of zeros, or below what float32 can divide
    """,
    inputs=(_X,),
    outputs=(TensorParam("codes", "int8", "... D", "bits of float8 e4m3"), _SCALE),
    type_constraints={"T": FLOATS},
    reference="ryzen_plugins.vector_quantize.reference:VectorQuantizeFp8",
    dim_limits={"ROWS": (1, 2**31 - 1), "D": (1, 8192)},
    tolerance=dict.fromkeys(FLOATS, 0.0),
    kernel=_byte_kernel_spec("vector_quantize_fp8"),
    bytes_moved="ROWS * (D * (size_T + 1) + 4)",
    typical_dims={"ROWS": 32768, "D": 128},
    test_cases=({"ROWS": 3, "D": 40}, {"ROWS": 5, "D": 128}),
    make_inputs=_make_inputs,
)

VECTOR_QUANTIZE_INT8 = Op(
    domain="ryzen",
    name="VectorQuantizeInt8",
    version=1,
    description="quantise vectors to whole numbers of 8 bits with a scale each",
    formula=_NOT_FINITE
    + """
        scale = amax / 127                                 in float32, at most 2.679388389e36, so that 127 * scale is finite
        codes = v[d] / scale rounded to a whole number, half to even, within +-127; all 0 where the scale is
    """,
    inputs=(_X,),
    outputs=(TensorParam("codes", "int8", "... D", "whole numbers"), _SCALE),
    type_constraints={"T": FLOATS},
    reference="ryzen_plugins.vector_quantize.reference:VectorQuantizeInt8",
    dim_limits={"ROWS": (1, 2**31 - 1), "D": (1, 8192)},
    tolerance=dict.fromkeys(FLOATS, 0.0),
    kernel=_byte_kernel_spec("vector_quantize_int8"),
    bytes_moved="ROWS * (D * (size_T + 1) + 4)",
    typical_dims={"ROWS": 32768, "D": 128},
    test_cases=({"ROWS": 3, "D": 40}, {"ROWS": 5, "D": 128}),
    make_inputs=_make_inputs,
)

VECTOR_QUANTIZE_INT4 = Op(
    domain="ryzen",
    name="VectorQuantizeInt4",
    version=1,
    description="quantise vectors to 4 bits an element, in a rotated basis, with a scale each",
    formula=_NOT_FINITE
    + """
        s[j]  = -1 where j & (j >> 1) has an odd number of ones, else 1;  H[i, j] = (-1)^(ones of i & j) / sqrt(D)
        n     = ||v||;  y = sqrt(D) * H diag(s) v / n, and 0 where n is;  scale = n / sqrt(D)
        level = 0.12841796875, 0.387939453125, 0.65673828125, 0.9423828125,
                1.255859375, 1.6181640625, 2.068359375, 2.732421875 and their negatives: Lloyd's and Max's of N(0, 1)
        code  = the number 0..7 of the size of the level nearest to y[d], and 8 more where y[d] < 0
        codes = code[2 e] + 16 * code[2 e + 1]
    """,
    inputs=(_X,),
    outputs=(TensorParam("codes", "int8", "... D//2", "two codes a byte, the even element's in the low bits"), _SCALE),
    type_constraints={"T": FLOATS},
    reference="ryzen_plugins.vector_quantize.reference:VectorQuantizeInt4",
    dim_limits={"ROWS": (1, 2**31 - 1), "D": (16, 512)},
    constraints=("power_of_two(D) == D",),
    tolerance=dict.fromkeys(FLOATS, 1e-6),
    kernel=KernelSpec(
        source="ryzen_plugins.vector_quantize.kernel:vector_quantize_int4",
        scalars={"rows": "ROWS"},
        constants={
            "D": "D",
            "A": "max(16, D // 16)",
            "B": "min(D // 16, 16)",
            "BLOCK_R": "max(1, ELEMENTS // D)",
        },
        static_dims=frozenset("D"),
        grid=("ceil_div(ROWS, BLOCK_R)",),
        tactics=(
            {"ELEMENTS": 512, "num_warps": 1},
            {"ELEMENTS": 2048, "num_warps": 4},
            {"ELEMENTS": 4096, "num_warps": 4},
        ),
    ),
    bytes_moved="ROWS * (D * size_T + D // 2 + 4)",
    typical_dims={"ROWS": 32768, "D": 128},
    test_cases=({"ROWS": 3, "D": 16}, {"ROWS": 5, "D": 128}),
    make_inputs=_make_inputs,
)
