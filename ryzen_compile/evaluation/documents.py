"""Documents of ids: those that a recipe brings, or that samples on disk hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.data.loading import load_samples
from ryzen_compile.spec.interface import InputSpec, Interface

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def documents_from_samples(data: str, ids_spec: InputSpec) -> Callable[[int], Iterable[Array]]:
    """Return what yields the documents, (tokens,) ids each, of `data`, as `--data` takes samples; all of them for any seed.

    They lie there by the name of the input `ids`, (documents, tokens). Raises UsageError for what names no samples.
    """
    spec = InputSpec(
        name=ids_spec.name, dtype=ids_spec.dtype, dims=("documents", "tokens"), role="ids", low=ids_spec.low, high=ids_spec.high
    )
    samples = load_samples(data, Interface(inputs=(spec,), outputs=()), seed=0)

    def streams(seed: int) -> Iterator[Array]:
        for feed in samples:
            yield from feed[ids_spec.name]

    return streams
