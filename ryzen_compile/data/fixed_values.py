"""Inputs in which some arrays have one value: those that determine which branches of a model run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from ryzen_compile.spec.interface import Inputs, Interface


def with_values(inputs: Inputs, values: Mapping[str, int]) -> dict[str, np.ndarray[Any, Any]]:
    """Return `inputs` with a value for all elements of the inputs named in `values`."""
    return {name: np.full_like(array, values[name]) if name in values else array for name, array in inputs.items()}


def format_values(inputs: Inputs, values: Mapping[str, int]) -> str:
    """Return the values of the inputs named in `values` in the form `flag=True, n=3`, without those that have no elements."""
    return ", ".join(f"{name}={inputs[name].reshape(-1)[:1].tolist()[0]}" for name in values if inputs[name].size)


def restrict_values(interface: Interface, values: Mapping[str, int]) -> Interface:
    """Return `interface` with the ranges of the inputs named in `values` restricted to their value; ids keep their range."""
    return msgspec.structs.replace(
        interface,
        inputs=tuple(
            msgspec.structs.replace(spec, low=values[spec.name], high=values[spec.name])
            if spec.name in values and spec.role == "values"
            else spec
            for spec in interface.inputs
        ),
    )
