"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): the error of each rounded row is compensated in the rows after it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ryzen_passes.quantize_weights.codes import CodeFormat, extreme, scale_candidates
from ryzen_passes.quantize_weights.scale_search import best_candidates, squared_errors

Array = np.ndarray[Any, np.dtype[Any]]

_DAMPING = 0.01
"""The share of the mean of the diagonal that is added to the diagonal of the second moments."""
_BATCH_ROWS = 128
"""The rows after which the remaining rows are updated together."""


def compensation(second_moments: Array) -> Array:
    """Return the upper Cholesky factor of the inverse of damped second moments, (length, length) float32.

    `second_moments` is the sum of x^T x over the inputs x of a product. A feature that is always 0 gets the mean of the others.
    """
    moments = second_moments.astype(np.float64)
    diagonal = np.einsum("ii->i", moments)
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    diagonal += _DAMPING * mean
    return np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)


def gptq(rows: Array, factor: Array, block: int, code_format: CodeFormat, stored: np.dtype[Any]) -> tuple[Array, Array]:
    """Return the codes and the scales of a weight.

    Args:
        rows: The weight, (length, outputs) float32; a product sums over `length`. It is modified.
        factor: As `compensation` returns it.
        block: The rows that share a scale; divides `length`.
        code_format: The codes.
        stored: The type in which scales are stored.

    Returns:
        Codes as float32 values, (length, outputs), and scales, (length / block, outputs).
    """
    length, outputs = rows.shape
    codes = np.empty((length, outputs), np.float32)
    scales = np.empty((length // block, outputs), np.float32)
    for start in range(0, length, _BATCH_ROWS):
        stop = min(start + _BATCH_ROWS, length)
        errors = np.empty((stop - start, outputs), np.float32)
        for index in range(start, stop):
            if index % block == 0:
                scales[index // block] = _search(rows[index : index + block], code_format, stored)
            scale = scales[index // block]
            codes[index] = code_format.encode(rows[index] / scale)
            errors[index - start] = (rows[index] - codes[index] * scale) / factor[index, index]
            rows[index + 1 : stop] -= np.outer(factor[index, index + 1 : stop], errors[index - start])
        rows[stop:] -= factor[start:stop, stop:].T @ errors
    return codes, scales


def _search(block: Array, code_format: CodeFormat, stored: np.dtype[Any]) -> Array:
    """Return the scale of each column of `block`."""
    candidates = scale_candidates(extreme(block.max(axis=0), block.min(axis=0))[None], code_format, stored)
    errors = [squared_errors(block[None], candidate[:, None], code_format.encode) for candidate in candidates]
    best: Array = best_candidates(candidates, errors)[0]
    return best
