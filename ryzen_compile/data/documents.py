"""Documents of token ids, read from samples on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.data.loading import load_samples
from ryzen_compile.spec.interface import InputSpec, Interface

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def documents_from_samples(data: str, ids_spec: InputSpec) -> Callable[[int], Iterable[Array]]:
    """Return a function from a seed to the documents in `data`, token ids of shape (tokens,) each.

    `data` is a reference as for `--data`, to ids of shape (documents, tokens) by the name of the input `ids_spec`. Every seed
    yields all documents. Raises UsageError if `data` refers to no samples.
    """
    spec = InputSpec(
        name=ids_spec.name, dtype=ids_spec.dtype, dims=("documents", "tokens"), role="ids", low=ids_spec.low, high=ids_spec.high
    )
    samples = load_samples(data, Interface(inputs=(spec,), outputs=()), seed=0)

    def make_documents(seed: int) -> Iterator[Array]:
        for sample in samples:
            yield from sample[ids_spec.name]

    return make_documents
