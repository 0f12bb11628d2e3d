"""Estimator interface: accumulate tensors of one layer over documents, and solve for its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class Estimator(Protocol):
    """Accumulates the statistics of one layer."""

    tensor_names: tuple[str, ...]
    """Names of the tensors that `add` takes."""

    @property
    def min_tokens(self) -> int:
        """Minimum number of tokens for a fit."""

    def add(self, tensors: Sequence[Array], recent_window: int, token_count: int) -> None:
        """Add a document.

        `tensors` (1, ...) are those of one step over the whole document. Its first `token_count` tokens have enough later
        queries and are counted; only queries at least `recent_window` tokens after a token count for it.
        """

    def solve(self) -> Mapping[str, Array]:
        """Return the arrays by their names in `Statistics.tensor`; `share` (), if present, is the explained variance."""
