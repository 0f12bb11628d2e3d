"""Declarations of the ops VectorDequantizeFp8, VectorDequantizeInt8, VectorDequantizeInt4 and VectorDequantizeRotatedInt4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, KernelSpec, Op, TensorParam
from ryzen_plugins._declaration import RyzenOp
from ryzen_plugins._vector_kernels import ROW_LIMITS, byte_kernel_spec, packed_kernel_spec

_SCALE = TensorParam("scale", "float32", "...", "factor by which the decoded codes are multiplied")
_LIKE = TensorParam("like", "T", "", "a scalar of the element type of x; its value is ignored")
_TOLERANCE = {"float32": 0.0, "float16": 0.0, "bfloat16": 8e-3}
"""One product, rounded once. For bfloat16, Triton's interpreter truncates where GPUs round."""
_CODE = """
        D     = 2 * BYTES;  code[2 e] = the low 4 bits of codes[e], code[2 e + 1] = the high 4 bits
        y[d]  = level[code[d] % 8], negated if code[d] >= 8;  level, s and H are those of VectorQuantizeInt4"""
_ROUNDED = """
                in float32, rounded to T; values out of range become infinite
    """


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return codes [ROWS, 1, D or BYTES] of all values, including NaN codes, and scales of varying size, including 0."""
    rows, width = dims["ROWS"], dims["D"] if "D" in dims else dims["BYTES"]
    scale = np.exp(random.normal(size=(rows, 1))) / 32
    return {
        "codes": random.integers(-128, 128, size=(rows, 1, width)).astype(np.int8),
        "scale": scale * (random.random((rows, 1)) < 0.9),
        "like": np.zeros(()),
    }


def _dequantize_op(
    codes_format: str,
    *,
    description: str,
    formula: str,
    codes: TensorParam,
    width: tuple[int, int],
    tolerance: Mapping[str, float],
    kernel: KernelSpec,
    bytes_moved: str,
    typical_width: int,
    test_width: int,
) -> Op:
    """Return the op that reconstructs vectors of `width` (minimum and maximum) codes, one per element or two per byte."""
    dim = codes.dims.split()[-1]
    return RyzenOp(
        name=f"VectorDequantize{codes_format}",
        description=description,
        formula=formula,
        inputs=(codes, _SCALE, _LIKE),
        outputs=(TensorParam("x", "T", "... D" if dim == "D" else "... 2*BYTES"),),
        type_constraints={"T": FLOATS},
        reference=f"ryzen_plugins.vector_dequantize.reference:VectorDequantize{codes_format}",
        dim_limits={"ROWS": ROW_LIMITS, dim: width},
        constraints=() if dim == "D" else ("power_of_two(BYTES) == BYTES",),
        tolerance=tolerance,
        kernel=kernel,
        bytes_moved=bytes_moved,
        typical_dims={"ROWS": 32768, dim: typical_width},
        test_cases=({"ROWS": 3, dim: test_width}, {"ROWS": 5, dim: typical_width}),
        make_inputs=_make_inputs,
    )


def _byte_op(codes_format: str, *, description: str, formula: str, codes: str) -> Op:
    """Return an op with one code per byte; `codes` describes the codes."""
    return _dequantize_op(
        codes_format,
        description=description,
        formula=formula,
        codes=TensorParam("codes", "int8", "... D", codes),
        width=(1, 8192),
        tolerance=_TOLERANCE,
        kernel=byte_kernel_spec(f"ryzen_plugins.vector_dequantize.kernel:vector_dequantize_{codes_format.lower()}"),
        bytes_moved="ROWS * (D * (size_T + 1) + 4)",
        typical_width=128,
        test_width=40,
    )


def _packed_op(codes_format: str, *, description: str, formula: str, tolerance: Mapping[str, float], unrotate: int) -> Op:
    """Return an op with two codes per byte; `formula` is that of x from y."""
    return _dequantize_op(
        codes_format,
        description=description,
        formula=f"{_CODE}{formula}{_ROUNDED}",
        codes=TensorParam("codes", "int8", "... BYTES", "two codes per byte, the even element in the low bits"),
        width=(8, 256),
        tolerance=tolerance,
        kernel=packed_kernel_spec(
            "ryzen_plugins.vector_dequantize.kernel:vector_dequantize_int4",
            dim="BYTES",
            constants={
                "D": "2 * BYTES",
                "A": "max(16, BYTES // 8)",
                "B": "min(BYTES // 8, 16)",
                "UNROTATE": str(unrotate),
                "BLOCK_R": "max(1, ELEMENTS // (2 * BYTES))",
            },
        ),
        bytes_moved="ROWS * (BYTES * (1 + 2 * size_T) + 4)",
        typical_width=64,
        test_width=8,
    )


VECTOR_DEQUANTIZE_FP8 = _byte_op(
    "Fp8",
    description="reconstruct vectors from float8 e4m3 codes and scales",
    formula="""
        x = value(codes) * scale                           in float32, rounded to T; values out of range become infinite
        value(codes) is the float8 e4m3 number with these bits; 0x7F and 0xFF are NaN
    """,
    codes="bits of float8 e4m3",
)

VECTOR_DEQUANTIZE_INT8 = _byte_op(
    "Int8",
    description="reconstruct vectors from 8-bit integer codes and scales",
    formula="""
        x = codes * scale                                  in float32, rounded to T; values out of range become infinite
    """,
    codes="integers",
)

VECTOR_DEQUANTIZE_INT4 = _packed_op(
    "Int4",
    description="reconstruct vectors from rotated 4-bit codes and scales",
    formula="""
        x     = scale * diag(s) H y""",
    tolerance={"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3},
    unrotate=1,
)

VECTOR_DEQUANTIZE_ROTATED_INT4 = _packed_op(
    "RotatedInt4",
    description="reconstruct vectors from rotated 4-bit codes and scales, in the rotated basis",
    formula="""
        x     = scale * y                                  H diag(s) times the result of VectorDequantizeInt4""",
    tolerance=_TOLERANCE,
    unrotate=0,
)
