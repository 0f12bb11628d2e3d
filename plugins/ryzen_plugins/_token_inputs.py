"""What the ops that merge tokens are tried with."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def sign_vectors(random: np.random.Generator, *shape: int) -> Array:
    """Return vectors of signs times a power of two each, some of them zero, as float64.

    Their products and the sums of their squares are exact in every order and in every element type, so that whatever compares
    their cosines finds the same ties.
    """
    rows = random.choice([-1.0, 1.0], size=shape) * 2.0 ** random.integers(-3, 4, size=(*shape[:-1], 1))
    return np.where(random.random((*shape[:-1], 1)) < 0.05, 0.0, rows)


def token_sizes(random: np.random.Generator, sequences: int, tokens: int) -> Array:
    """Return how many tokens each token stands for, as float64; a sequence may end in padding, which is 0, and hold some."""
    found = random.integers(1, 5, size=(sequences, tokens)).astype(np.float64)
    for sequence in range(sequences):
        if random.random() < 0.5:
            found[sequence, int(random.integers(1, tokens + 1)) :] = 0.0
    return np.where(random.random(found.shape) < 0.05, 0.0, found)


def fill_padding(random: np.random.Generator, rows: Array, size: Array) -> Array:
    """Return `rows` with what padding may hold where `size` is 0: anything."""
    return np.where((size == 0)[..., None], random.choice([np.nan, np.inf, -np.inf, 1.0, 0.0], size=rows.shape), rows)


def disjoint_lists(random: np.random.Generator, sequences: int, tokens: int, first: int, second: int) -> tuple[Array, Array]:
    """Return two lists of tokens a sequence, as int32: without a token twice where there are enough."""
    enough = first + second <= tokens
    drawn = [
        random.permutation(tokens)[: first + second] if enough else random.integers(0, tokens, size=first + second)
        for _ in range(sequences)
    ]
    both = np.stack(drawn).astype(np.int32)
    return both[:, :first], both[:, first:]
