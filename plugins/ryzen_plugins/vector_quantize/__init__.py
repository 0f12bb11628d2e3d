"""VectorQuantizeFp8, VectorQuantizeInt8, VectorQuantizeInt4: quantize vectors to 8 or 4 bits with one scale per vector."""

from ryzen_plugins.vector_quantize.op import VECTOR_QUANTIZE_FP8, VECTOR_QUANTIZE_INT4, VECTOR_QUANTIZE_INT8, compression_ratio
from ryzen_plugins.vector_quantize.rotation import rotation_matrix

__all__ = ["VECTOR_QUANTIZE_FP8", "VECTOR_QUANTIZE_INT4", "VECTOR_QUANTIZE_INT8", "compression_ratio", "rotation_matrix"]
