"""Estimates with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import Estimate

Array = np.ndarray[Any, Any]

BOOTSTRAP_REPLICATES = 2000
_Z_975 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""


def _identity(values: Array) -> Array:
    return values


def bootstrap_ratio(
    numerators: Array, denominators: Array, *, seed: int, transform: Callable[[Array], Array] = _identity
) -> Estimate:
    """Return transform(sum(numerators) / sum(denominators)) with a percentile bootstrap interval over items (Efron 1979).

    Both arrays have shape (items,). An item is an independent draw, such as a document or a continuation; the tokens of an
    item are not independent and are resampled together. With fewer than 2 items the interval is unknown (None).
    """
    value = float(transform(numerators.sum() / denominators.sum()))
    count = len(numerators)
    if count < 2:
        return Estimate(value=value)
    drawn = np.random.default_rng(seed).integers(0, count, (BOOTSTRAP_REPLICATES, count))
    low, high = np.quantile(transform(numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1)), (0.025, 0.975))
    return Estimate(value=value, low=float(low), high=float(high))


def wilson_proportion(correct: Array) -> Estimate:
    """Return the share of True in `correct`, (items,) bool, with the Wilson score interval (Wilson 1927).

    The interval is also valid for shares near 0 and 1.
    """
    count, hits = len(correct), int(correct.sum())
    share = hits / count
    center = share + _Z_975**2 / (2 * count)
    spread = _Z_975 * math.sqrt(share * (1 - share) / count + _Z_975**2 / (4 * count**2))
    scale = 1 + _Z_975**2 / count
    low = 0.0 if hits == 0 else (center - spread) / scale
    return Estimate(value=share, low=low, high=1.0 if hits == count else (center + spread) / scale)
