"""Budgets: how many tokens a head keeps, said as a number, a share of the capacity, or in bytes; perhaps not the same each."""

from __future__ import annotations

import re

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES = re.compile(rf"(\d+(?:\.\d+)?)({'|'.join(_UNITS)})(?:/(\d+))?")
_PYRAMID_GROUPS = 4
"""Into how many sizes the layers of a pyramid fall: each is a set of states of its own."""


def parse_budget(budget: str, capacity: int, row_bytes: int, *, append_slots: int = 0) -> int | None:
    """Return how many tokens a head keeps on average over the layers, or None where `budget` is none.

    `1024` are tokens; `25%` is a share of `capacity`; `2GB/8` are bytes of the states of 8 sequences, of which every token that
    each head of each layer keeps costs one `row_bytes`, and so does each of `room` more slots.
    """
    if re.fullmatch(r"\d+", budget):
        return int(budget)
    if re.fullmatch(r"\d+(\.\d+)?%", budget):
        return int(capacity * float(budget[:-1]) / 100)
    if found := _BYTES.fullmatch(budget):
        number, unit, batch = found.groups()
        return min(capacity, int(float(number) * _UNITS[unit] / max(int(batch or 1), 1) / row_bytes)) - append_slots
    return None


def pyramid_budgets(slots: int, layers: int, steepness: float, minimum: int, maximum: int) -> tuple[int, ...]:
    """Return how many tokens each layer keeps: `slots` on average, the first the most, the last 1/`steepness` of the mean.

    That is PyramidKV's budget, arXiv 2406.02069, in steps: layers fall into at most four groups of equal sizes, none under
    `least` or over `most`; at least 1 is for `steepness`, and 1 gives each the same.
    """
    groups = min(_PYRAMID_GROUPS, layers)
    if steepness <= 1 or groups == 1:
        return (slots,) * layers
    last = max(minimum, int(slots / steepness))
    first = min(maximum, 2 * slots - last)
    last = 2 * slots - first
    sizes = [round(first - (first - last) * group / (groups - 1)) for group in range(groups)]
    return tuple(sizes[at * groups // layers] for at in range(layers))
