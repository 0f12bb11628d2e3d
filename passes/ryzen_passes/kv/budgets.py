"""Parse cache budgets and distribute them over layers."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Collection

BUDGET_HINT = "examples: 1024 (tokens), 25% (of the capacity), 2GB/8 (2 GB for the states of 8 sequences)"
"""The hint of a message about an invalid budget."""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES = re.compile(rf"(\d+(?:\.\d+)?)({'|'.join(_UNITS)})(?:/(\d+))?")
_PYRAMID_GROUPS = 4
"""The number of distinct budgets of a pyramid: each has its own score and position states."""


def parse_budget(
    budget: str,
    capacity: int,
    state_bytes: Callable[[int], int],
    *,
    append_slots: int = 0,
    ring_slots: Collection[int] = (),
) -> int | None:
    """Return the number of tokens that a head keeps, averaged over the layers, or None if `budget` cannot be parsed.

    `1024` is a number of tokens. `25%` is a percentage of `capacity`. `2GB/8` is the size in bytes of the states of 8
    sequences; `state_bytes` maps a number of slots per head to the bytes of the states of one sequence, and `append_slots`
    further slots per head are part of that size. The number of tokens is the largest whose states have at most that size.

    `state_bytes` increases, except at the numbers in `ring_slots`: with as many slots as a ring buffer has, a layer keeps it,
    without scores.
    """
    if re.fullmatch(r"\d+", budget):
        return int(budget)
    if re.fullmatch(r"\d+(\.\d+)?%", budget):
        return int(capacity * float(budget[:-1]) / 100)
    if match := _BYTES.fullmatch(budget):
        number, unit, sequences = match.groups()
        if sequences is not None and int(sequences) == 0:
            return None
        sequence_bytes = int(float(number) * _UNITS[unit] / int(sequences or 1))
        starts = sorted({1, *(slots for slots in ring_slots if slots <= capacity)})
        for start, end in zip(starts[::-1], [capacity + 1, *starts[:0:-1]], strict=True):
            if fitting := bisect.bisect_right(range(start, end), sequence_bytes, key=state_bytes):
                return start + fitting - 1 - append_slots
        return -append_slots
    return None


def pyramid_budgets(slots: int, layers: int, steepness: float, minimum: int, maximum: int) -> tuple[int, ...]:
    """Return the number of tokens that each layer keeps: `slots` on average, decreasing from the first layer to the last.

    The last layer keeps 1/`steepness` of the average. This is the budget of PyramidKV, arXiv 2406.02069, in steps: layers form
    at most four groups of equal budgets between `minimum` and `maximum`. `steepness` is at least 1; at 1 all are equal.
    """
    groups = min(_PYRAMID_GROUPS, layers)
    if steepness <= 1 or groups == 1:
        return (slots,) * layers
    last = max(minimum, int(slots / steepness))
    first = min(maximum, 2 * slots - last)
    last = 2 * slots - first
    sizes = [round(first - (first - last) * group / (groups - 1)) for group in range(groups)]
    return tuple(sizes[index * groups // layers] for index in range(layers))
