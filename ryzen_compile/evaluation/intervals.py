"""Figures with the interval in which they lie, at 95 %."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import Estimate

Array = np.ndarray[Any, Any]

BOOTSTRAP_REPLICATES = 2000
_Z_975 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def _identity(values: Array) -> Array:
    return values


def bootstrap_ratio(
    numerators: Array, denominators: Array, *, seed: int, transform: Callable[[Array], Array] = _identity
) -> Estimate:
    """Return `then` of sum(above) / sum(below), (items,) each, with a percentile bootstrap over the items (Efron 1979).

    Items are what was drawn independently: documents, continuations. Their tokens are not, and are never resampled alone. Of
    fewer than two items the interval is not known.
    """
    value = float(transform(numerators.sum() / denominators.sum()))
    count = len(numerators)
    if count < 2:
        return Estimate(value=value)
    drawn = np.random.default_rng(seed).integers(0, count, (BOOTSTRAP_REPLICATES, count))
    low, high = np.quantile(transform(numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1)), (0.025, 0.975))
    return Estimate(value=value, low=float(low), high=float(high))


def wilson_proportion(correct: Array) -> Estimate:
    """Return the share of `right` (items,) bool, with Wilson's score interval (Wilson 1927): it holds near 0 and 1 too."""
    count, hits = len(correct), int(correct.sum())
    p = hits / count
    middle, spread = p + _Z_975**2 / (2 * count), _Z_975 * math.sqrt(p * (1 - p) / count + _Z_975**2 / (4 * count**2))
    scale = 1 + _Z_975**2 / count
    low = 0.0 if hits == 0 else (middle - spread) / scale
    return Estimate(value=p, low=low, high=1.0 if hits == count else (middle + spread) / scale)
