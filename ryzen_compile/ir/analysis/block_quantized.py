"""Contrib ops of ONNX Runtime with weights that are quantized in blocks: what shape and type inference know about them.

MatMulNBits multiplies by, and GatherBlockQuantized reads rows of, a matrix in 2 to 8 bits with a scale for each block of a row.
The dequantized matrix determines the shapes of their outputs.
"""

from __future__ import annotations

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute_or_none
from ryzen_compile.ir.analysis.value_info import ValueInfo

_DOMAIN = "com.microsoft"
MATMUL_NBITS = (_DOMAIN, "MatMulNBits")
GATHER_BLOCK_QUANTIZED = (_DOMAIN, "GatherBlockQuantized")
BLOCK_QUANTIZED_OPS = frozenset({MATMUL_NBITS, GATHER_BLOCK_QUANTIZED})
"""(domain, op type) of the ops."""
TYPE_SOURCE_INPUTS = {MATMUL_NBITS: 0, GATHER_BLOCK_QUANTIZED: 2}
"""(domain, op type) -> the input whose element type the output has: the activations, or the scales."""


def op_key(node: ir.Node) -> tuple[str, str]:
    """Return (domain, op type) of `node`."""
    return node.domain, node.op_type


def dense_weight_dims(node: ir.Node, data: ValueInfo | None) -> tuple[int, int] | None:
    """Return the shape of the dequantized matrix of `node`, one of BLOCK_QUANTIZED_OPS; None if it is unknown.

    It is (features, outputs) of a MatMulNBits, and (rows, features) of a GatherBlockQuantized over the rows of its first input
    `data`. Elements of less than 8 bits are packed into the uint8 of the last axis.
    """
    if op_key(node) == MATMUL_NBITS:
        sizes: list[int | None] = [int_attribute_or_none(node, name, 0) for name in ("K", "N")]
    else:
        bits = int_attribute_or_none(node, "bits", 4)
        if data is None or data.dims is None or len(data.dims) != 2 or data.dtype is None or not bits:
            return None
        if int_attribute_or_none(node, "gather_axis", 0) != 0:
            return None
        packed = 8 // bits if data.dtype == ir.DataType.UINT8 else 1
        rows, width = data.dims
        sizes = [rows if isinstance(rows, int) else None, width * packed if isinstance(width, int) else None]
    first, second = sizes
    return (first, second) if first and second else None
