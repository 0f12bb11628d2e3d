"""Scales with the smallest squared error: the best of some at and below the one that represents the largest magnitude."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

SHARES = tuple(np.linspace(0.5, 1.0, 11).tolist())
"""The candidates, relative to the scale that represents the largest magnitude.

Codes of magnitudes beyond the largest one are clipped, which is worth it where few elements are large."""


def squared_errors(elements: Array, scales: Array, encode: Callable[[Array], Array]) -> Array:
    """Return the squared errors of `elements`, (blocks, size, trailing) float32, with `scales`, (blocks, 1, trailing).

    The result is (blocks, trailing).
    """
    error = elements - encode(elements / scales).astype(np.float32) * scales
    squared: Array = np.einsum("ijk,ijk->ik", error, error)
    return squared


def best_candidates(candidates: Sequence[Array], errors: Sequence[Array]) -> Array:
    """Return, for each scale, the candidate with the smallest error, the later of equal ones; all arrays have one shape."""
    best, scales = errors[0], candidates[0]
    for candidate, error in zip(candidates[1:], errors[1:], strict=True):
        is_better = error <= best
        best, scales = np.where(is_better, error, best), np.where(is_better, candidate, scales)
    return scales
