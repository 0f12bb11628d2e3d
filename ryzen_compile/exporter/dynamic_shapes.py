"""Dynamic dimensions: which axes of which inputs may vary, as the command line spells them and as torch takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.spec.interface import Interface

if TYPE_CHECKING:
    import torch

DynamicAxes = Mapping[str, Mapping[int, str]]
"""For each input the names of its dynamic axes, by their index."""


def parse_dynamic(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """Read `input_ids:0=batch,1=seq`, one text for each input; raises UsageError for anything else.

    The input's name may hold colons. Equal names mean equal sizes; a sum such as `past+seq` is the sum of two others.
    """
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        name, colon, rest = text.rpartition(":")
        if not colon or not name:
            raise UsageError(f"`{text}` names no dynamic axes", hint="write INPUT:0=batch,1=seq")
        axes = found.setdefault(name.strip(), {})
        for part in rest.split(","):
            axis, equals, dim = (word.strip() for word in part.partition("="))
            if not equals or not axis.isdecimal() or not all(term.strip().isidentifier() for term in dim.split("+")):
                raise UsageError(f"`{text}`: `{part.strip()}` is not AXIS=NAME", hint="write INPUT:0=batch,1=seq")
            if int(axis) in axes:
                raise UsageError(f"`{text}`: axis {axis} is named twice")
            axes[int(axis)] = dim.replace(" ", "")
    return found


def check_dynamic(dynamic: DynamicAxes, ranks: Mapping[str, int]) -> None:
    """Raise UsageError where `dynamic` names an input or an axis that is not there."""
    for name, axes in dynamic.items():
        if name not in ranks:
            raise UsageError(f"the module has no input `{name}`", hint=did_you_mean(name, list(ranks)))
        for axis in axes:
            if axis >= ranks[name]:
                raise UsageError(f"`{name}` has {ranks[name]} dimensions, and none with index {axis}")


def interface_dynamic_axes(interface: Interface) -> dict[str, dict[int, str]]:
    """Return the dynamic axes of each input of an interface; inputs without any are left empty."""
    return {
        spec.name: {axis: dim for axis, dim in enumerate(spec.dims or ()) if isinstance(dim, str)} for spec in interface.inputs
    }


def to_torch_dynamic_shapes(module: torch.nn.Module, dynamic: DynamicAxes, *, by_keyword: bool) -> dict[str, Any]:
    """Return `dynamic` in the structure of `forward`'s parameters, with the inputs that it takes as `*rest` in a tuple."""
    if by_keyword:
        return {name: dict(axes) for name, axes in dynamic.items()}
    bound = inspect.signature(module.forward).bind(*(dict(axes) for axes in dynamic.values()))
    return dict(bound.arguments)
