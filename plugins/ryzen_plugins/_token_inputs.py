"""Random test inputs of the token-merging ops."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def sign_vectors(random: np.random.Generator, *shape: int) -> Array:
    """Return vectors with entries of +-1 times one power of two per vector, float64; about 5 % of the vectors are zero.

    Dot products and squared norms of such vectors are exact in every summation order and element type, so that all
    implementations find the same ties between cosines.
    """
    rows = random.choice([-1.0, 1.0], size=shape) * 2.0 ** random.integers(-3, 4, size=(*shape[:-1], 1))
    return np.where(random.random((*shape[:-1], 1)) < 0.05, 0.0, rows)


def token_sizes(random: np.random.Generator, sequences: int, tokens: int) -> Array:
    """Return token sizes, (sequences, tokens) float64: the number of tokens that each token represents.

    A size of 0 marks padding, which may occur anywhere and at the end of sequences.
    """
    sizes = random.integers(1, 5, size=(sequences, tokens)).astype(np.float64)
    for sequence in range(sequences):
        if random.random() < 0.5:
            sizes[sequence, int(random.integers(1, tokens + 1)) :] = 0.0
    return np.where(random.random(sizes.shape) < 0.05, 0.0, sizes)


def fill_padding(random: np.random.Generator, rows: Array, size: Array) -> Array:
    """Return `rows` with arbitrary values, including NaN and infinities, in the rows of padding (`size` is 0)."""
    return np.where((size == 0)[..., None], random.choice([np.nan, np.inf, -np.inf, 1.0, 0.0], size=rows.shape), rows)


def disjoint_lists(random: np.random.Generator, sequences: int, tokens: int, first: int, second: int) -> tuple[Array, Array]:
    """Return two int32 lists of token indices per sequence, (sequences, first) and (sequences, second).

    The lists are disjoint and without repeats if there are at least first + second tokens.
    """
    enough = first + second <= tokens
    indices = [
        random.permutation(tokens)[: first + second] if enough else random.integers(0, tokens, size=first + second)
        for _ in range(sequences)
    ]
    both = np.stack(indices).astype(np.int32)
    return both[:, :first], both[:, first:]
