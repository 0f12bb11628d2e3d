"""Rotation matrix of the 4-bit codes, to rotate a query or an output once instead of all cached vectors."""

from __future__ import annotations

from typing import Any

import numpy as np


def rotation_matrix(vector_size: int) -> np.ndarray[Any, Any]:
    """Return the orthonormal matrix R = H diag(s), (vector_size, vector_size) float64.

    The codes of a row vector x represent x R^T. `vector_size` is a power of two. s[j] is -1 if j & (j >> 1) has an odd number
    of ones, otherwise 1; H[i, j] is -1 / sqrt(vector_size) if i & j has an odd number of ones, otherwise 1 / sqrt(vector_size),
    as in VectorQuantizeInt4.
    """
    index = np.arange(vector_size)
    odd = np.bitwise_count(index[:, None] & index) + np.bitwise_count(index & (index >> 1))
    matrix: np.ndarray[Any, Any] = np.where(odd % 2 == 1, -1.0, 1.0) / np.sqrt(vector_size)
    return matrix
