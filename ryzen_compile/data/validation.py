"""Validation of inputs and shapes against an interface."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ryzen_compile.errors import ShapeError, did_you_mean, printable
from ryzen_compile.spec.dims import dim_terms, resolve_dim
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import InputSpec, Interface
from ryzen_compile.spec.profile import InputShapes, format_shape
from ryzen_compile.utils.user_script import describe_error

Array = np.ndarray[Any, Any]


def validate_inputs(inputs: Mapping[str, Any], interface: Interface, *, source: str) -> dict[str, Array]:
    """Return `inputs` as arrays in the order of the interface.

    Names, element types and ranks must match exactly. Fixed sizes must match, and a named dimension must have one size in all
    inputs. Ids must be in their range, and a mask with a padding value must contain only 0 and 1; its padding may be anywhere.

    Raises:
        ShapeError: The inputs do not match; the message names `source`, the input, and the expected and actual values.
    """
    _check_names(inputs, interface, source)
    arrays = {}
    for spec in interface.inputs:
        array = _to_array(inputs[spec.name], spec, source)
        _check_dtype(array.dtype, spec, source, holds_text=array.dtype.kind == "O" and _holds_text(array))
        arrays[spec.name] = array.astype(np.str_) if spec.dtype == "string" else array
    check_shapes(interface, {name: array.shape for name, array in arrays.items()}, source=source)
    for spec in interface.inputs:
        _check_values(arrays[spec.name], spec, source)
    return arrays


def check_signature(dtypes: Mapping[str, np.dtype[Any]], shapes: InputShapes, interface: Interface, *, source: str) -> None:
    """Raise ShapeError if inputs with these types and shapes, which were not read yet, do not match the interface."""
    _check_names(dtypes, interface, source)
    for spec in interface.inputs:
        _check_dtype(dtypes[spec.name], spec, source, holds_text=False)
    check_shapes(interface, shapes, source=source)


def check_shapes(interface: Interface, shapes: InputShapes, *, source: str = "the requested shapes") -> dict[str, int]:
    """Return the size of each named dimension; raises ShapeError if `shapes` do not match the interface."""
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    sum_dims = []
    for spec in interface.inputs:
        if spec.name not in shapes:
            raise ShapeError(f"{source} have no shape for the input {spec}", hint="give a shape for every input")
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
            elif len(dim_terms(dim)) > 1:
                sum_dims.append((spec, axis, dim, size))
            elif sizes.setdefault(dim, size) != size:
                raise ShapeError(
                    f"{source}: dimension `{dim}` is {sizes[dim]} in `{owner[dim]}` and {size} in `{spec.name}`",
                    hint="a named dimension must have the same size in all inputs",
                )
            else:
                owner.setdefault(dim, spec.name)
    for spec, axis, dim, size in sum_dims:
        expected = resolve_dim(dim, sizes)
        if expected is not None and expected != size:
            raise ShapeError(f"{source}: axis {axis} of the input {spec} is {dim} = {expected}, got {size}")
    return sizes


def past_length(interface: Interface, shapes: InputShapes) -> int:
    """Return the number of elements before this step: the largest size of a state along its append axis, or 0."""
    return max(
        (shapes[state.input][state.append_axis] for state in interface.states if state.append_axis is not None), default=0
    )


def _check_names(inputs: Mapping[str, object], interface: Interface, source: str) -> None:
    input_names = [spec.name for spec in interface.inputs]
    for name in inputs:
        if not isinstance(name, str):
            raise ShapeError(f"{source}: the name of an input must be a string (got {type(name).__name__})")
        if name not in input_names:
            raise ShapeError(f"{source} has an unknown input `{printable(name)}`", hint=did_you_mean(name, input_names))
    for spec in interface.inputs:
        if spec.name not in inputs:
            found = ", ".join(map(repr, map(printable, inputs)))
            raise ShapeError(f"{source} lacks the input {spec}", hint=f"its inputs are {found or 'none'}")


def _to_array(value: object, spec: InputSpec, source: str) -> Array:
    try:
        return np.asarray(value)
    except Exception as error:  # the conversion may run code of the value
        reason = describe_error(error, exclude_dir=str(Path(__file__).parent))
        raise ShapeError(f"{source}: the input {spec} cannot be converted to an array: {reason}") from error


def _check_dtype(dtype: np.dtype[Any], spec: InputSpec, source: str, *, holds_text: bool) -> None:
    """Raise ShapeError for a wrong element type; `holds_text` states whether all elements of an object array are strings."""
    if (dtype.kind in "UT" or holds_text) if spec.dtype == "string" else dtype == numpy_dtype(spec.dtype):
        return
    raise ShapeError(
        f"{source}: the input {spec} has element type {spec.dtype}, got {dtype.name}",
        hint=f'convert it with .astype("{spec.dtype}")',
    )


def _holds_text(array: Array) -> bool:
    return all(isinstance(item, str) for item in array.flat)


def _check_values(array: Array, spec: InputSpec, source: str) -> None:
    if array.size and spec.role == "ids":
        low, high = spec.low if spec.low is not None else 0, spec.high
        minimum, maximum = int(array.min()), int(array.max())
        if minimum < low or (high is not None and maximum > high):
            raise ShapeError(
                f"{source}: the ids of {spec} must be in {low:g}..{'' if high is None else f'{high:g}'}, "
                f"got {minimum}..{maximum}"
            )
    if array.size and spec.padding_value is not None:
        mask = array.astype(np.float32)
        if not np.isin(mask, (0, 1)).all():
            raise ShapeError(f"{source}: the mask {spec} must contain only 0 and 1, got {np.unique(mask)[:4].tolist()}")
