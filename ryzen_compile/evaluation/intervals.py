"""Figures with the interval in which they lie, at 95 %."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import Figure

Array = np.ndarray[Any, Any]

REPLICATES = 2000
_Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def _same(values: Array) -> Array:
    return values


def ratio(above: Array, below: Array, *, seed: int, then: Callable[[Array], Array] = _same) -> Figure:
    """Return `then` of sum(above) / sum(below), (items,) each, with a percentile bootstrap over the items (Efron 1979).

    Items are what was drawn independently: documents, continuations. Their tokens are not, and are never resampled alone. Of
    fewer than two items the interval is not known.
    """
    value = float(then(above.sum() / below.sum()))
    count = len(above)
    if count < 2:
        return Figure(value=value)
    drawn = np.random.default_rng(seed).integers(0, count, (REPLICATES, count))
    low, high = np.quantile(then(above[drawn].sum(axis=1) / below[drawn].sum(axis=1)), (0.025, 0.975))
    return Figure(value=value, low=float(low), high=float(high))


def share(right: Array) -> Figure:
    """Return the share of `right` (items,) bool, with Wilson's score interval (Wilson 1927): it holds near 0 and 1 too."""
    count, hits = len(right), int(right.sum())
    p = hits / count
    middle, spread = p + _Z**2 / (2 * count), _Z * math.sqrt(p * (1 - p) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    low = 0.0 if hits == 0 else (middle - spread) / scale
    return Figure(value=p, low=low, high=1.0 if hits == count else (middle + spread) / scale)
