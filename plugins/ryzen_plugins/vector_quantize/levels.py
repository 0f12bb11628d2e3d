"""Quantization levels of the 4-bit codes, and their derivation by the Lloyd-Max algorithm."""

from __future__ import annotations

import math

LEVELS = (0.12841796875, 0.387939453125, 0.65673828125, 0.9423828125, 1.255859375, 1.6181640625, 2.068359375, 2.732421875)
"""The 8 positive levels, the results of `lloyd_max` rounded to half precision; the other 8 are their negatives."""

THRESHOLDS = tuple((low + high) / 2 for low, high in zip(LEVELS, LEVELS[1:], strict=False))
"""Midpoints of adjacent `LEVELS`; exact in float32."""


def lloyd_max(count: int = 8) -> tuple[float, ...]:
    """Return the `count` positive levels, ascending, of the symmetric quantizer of N(0, 1) with minimum mean squared error.

    The Lloyd-Max conditions (each level is the mean of its cell, each threshold is the midpoint of two levels) are iterated
    until the levels no longer change in float64.
    """

    def upper_tail(bound: float) -> tuple[float, float]:
        """Return the probability mass above `bound` and its first moment."""
        return math.erfc(bound / math.sqrt(2)) / 2, math.exp(-bound * bound / 2) / math.sqrt(2 * math.pi)

    levels = [3 * (i + 0.5) / count for i in range(count)]
    for _ in range(100_000):
        thresholds = [(low + high) / 2 for low, high in zip(levels, levels[1:], strict=False)]
        tails = [upper_tail(bound) for bound in (0.0, *thresholds)] + [(0.0, 0.0)]
        updated = [
            (moment - outer_moment) / (mass - outer_mass)
            for (mass, moment), (outer_mass, outer_moment) in zip(tails, tails[1:], strict=False)
        ]
        if updated == levels:
            break
        levels = updated
    return tuple(levels)
