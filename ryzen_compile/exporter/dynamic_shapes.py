"""Dynamic dimensions: parsing of the command line syntax and conversion to the formats of torch."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.spec.dims import dim_terms
from ryzen_compile.spec.interface import Interface

if TYPE_CHECKING:
    import torch

DynamicAxes = Mapping[str, Mapping[int, str]]
"""Input name or pattern -> axis -> dimension name, with or without a range: `time` or `time:400..16000`."""

_EXAMPLE = "write INPUT:0=batch,1=seq, or with a range INPUT:0=batch,1=time:400..16000"
_INPUT_AND_AXES = re.compile(r"\s*(.+?)\s*:(\s*\d+\s*=.*)", re.DOTALL)
_RANGE = re.compile(r"(\d*)\.\.(\d*)", re.ASCII)


@dataclass(frozen=True)
class SizeRange:
    """The sizes that a dynamic dimension may have; None: unbounded, or not known."""

    low: int | None = None
    high: int | None = None

    def __str__(self) -> str:
        return f"{'' if self.low is None else self.low}..{'' if self.high is None else self.high}"


def parse_dynamic(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """Parse texts such as `input_ids:0=batch,1=seq`, one per input; raises UsageError for invalid syntax.

    The input name may contain colons. Equal dimension names mean equal sizes; `past+seq` is the sum of two dimensions. A name
    may have a range of sizes, `wave:1=time:400..16000`, of which either end may be missing.
    """
    dynamic_axes: dict[str, dict[int, str]] = {}
    for text in texts:
        match = _INPUT_AND_AXES.fullmatch(text)
        if match is None:
            raise UsageError(f"`{text}` does not name dynamic axes", hint=_EXAMPLE)
        axes = dynamic_axes.setdefault(match[1], {})
        for assignment in match[2].split(","):
            axis, equals, dim = (word.strip() for word in assignment.partition("="))
            if not equals or not axis.isdecimal() or not dim:
                raise UsageError(f"`{text}`: `{assignment.strip()}` is not AXIS=NAME", hint=_EXAMPLE)
            split_range(dim)
            if int(axis) in axes:
                raise UsageError(f"`{text}`: axis {axis} is named twice", hint="give each axis one name")
            axes[int(axis)] = dim.replace(" ", "")
    return dynamic_axes


def split_range(dim: str) -> tuple[str, SizeRange]:
    """Return the name and the range of `time:400..16000`; raises UsageError if either is invalid."""
    name, colon, text = (word.strip() for word in dim.partition(":"))
    match = _RANGE.fullmatch(text)
    terms = dim_terms(name)
    if not all(str(term).isidentifier() for term in terms) or (colon and match is None):
        assigned = re.fullmatch(r"\s*(\w+)\s*=\s*(\d*\.\.\d*)\s*", dim, re.ASCII)
        hint = f"write a range with a colon: {assigned[1]}:{assigned[2]}" if assigned else _EXAMPLE
        raise UsageError(f"`{dim}` is not NAME or NAME:LOW..HIGH", hint=hint)
    if match is None:
        return name.replace(" ", ""), SizeRange()
    low, high = (int(number) if number else None for number in match.groups())
    if len(terms) > 1:
        raise UsageError(f"`{dim}`: a sum has no range of its own", hint="give the range where the dimension stands alone")
    if low is not None and high is not None and low > high:
        raise UsageError(f"`{dim}`: the range is empty", hint="write the smaller size first: time:400..16000")
    return name, SizeRange(low, high)


def split_ranges(dynamic: DynamicAxes) -> tuple[dict[str, dict[int, str]], dict[str, SizeRange]]:
    """Return the axes with plain names, and the range of each dimension that has one; raises UsageError if two differ."""
    axes_by_input: dict[str, dict[int, str]] = {}
    ranges: dict[str, SizeRange] = {}
    for input_name, axes in dynamic.items():
        for axis, dim in axes.items():
            name, size_range = split_range(dim)
            axes_by_input.setdefault(input_name, {})[axis] = name
            if size_range != SizeRange() and ranges.setdefault(name, size_range) != size_range:
                raise UsageError(
                    f"dimension `{name}` has two ranges: {ranges[name]} and {size_range}", hint="give each dimension one range"
                )
    return axes_by_input, ranges


def format_dynamic(interface: Interface, ranges: Mapping[str, SizeRange], *, omit: Sequence[str] = ()) -> str:
    """Return the options for the dynamic dims of `interface` without those of `omit`: `--dynamic wave:0=batch,1=time:45..`."""
    formatted: set[str] = set()
    options = []

    def format_dim(dim: str) -> str:
        if dim not in ranges or dim in formatted:
            return dim
        formatted.add(dim)
        return f"{dim}:{ranges[dim]}"

    for name, axes in interface_dynamic_axes(interface).items():
        kept = [f"{axis}={format_dim(dim)}" for axis, dim in axes.items() if dim not in omit]
        if kept:
            options.append(f"--dynamic {name}:{','.join(kept)}")
    return " ".join(options)


def expand_patterns(dynamic: DynamicAxes, names: Sequence[str]) -> dict[str, dict[int, str]]:
    """Return `dynamic` with each pattern, such as `past*`, replaced by the inputs in `names` that it matches.

    In a pattern, `*` stands for any characters and `?` for one. The axes of an input that is named exactly, or by a later
    pattern, replace those of an earlier pattern. Raises UsageError for a pattern that matches no input.
    """
    expanded: dict[str, dict[int, str]] = {}
    for pattern in sorted(dynamic, key=lambda name: name in names):
        matching = [pattern] if pattern in names or not set("*?") & set(pattern) else fnmatch.filter(names, pattern)
        if not matching:
            raise UsageError(f"no input matches `{pattern}`", hint=f"the inputs are {', '.join(names)}")
        expanded |= {name: dict(dynamic[pattern]) for name in matching}
    return expanded


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
