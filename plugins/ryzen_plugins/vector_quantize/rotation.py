"""The rotation of the 4-bit codes as a matrix, for what is turned once in place of many vectors."""

from __future__ import annotations

from typing import Any

import numpy as np


def rotation_matrix(vector_size: int) -> np.ndarray[Any, Any]:
    """Return R = H diag(s), (width, width) float64, orthonormal: codes of a row vector x stand for x R^T.

    `width` is a power of two. s[j] is -1 where j & (j >> 1) has an odd number of ones, H[i, j] is -1 / sqrt(width) where i & j
    has, as VectorQuantizeInt4 says.
    """
    index = np.arange(vector_size)
    odd = np.bitwise_count(index[:, None] & index) + np.bitwise_count(index & (index >> 1))
    turned: np.ndarray[Any, Any] = np.where(odd % 2 == 1, -1.0, 1.0) / np.sqrt(vector_size)
    return turned
