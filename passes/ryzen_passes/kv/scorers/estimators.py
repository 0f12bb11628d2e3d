"""Fitting the statistics of a score to one layer: what it watches, what it sums up, what it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class Estimator(Protocol):
    """The statistics of one layer under way."""

    tensor_names: tuple[str, ...]
    """The tensors that it watches."""

    @property
    def min_tokens(self) -> int:
        """How many tokens it needs."""

    def add(self, tensors: Sequence[Array], recent_window: int, token_count: int) -> None:
        """Add a stream: the tensors of a first step (1, ...), of which the first `counted` tokens have enough behind them."""

    def solve(self) -> Mapping[str, Array]:
        """Return the arrays by the words of `Statistics.tensor`; `share` (), if there is one, is of the variance foretold."""
