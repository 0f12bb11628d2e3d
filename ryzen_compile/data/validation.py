"""The contract between data and an interface: which feeds and which shapes fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.errors import ShapeError, did_you_mean
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import InputSpec, Interface, resolve_dim
from ryzen_compile.spec.profile import Shapes, format_shape

Array = np.ndarray[Any, Any]


def validate_inputs(inputs: Mapping[str, Any], interface: Interface, *, source: str) -> dict[str, Array]:
    """Return `feed` as arrays in the interface's order; raises ShapeError that names source, input, expected and got.

    Names, types and ranks must be exact, sizes must be the fixed ones or agree wherever a dimension's name stands, ids must lie
    in their range and the ones of each row of a mask must be a prefix of at least one element.
    """
    known = [spec.name for spec in interface.inputs]
    for name in inputs:
        if name not in known:
            raise ShapeError(f"{source} holds `{name}`, which is not an input", hint=did_you_mean(name, known))
    arrays = {}
    for spec in interface.inputs:
        if spec.name not in inputs:
            raise ShapeError(f"{source} lacks the input {spec}", hint=f"it holds {', '.join(map(repr, inputs)) or 'nothing'}")
        arrays[spec.name] = _check_dtype(np.asarray(inputs[spec.name]), spec, source)
    check_shapes(interface, {name: array.shape for name, array in arrays.items()}, source=source)
    for spec in interface.inputs:
        _check_values(arrays[spec.name], spec, source)
    return arrays


def check_shapes(interface: Interface, shapes: Shapes, *, source: str = "the shapes asked for") -> dict[str, int]:
    """Return the size of each named dimension; raises ShapeError where `shapes` do not fit the interface."""
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    sums = []
    for spec in interface.inputs:
        if spec.name not in shapes:
            raise ShapeError(f"{source} lack a shape for the input {spec}")
        shape = tuple(shapes[spec.name])
        if spec.dims is None:
            continue
        if len(shape) != len(spec.dims):
            raise ShapeError(
                f"{source}: the input {spec} has {len(spec.dims)} dimensions, got {format_shape(shape) or 'a scalar'}"
            )
        for axis, (dim, size) in enumerate(zip(spec.dims, shape, strict=True)):
            if isinstance(dim, int):
                if dim != size:
                    raise ShapeError(f"{source}: axis {axis} of the input {spec} is {dim}, got {size}")
            elif "+" in dim:
                sums.append((spec, axis, dim, size))
            elif sizes.setdefault(dim, size) != size:
                raise ShapeError(
                    f"{source}: `{dim}` is {sizes[dim]} in `{owner[dim]}` and {size} in `{spec.name}`",
                    hint="a dimension has one size wherever its name stands",
                )
            else:
                owner.setdefault(dim, spec.name)
    for spec, axis, dim, size in sums:
        wanted = resolve_dim(dim, sizes)
        if wanted is not None and wanted != size:
            raise ShapeError(f"{source}: axis {axis} of the input {spec} is {dim} = {wanted}, got {size}")
    return sizes


def past_length(interface: Interface, shapes: Shapes) -> int:
    """Return how many elements came before this step: the size of the states along the axis on which they grow, else 0."""
    return max(
        (shapes[state.input][state.append_axis] for state in interface.states if state.append_axis is not None), default=0
    )


def _check_dtype(array: Array, spec: InputSpec, source: str) -> Array:
    wanted = numpy_dtype(spec.dtype)
    if spec.dtype == "string":
        if array.dtype.kind in "UT" or (array.dtype.kind == "O" and all(isinstance(item, str) for item in array.flat)):
            return array.astype(np.str_)
    elif array.dtype == wanted:
        return array
    raise ShapeError(
        f"{source}: the input {spec} holds {spec.dtype}, got {array.dtype.name}", hint=f'convert it: .astype("{spec.dtype}")'
    )


def _check_values(array: Array, spec: InputSpec, source: str) -> None:
    if array.size and spec.role == "ids":
        low, high = spec.low if spec.low is not None else 0, spec.high
        least, most = int(array.min()), int(array.max())
        if least < low or (high is not None and most > high):
            raise ShapeError(
                f"{source}: the ids of {spec} lie in {low:g}..{'' if high is None else f'{high:g}'}, got {least}..{most}"
            )
    if array.size and spec.role == "mask":
        counts = array.astype(np.float32)
        if not np.isin(counts, (0, 1)).all():
            raise ShapeError(f"{source}: the mask {spec} holds 0 and 1, got {np.unique(counts)[:4].tolist()}")
        if counts.ndim and ((np.diff(counts, axis=-1) > 0).any() or (counts[..., 0] == 0).any()):
            raise ShapeError(
                f"{source}: each row of the mask {spec} must be ones and then zeros, with at least a one",
                hint="pad on the right",
            )
