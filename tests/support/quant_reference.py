"""Slow numpy reference of vector quantization: validation of codes of 4 and 8 bits, and dequantization."""

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
"""The level of each 4-bit code."""
ELEMENTS_PER_BYTE = {"fp8": 1, "8": 1, "4": 2}


def rotation_matrix(width: int) -> Array:
    """Return the rotation matrix R of 4-bit codes, (width, width) float64: the codes of a vector v represent R v."""
    entries = [[(-1.0) ** ((i & j).bit_count() + (j & (j >> 1)).bit_count()) for j in range(width)] for i in range(width)]
    return np.array(entries) / np.sqrt(width)


def dequantize(storage_type: str, codes: Array, scale: Array, *, is_rotated: bool = False) -> Array:
    """Return the vectors (..., size), float64, that `codes` (..., bytes) with `scale` (...) represent.

    With `is_rotated` codes of 8 bits are those of rotated vectors, as codes of 4 bits always are.
    """
    if storage_type == "4":
        nibbles = np.stack([codes & 15, (codes >> 4) & 15], axis=-1).reshape(*codes.shape[:-1], -1)
        values = LEVELS[nibbles] @ rotation_matrix(nibbles.shape[-1])
    else:
        values = (codes.view(ml_dtypes.float8_e4m3fn) if storage_type == "fp8" else codes).astype(np.float64)
        values = values @ rotation_matrix(values.shape[-1]) if is_rotated else values
    return values * scale[..., None].astype(np.float64)


def quantization_error(
    storage_type: str, vectors: Array, codes: Array, scale: Array, *, is_rotated: bool = False
) -> str | None:
    """Return an error if `codes` and `scale` are not the quantization of `vectors` (..., size), float32, otherwise None.

    Codes of 8 bits are compared bitwise. A code of 4 bits, or with `is_rotated` of 8 bits, may select any level within 1e-4
    of the nearest distance, in units of the largest level: the rotation rounds.
    """
    if storage_type == "8" and is_rotated:
        rotated = vectors.astype(np.float64) @ rotation_matrix(vectors.shape[-1]).T
        if not np.allclose(scale, np.abs(rotated).max(axis=-1) / 127, rtol=1e-5, atol=0):
            return "a scale is not the largest magnitude divided by that of the codes"
        distance = np.abs(rotated / np.where(scale > 0, scale, 1)[..., None] - codes)
        return "a code is not the nearest value" if (distance > 0.5 + 127e-4).any() else None
    if storage_type == "4":
        width = vectors.shape[-1]
        float64 = vectors.astype(np.float64)
        norm = np.sqrt((float64**2).sum(axis=-1))
        if not np.allclose(scale, norm / np.sqrt(width), rtol=1e-5, atol=0):
            return "a scale is not the norm divided by the square root of the size"
        exact = (float64 / np.where(norm > 0, norm, 1)[..., None]) @ rotation_matrix(width).T * np.sqrt(width)
        nibbles = np.stack([codes & 15, (codes >> 4) & 15], axis=-1).reshape(vectors.shape)
        excess = np.abs(exact - LEVELS[nibbles]) - np.abs(exact[..., None] - LEVELS).min(axis=-1)
        return "a code does not select the nearest level" if (excess > 1e-4).any() else None
    limit = np.float32(448 if storage_type == "fp8" else 127)
    expected_scale = np.abs(vectors).max(axis=-1) / limit
    if not np.array_equal(scale, expected_scale):
        return "a scale is not the largest magnitude divided by that of the codes"
    ratio = np.clip(vectors / np.where(expected_scale > 0, expected_scale, np.float32(1))[..., None], -limit, limit)
    if storage_type == "fp8":
        nearest = ratio.astype(ml_dtypes.float8_e4m3fn)
        expected_codes = np.where(nearest == 0, np.zeros((), nearest.dtype), nearest).view(np.int8)
    else:
        expected_codes = np.rint(ratio).astype(np.int8)
    return None if np.array_equal(codes, expected_codes) else "a code is not the nearest value"
