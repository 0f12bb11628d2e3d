"""Dynamic dimensions: parsing of the command line syntax and conversion to the formats of torch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.spec.dims import dim_terms
from ryzen_compile.spec.interface import Interface

if TYPE_CHECKING:
    import torch

DynamicAxes = Mapping[str, Mapping[int, str]]
"""Input name -> axis -> dimension name."""


def parse_dynamic(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """Parse texts such as `input_ids:0=batch,1=seq`, one per input; raises UsageError for invalid syntax.

    The input name may contain colons. Equal dimension names mean equal sizes; `past+seq` is the sum of two dimensions.
    """
    dynamic_axes: dict[str, dict[int, str]] = {}
    for text in texts:
        name, colon, assignments = text.rpartition(":")
        if not colon or not name:
            raise UsageError(f"`{text}` does not name dynamic axes", hint="write INPUT:0=batch,1=seq")
        axes = dynamic_axes.setdefault(name.strip(), {})
        for assignment in assignments.split(","):
            axis, equals, dim = (word.strip() for word in assignment.partition("="))
            if not equals or not axis.isdecimal() or not all(str(term).isidentifier() for term in dim_terms(dim)):
                raise UsageError(f"`{text}`: `{assignment.strip()}` is not AXIS=NAME", hint="write INPUT:0=batch,1=seq")
            if int(axis) in axes:
                raise UsageError(f"`{text}`: axis {axis} is named twice", hint="give each axis one name")
            axes[int(axis)] = dim.replace(" ", "")
    return dynamic_axes


def check_dynamic(dynamic: DynamicAxes, ranks: Mapping[str, int]) -> None:
    """Raise UsageError if `dynamic` names an input or an axis that does not exist."""
    for name, axes in dynamic.items():
        if name not in ranks:
            raise UsageError(f"the module has no input `{name}`", hint=did_you_mean(name, list(ranks)))
        for axis in axes:
            if axis >= ranks[name]:
                raise UsageError(
                    f"axis {axis} of input `{name}` does not exist: the input has {ranks[name]} dimensions",
                    hint=f"use an axis in 0..{ranks[name] - 1}" if ranks[name] else "a scalar has no axes",
                )


def interface_dynamic_axes(interface: Interface) -> dict[str, dict[int, str]]:
    """Return the dynamic axes of each input of an interface; empty for inputs without dynamic axes."""
    return {
        spec.name: {axis: dim for axis, dim in enumerate(spec.dims or ()) if isinstance(dim, str)} for spec in interface.inputs
    }


def to_torch_dynamic_shapes(module: torch.nn.Module, dynamic: DynamicAxes, *, by_keyword: bool) -> dict[str, Any]:
    """Return `dynamic` in the structure of the parameters of `forward`; inputs for a `*args` parameter form a tuple."""
    if by_keyword:
        return {name: dict(axes) for name, axes in dynamic.items()}
    bound = inspect.signature(module.forward).bind(*(dict(axes) for axes in dynamic.values()))
    return dict(bound.arguments)
