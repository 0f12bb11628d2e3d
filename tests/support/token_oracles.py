"""Oracles and inputs shared by the tests of the ops that compare tokens: real tokens, cosines, special float values."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def is_real_token(size: float) -> bool:
    """Return whether a token of this size is real; all others are padding."""
    return bool(2.0**-64 <= size <= 2.0**64)


def cosine(a: Array, b: Array) -> float:
    """Return the cosine of two vectors: 0 if one is zero, -2 if one is not finite."""
    with np.errstate(all="ignore"):
        if not (a @ a < 1e38 and b @ b < 1e38):
            return -2.0
    if a @ a <= 1e-30 or b @ b <= 1e-30:
        return 0.0
    return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))


def scaled_signs(random: np.random.Generator, *shape: int) -> Array:
    """Return vectors with entries of +-1 times a power of two per vector, whose cosines are exact in every element type."""
    return random.choice([-1.0, 1.0], size=shape) * 2.0 ** random.integers(-3, 4, size=(*shape[:-1], 1))


def special_token_inputs(seed: int, dtype: str) -> tuple[np.random.Generator, dict[str, Array]]:
    """Return two sequences of 20 tokens with special float vectors and sizes, and the generator for further inputs."""
    wide_range = dtype != "float16"
    large, small = (2.0**63, 2.0**-60) if wide_range else (1024.0, 2.0**-24)
    scales = [1.0, 0.0, -0.0, np.nan, np.inf, large, small, 2.0**14, 1e-40]
    sizes = [1.0, 1.0, 3.0, 2.0**60, 1e-9, 0.0, -0.0, -1.0, np.nan, np.inf, 1e-30, 1e30]
    random = np.random.default_rng(seed)
    metric = random.choice([-1.0, 1.0], size=(2, 20, 4)) * random.choice(scales, size=(2, 20, 1))
    metric[1, 3, 2] = np.nan
    return random, {"metric": metric, "size": random.choice(sizes, size=(2, 20))}
