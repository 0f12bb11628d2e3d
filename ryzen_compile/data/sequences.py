"""Outputs that are sequences of tensors, as single arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.spec.interface import Outputs


def flatten_sequences(outputs: Outputs) -> dict[str, np.ndarray[Any, Any]]:
    """Return arrays by name; elements of a sequence are named `name[0]`, `name[1]`, ...; absent outputs are left out."""
    return dict(_arrays(outputs))


def _arrays(outputs: Outputs) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    import numpy as np

    for name, value in outputs.items():
        if isinstance(value, (list, tuple)):
            yield from _arrays({f"{name}[{index}]": element for index, element in enumerate(value)})
        elif value is not None:
            yield name, np.asarray(value)
