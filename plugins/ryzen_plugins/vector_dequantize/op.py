"""Declarations of the ops VectorDequantizeFp8, VectorDequantizeInt8, VectorDequantizeInt4 and VectorDequantizeRotatedInt4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, KernelSpec, Op, TensorParam

_SCALE = TensorParam("scale", "float32", "...", "factor by which the decoded codes are multiplied")
_LIKE = TensorParam("like", "T", "", "a scalar of the element type of x; its value is ignored")
_TOLERANCE = {"float32": 0.0, "float16": 0.0, "bfloat16": 8e-3}
"""One product, rounded once. For bfloat16, Triton's interpreter truncates where GPUs round."""
_TACTICS = (
    {"ELEMENTS": 1024, "num_warps": 2},
    {"ELEMENTS": 4096, "num_warps": 4},
    {"ELEMENTS": 4096, "num_warps": 8},
)


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return codes [ROWS, 1, D or BYTES] of all values, including NaN codes, and scales of varying size, including 0."""
    rows, width = dims["ROWS"], dims["D"] if "D" in dims else dims["BYTES"]
    scale = np.exp(random.normal(size=(rows, 1))) / 32
    return {
        "codes": random.integers(-128, 128, size=(rows, 1, width)).astype(np.int8),
        "scale": scale * (random.random((rows, 1)) < 0.9),
        "like": np.zeros(()),
    }


def _byte_kernel_spec(function: str) -> KernelSpec:
    """Return the kernel specification of an op with one code per byte."""
    return KernelSpec(
        source=f"ryzen_plugins.vector_dequantize.kernel:{function}",
        scalars={"rows": "ROWS"},
        constants={"D": "D", "BLOCK_D": "power_of_two(D)", "BLOCK_R": "max(1, ELEMENTS // power_of_two(D))"},
        static_dims=frozenset("D"),
        grid=("ceil_div(ROWS, BLOCK_R)",),
        tactics=_TACTICS,
    )


VECTOR_DEQUANTIZE_FP8 = Op(
    domain="ryzen",
    name="VectorDequantizeFp8",
    version=1,
    description="reconstruct vectors from float8 e4m3 codes and scales",
    formula="""
        x = value(codes) * scale                           in float32, rounded to T; values out of range become infinite
        value(codes) is the float8 e4m3 number with these bits; 0x7F and 0xFF are NaN
    """,
    inputs=(TensorParam("codes", "int8", "... D", "bits of float8 e4m3"), _SCALE, _LIKE),
    outputs=(TensorParam("x", "T", "... D"),),
    type_constraints={"T": FLOATS},
    reference="ryzen_plugins.vector_dequantize.reference:VectorDequantizeFp8",
    dim_limits={"ROWS": (1, 2**31 - 1), "D": (1, 8192)},
    tolerance=_TOLERANCE,
    kernel=_byte_kernel_spec("vector_dequantize_fp8"),
    bytes_moved="ROWS * (D * (size_T + 1) + 4)",
    typical_dims={"ROWS": 32768, "D": 128},
    test_cases=({"ROWS": 3, "D": 40}, {"ROWS": 5, "D": 128}),
    make_inputs=_make_inputs,
)

VECTOR_DEQUANTIZE_INT8 = Op(
    domain="ryzen",
    name="VectorDequantizeInt8",
    version=1,
    description="reconstruct vectors from 8-bit integer codes and scales",
    formula="""
        x = codes * scale                                  in float32, rounded to T; values out of range become infinite
    """,
    inputs=(TensorParam("codes", "int8", "... D", "integers"), _SCALE, _LIKE),
    outputs=(TensorParam("x", "T", "... D"),),
    type_constraints={"T": FLOATS},
    reference="ryzen_plugins.vector_dequantize.reference:VectorDequantizeInt8",
    dim_limits={"ROWS": (1, 2**31 - 1), "D": (1, 8192)},
    tolerance=_TOLERANCE,
    kernel=_byte_kernel_spec("vector_dequantize_int8"),
    bytes_moved="ROWS * (D * (size_T + 1) + 4)",
    typical_dims={"ROWS": 32768, "D": 128},
    test_cases=({"ROWS": 3, "D": 40}, {"ROWS": 5, "D": 128}),
    make_inputs=_make_inputs,
)

_CODE = """
        D     = 2 * BYTES;  code[2 e] = the low 4 bits of codes[e], code[2 e + 1] = the high 4 bits
        y[d]  = level[code[d] % 8], negated if code[d] >= 8;  level, s and H are those of VectorQuantizeInt4"""
_ROUNDED = """
                in float32, rounded to T; values out of range become infinite
    """
_PACKED_CODES = TensorParam("codes", "int8", "... BYTES", "two codes per byte, the even element in the low bits")


def _packed_kernel_spec(unrotate: int) -> KernelSpec:
    """Return the kernel specification of an op with two codes per byte."""
    return KernelSpec(
        source="ryzen_plugins.vector_dequantize.kernel:vector_dequantize_int4",
        scalars={"rows": "ROWS"},
        constants={
            "D": "2 * BYTES",
            "A": "max(16, BYTES // 8)",
            "B": "min(BYTES // 8, 16)",
            "UNROTATE": str(unrotate),
            "BLOCK_R": "max(1, ELEMENTS // (2 * BYTES))",
        },
        static_dims=frozenset({"BYTES"}),
        grid=("ceil_div(ROWS, BLOCK_R)",),
        tactics=(
            {"ELEMENTS": 512, "num_warps": 1},
            {"ELEMENTS": 2048, "num_warps": 4},
            {"ELEMENTS": 4096, "num_warps": 4},
        ),
    )


VECTOR_DEQUANTIZE_INT4 = Op(
    domain="ryzen",
    name="VectorDequantizeInt4",
    version=1,
    description="reconstruct vectors from rotated 4-bit codes and scales",
    formula=_CODE
    + """
        x     = scale * diag(s) H y"""
    + _ROUNDED,
    inputs=(_PACKED_CODES, _SCALE, _LIKE),
    outputs=(TensorParam("x", "T", "... 2*BYTES"),),
    type_constraints={"T": FLOATS},
    reference="ryzen_plugins.vector_dequantize.reference:VectorDequantizeInt4",
    dim_limits={"ROWS": (1, 2**31 - 1), "BYTES": (8, 256)},
    constraints=("power_of_two(BYTES) == BYTES",),
    tolerance={"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3},
    kernel=_packed_kernel_spec(1),
    bytes_moved="ROWS * (BYTES * (1 + 2 * size_T) + 4)",
    typical_dims={"ROWS": 32768, "BYTES": 64},
    test_cases=({"ROWS": 3, "BYTES": 8}, {"ROWS": 5, "BYTES": 64}),
    make_inputs=_make_inputs,
)

VECTOR_DEQUANTIZE_ROTATED_INT4 = Op(
    domain="ryzen",
    name="VectorDequantizeRotatedInt4",
    version=1,
    description="reconstruct vectors from rotated 4-bit codes and scales, in the rotated basis",
    formula=_CODE
    + """
        x     = scale * y                                  H diag(s) times the result of VectorDequantizeInt4"""
    + _ROUNDED,
    inputs=(_PACKED_CODES, _SCALE, _LIKE),
    outputs=(TensorParam("x", "T", "... 2*BYTES"),),
    type_constraints={"T": FLOATS},
    reference="ryzen_plugins.vector_dequantize.reference:VectorDequantizeRotatedInt4",
    dim_limits={"ROWS": (1, 2**31 - 1), "BYTES": (8, 256)},
    constraints=("power_of_two(BYTES) == BYTES",),
    tolerance=_TOLERANCE,
    kernel=_packed_kernel_spec(0),
    bytes_moved="ROWS * (BYTES * (1 + 2 * size_T) + 4)",
    typical_dims={"ROWS": 32768, "BYTES": 64},
    test_cases=({"ROWS": 3, "BYTES": 8}, {"ROWS": 5, "BYTES": 64}),
    make_inputs=_make_inputs,
)
