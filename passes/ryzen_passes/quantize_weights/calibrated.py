"""Quantization of weights with the second moments of the activations that they are multiplied with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_passes.quantize_weights.codes import QuantizedWeight, quantized_with_codes
from ryzen_passes.quantize_weights.gptq import compensation, gptq

if TYPE_CHECKING:
    from ryzen_passes.quantize_weights.rewrite import WeightPlan

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK_ELEMENTS = 1 << 24
"""The elements of a weight that are quantized together; its outputs are independent of each other."""


def quantize_compensated(item: WeightPlan, second_moments: Array) -> QuantizedWeight | None:
    """Quantize a matrix by GPTQ; None if an element is not finite."""
    matrix = np.asarray(item.tensor.numpy())
    rows = matrix if item.site.axis == 0 else matrix.T
    factor, stored = compensation(second_moments), item.tensor.dtype.numpy()
    length, outputs = rows.shape
    codes = np.empty(matrix.shape, np.float32)
    scales = np.empty((length // item.blocks.size, outputs), np.float32)
    codes_of_rows = codes if item.site.axis == 0 else codes.T
    step = max(1, _CHUNK_ELEMENTS // length)
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        chunk = rows[:, part].astype(np.float32, order="C")
        if not np.isfinite(chunk).all():
            return None
        codes_of_rows[:, part], scales[:, part] = gptq(chunk, factor, item.blocks.size, item.code_format, stored)
    in_order = scales if item.site.axis == 0 else scales.T
    shape = item.blocks.scale_shape
    return quantized_with_codes(
        item.tensor, item.blocks, item.code_format, codes, np.ascontiguousarray(in_order).reshape(shape)
    )
