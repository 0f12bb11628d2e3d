"""VectorDequantizeFp8, -Int8, -Int4 and -RotatedInt4: reconstruct vectors from codes and scales."""

from ryzen_plugins.vector_dequantize.op import (
    VECTOR_DEQUANTIZE_FP8,
    VECTOR_DEQUANTIZE_INT4,
    VECTOR_DEQUANTIZE_INT8,
    VECTOR_DEQUANTIZE_ROTATED_INT4,
)

__all__ = ["VECTOR_DEQUANTIZE_FP8", "VECTOR_DEQUANTIZE_INT4", "VECTOR_DEQUANTIZE_INT8", "VECTOR_DEQUANTIZE_ROTATED_INT4"]
