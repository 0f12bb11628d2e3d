"""Vectors as codes of 4 or 8 bits, slowly: what VectorQuantize makes of them and what the codes stand for, in numpy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
_POSITIVE_LEVELS = (
    0.12841796875,
    0.387939453125,
    0.65673828125,
    0.9423828125,
    1.255859375,
    1.6181640625,
    2.068359375,
    2.732421875,
)
LEVELS = np.array([*_POSITIVE_LEVELS, *(-level for level in _POSITIVE_LEVELS)])
"""By their 4-bit codes."""
ELEMENTS_PER_BYTE = {"fp8": 1, "8": 1, "4": 2}


def rotation_matrix(width: int) -> Array:
    """Return the matrix of the basis that 4-bit codes are in, entry by entry, float64: a vector v has R v there."""
    entries = [[(-1.0) ** ((i & j).bit_count() + (j & (j >> 1)).bit_count()) for j in range(width)] for i in range(width)]
    return np.array(entries) / np.sqrt(width)


def dequantize(storage_type: str, codes: Array, scale: Array) -> Array:
    """Return the vectors (..., size) that `codes` (..., bytes) with `scale` (...) stand for, float64."""
    if storage_type == "4":
        nibbles = np.stack([codes & 15, (codes >> 4) & 15], axis=-1).reshape(*codes.shape[:-1], -1)
        values = LEVELS[nibbles] @ rotation_matrix(nibbles.shape[-1])
    else:
        values = (codes.view(ml_dtypes.float8_e4m3fn) if storage_type == "fp8" else codes).astype(np.float64)
    return values * scale[..., None].astype(np.float64)


def quantization_error(storage_type: str, vectors: Array, codes: Array, scale: Array) -> str | None:
    """Return why `codes` and `scale` are not those of `vectors` (..., size), float32, or None.

    Those of 8 bits are held to the bit. Of 4 bits a code may be that of a level as near as the nearest but for 1e-4.
    """
    if storage_type == "4":
        width = vectors.shape[-1]
        wide = vectors.astype(np.float64)
        norm = np.sqrt((wide**2).sum(axis=-1))
        if not np.allclose(scale, norm / np.sqrt(width), rtol=1e-5, atol=0):
            return "a scale is not the norm over the root of the size"
        exact = (wide / np.where(norm > 0, norm, 1)[..., None]) @ rotation_matrix(width).T * np.sqrt(width)
        nibbles = np.stack([codes & 15, (codes >> 4) & 15], axis=-1).reshape(vectors.shape)
        off = np.abs(exact - LEVELS[nibbles]) - np.abs(exact[..., None] - LEVELS).min(axis=-1)
        return "a code is not that of the nearest level" if (off > 1e-4).any() else None
    limit = np.float32(448 if storage_type == "fp8" else 127)
    meant = np.abs(vectors).max(axis=-1) / limit
    if not np.array_equal(scale, meant):
        return "a scale is not the largest size over that of the codes"
    ratio = np.clip(vectors / np.where(meant > 0, meant, np.float32(1))[..., None], -limit, limit)
    if storage_type == "fp8":
        nearest = ratio.astype(ml_dtypes.float8_e4m3fn)
        found = np.where(nearest == 0, np.zeros((), nearest.dtype), nearest).view(np.int8)
    else:
        found = np.rint(ratio).astype(np.int8)
    return None if np.array_equal(codes, found) else "a code is not the nearest"
