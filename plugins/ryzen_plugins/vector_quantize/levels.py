"""The levels of the 4-bit codes, and where they come from."""

from __future__ import annotations

import math

LEVELS = (0.12841796875, 0.387939453125, 0.65673828125, 0.9423828125, 1.255859375, 1.6181640625, 2.068359375, 2.732421875)
"""Half of the 16 levels; the others are their negatives. Each is the one of `lloyd_max`, rounded to half precision."""

THRESHOLDS = tuple((low + high) / 2 for low, high in zip(LEVELS, LEVELS[1:], strict=False))
"""Between two neighbours of `LEVELS`; float32 holds them exactly."""


def lloyd_max(count: int = 8) -> tuple[float, ...]:
    """Return the `count` positive levels of the symmetric quantiser of N(0, 1) of least mean squared error, ascending.

    Every level is the mean of what is nearest to it, every threshold lies midway: iterated until nothing changes in float64.
    """

    def above(bound: float) -> tuple[float, float]:
        """Return the mass beyond `bound`, and its first moment."""
        return math.erfc(bound / math.sqrt(2)) / 2, math.exp(-bound * bound / 2) / math.sqrt(2 * math.pi)

    levels = [3 * (i + 0.5) / count for i in range(count)]
    for _ in range(100_000):
        inner = [(low + high) / 2 for low, high in zip(levels, levels[1:], strict=False)]
        tails = [above(bound) for bound in (0.0, *inner)] + [(0.0, 0.0)]
        found = [
            (moment - outer_moment) / (mass - outer_mass)
            for (mass, moment), (outer_mass, outer_moment) in zip(tails, tails[1:], strict=False)
        ]
        if found == levels:
            break
        levels = found
    return tuple(levels)
