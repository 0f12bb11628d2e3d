"""An oracle of evicting caches in plain Python: the tokens in every slot of every head after each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass
class HeadOracle:
    """The slots of one head of one sequence."""

    slots: int
    sinks: int
    recent_window: int
    attention_window: int | None = None
    """Number of latest tokens that a query sees; None: all."""
    entries: list[tuple[int, float, Array, Array] | None] = field(default_factory=list)
    """For each slot the position, score, key and value of its token, or None if the slot is free."""

    def __post_init__(self) -> None:
        self.entries = [None] * self.slots

    def append(self, tokens: list[tuple[int, float, Array, Array]]) -> None:
        """Append the tokens of a step, and evict the tokens of the lowest scores, of cache and step together."""
        if not tokens:
            return
        newest_position = tokens[-1][0]
        unseen_until = newest_position - (self.attention_window or newest_position + 1)
        old = [None if token is None or token[0] <= unseen_until else token for token in self.entries]
        new = [(order, token) for order, token in enumerate(tokens, self.slots) if token[0] > unseen_until]
        candidates: list[tuple[float, int, int]] = []
        for order, token in [*enumerate(old), *new]:
            if token is not None and self.sinks <= token[0] <= newest_position - self.recent_window:
                candidates.append((token[1], order, token[0]))
        surplus = sum(token is not None for token in old) + len(new) - self.slots
        evicted = {order for _, order, _ in sorted(candidates)[: max(surplus, 0)]}
        free = [slot for slot in range(self.slots) if old[slot] is None or slot in evicted]
        for order, token in new:
            if order not in evicted:
                self.entries[free.pop(0)] = token

    def positions(self) -> list[int]:
        """Return the position of the token in every slot, -1 for a free slot."""
        return [-1 if token is None else token[0] for token in self.entries]
