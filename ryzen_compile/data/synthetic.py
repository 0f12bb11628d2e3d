"""Synthetic inputs: pseudo-random values that match types, ranges and roles, and are consistent with each other.

Masks are derived from the number of valid elements of each row, which come first; no row is all padding, whichever value marks
it. With a growing cache, a step of `seq` elements follows
`past` earlier ones: a mask over `past + seq` elements covers the whole past and at least one new element, and positions start
at `past`.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ryzen_compile.data.validation import check_shapes, past_length
from ryzen_compile.errors import ShapeError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import InputSpec, Interface
from ryzen_compile.spec.profile import InputShapes, Shape, format_shape
from ryzen_compile.utils.amounts import amount
from ryzen_compile.utils.files import parallel_map
from ryzen_compile.utils.machine import physical_memory_bytes

RowMode = Literal["mixed", "identical"]
"""The relation of the rows of a batch: `mixed` rows differ in values and length, `identical` rows are equal."""

Array = np.ndarray[Any, Any]

_MIN_PARALLEL_BYTES = 1 << 20
"""The size of an input from which it is made in a thread: NumPy draws random numbers in several at a time."""
_LARGEST_NORMAL = 40.0
"""No sample of the standard normal distribution in float64 is as large."""


def synthesize(interface: Interface, shapes: InputShapes, *, seed: int, rows: RowMode) -> dict[str, Array]:
    """Return synthetic inputs of exactly `shapes`, deterministic in the arguments and independent of the order of the inputs.

    The valid lengths of the rows of a mixed batch are spread evenly from the full length down to 1, in shuffled order.
    Identical rows and a single row have the full length. If it is unknown which value of a mask marks padding, rows of more
    than one element have both values.

    Raises:
        ShapeError: `shapes` do not match the interface, or the inputs do not fit into memory.
    """
    sizes = check_shapes(interface, shapes)
    size = sum(_nbytes(spec, shapes[spec.name]) for spec in interface.inputs)
    if size > physical_memory_bytes():
        raise _too_large_error(interface, shapes, size)
    try:
        return _synthesize_inputs(interface, shapes, sizes, seed, rows)
    except (MemoryError, OverflowError) as error:
        raise _too_large_error(interface, shapes, size) from error


def _synthesize_inputs(
    interface: Interface, shapes: InputShapes, sizes: Mapping[str, int], seed: int, rows: RowMode
) -> dict[str, Array]:
    past = past_length(interface, shapes)

    def make(spec: InputSpec) -> Array:
        shape = tuple(shapes[spec.name])
        rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
        batch_axis = interface.batch_axis(spec)
        row_shape = shape if rows == "mixed" or batch_axis is None else (*shape[:batch_axis], 1, *shape[batch_axis + 1 :])
        if spec.role == "mask":
            array = _mask(spec, row_shape, past if _covers_past(interface, shapes, spec, past) else 0, seed)
        elif spec.role == "positions":
            array = _positions(spec, row_shape, past)
        elif spec.length_dim is not None:
            size = sizes[spec.length_dim]
            lengths = row_lengths(math.prod(row_shape), min(1, size), size, seed=seed)
            array = lengths.reshape(row_shape).astype(numpy_dtype(spec.dtype))
        else:
            array = _random_values(spec, row_shape, rng)
        is_complete = isinstance(array, np.ndarray) and array.shape == shape and array.flags.c_contiguous
        return array if is_complete else np.array(np.broadcast_to(array, shape), order="C")

    large = [spec for spec in interface.inputs if _nbytes(spec, shapes[spec.name]) >= _MIN_PARALLEL_BYTES]
    arrays = {spec.name: array for spec, array in zip(large, parallel_map(make, large), strict=True)}
    return {spec.name: arrays[spec.name] if spec.name in arrays else make(spec) for spec in interface.inputs}


def _nbytes(spec: InputSpec, shape: Shape) -> int:
    item = 36 if spec.dtype == "string" else numpy_dtype(spec.dtype).itemsize  # the longest word has 9 characters
    return math.prod(map(int, shape)) * item


def _too_large_error(interface: Interface, shapes: InputShapes, size: int) -> ShapeError:
    sample = ",".join(f"{spec.name}:{format_shape(shapes[spec.name])}" for spec in interface.inputs)
    memory = physical_memory_bytes()
    memory_note = f", this machine has {memory / 1e9:.0f} GB" if memory < sys.maxsize else ""
    return ShapeError(
        f"inputs of shape {sample} do not fit into memory: they need {size} bytes ({size / 1e9:.3g} GB){memory_note}",
        hint="use smaller shapes",
    )


def row_lengths(count: int, minimum: int, maximum: int, *, seed: int) -> Array:
    """Return the valid lengths of `count` rows: evenly spaced from `maximum` down to `minimum`, shuffled with `seed`."""
    lengths = np.floor(np.linspace(maximum, minimum, count)).astype(np.int64)
    return np.random.default_rng([seed, 1]).permutation(lengths)


def _covers_past(interface: Interface, shapes: Mapping[str, Shape], mask: InputSpec, past: int) -> bool:
    """Tell whether a mask covers the past and the new elements, not only the new ones."""
    size = shapes[mask.name][-1] if shapes[mask.name] else 1
    new_lengths = [
        shapes[spec.name][-1] for spec in interface.inputs if spec.role in ("ids", "positions") and shapes[spec.name]
    ]
    return past > 0 and size > past and size not in new_lengths


def _mask(spec: InputSpec, shape: Shape, past: int, seed: int) -> Array:
    """Return valid elements followed by padding along the last axis; each row of axis 0 has its own number of them."""
    dtype = numpy_dtype(spec.dtype)
    if not shape:
        return np.full(shape, spec.valid_value, dtype)
    size, count = shape[-1], shape[0] if len(shape) > 1 else 1
    longest = size if spec.padding_value is not None else max(size - 1, min(size, 1))
    lengths = row_lengths(count, min(past + 1, longest), longest, seed=seed)
    is_valid = np.arange(size) < lengths.reshape(-1, *[1] * (len(shape) - 1))
    is_valid = np.broadcast_to(is_valid.reshape(shape) if len(shape) == 1 else is_valid, shape)
    return np.where(is_valid, spec.valid_value, 1 - spec.valid_value).astype(dtype)


def _positions(spec: InputSpec, shape: Shape, past: int) -> Array:
    """Return past, past + 1, ... along the last axis, in every row."""
    size = shape[-1] if shape else 1
    if spec.high is not None and past + size - 1 > spec.high:
        limit = int(spec.high) + 1
        raise ShapeError(
            f"the model has {amount(limit, 'position')} in `{spec.name}`, and the shapes need {past + size}",
            hint=f"use shapes of at most {amount(limit, 'token')}{', with those before the step' if past else ''}",
        )
    positions = past + np.arange(size)
    return np.broadcast_to(positions if shape else positions[0], shape).astype(numpy_dtype(spec.dtype))


def _random_values(spec: InputSpec, shape: Shape, rng: np.random.Generator) -> Array:
    dtype = numpy_dtype(spec.dtype)
    if spec.dtype == "string":
        words = np.array(["", "a", "token", "two words", "naïve", "数据"])
        return words[rng.integers(0, len(words), shape)]
    if dtype == np.bool_:
        low, high = spec.low or 0, 1 if spec.high is None else spec.high
        return rng.integers(int(low), int(high), shape, endpoint=True).astype(np.bool_)
    if dtype.kind in "iu" or spec.dtype in ("int2", "uint2", "int4", "uint4"):
        low, high = _value_range(spec, dtype, default=(0, 1))
        return rng.integers(int(low), int(high), shape, dtype=_wide_integer(dtype), endpoint=True).astype(dtype)
    if dtype.kind == "c":
        low, high = spec.low if spec.low is not None else -1.0, spec.high if spec.high is not None else 1.0
        return (rng.uniform(low, high, shape) + 1j * rng.uniform(low, high, shape)).astype(dtype)
    low, high = _value_range(spec, dtype, default=(-1, 1))
    if spec.role == "state" and spec.low is None and spec.high is None:
        # Caches may have 10^8 elements: float32 numbers are drawn as such, and no clip is computed that changes nothing.
        values: Array = rng.standard_normal(shape, np.float64 if dtype.itemsize > 4 else np.float32)
        low, high = _finite_range(dtype)
        if high < _LARGEST_NORMAL:
            values = np.clip(values, low, high)
        return values.astype(dtype, copy=False)
    return rng.uniform(low, high, shape).astype(dtype)


def _wide_integer(dtype: np.dtype[Any]) -> type[np.int64] | type[np.uint64]:
    return np.uint64 if dtype == np.uint64 else np.int64


def _value_range(spec: InputSpec, dtype: np.dtype[Any], *, default: tuple[int, int]) -> tuple[float, float]:
    """Return the value range of the input, restricted to the finite range of its type."""
    low = spec.low if spec.low is not None else min(default[0], spec.high if spec.high is not None else default[0])
    high = spec.high if spec.high is not None else max(default[1], low)
    type_min, type_max = _finite_range(dtype)
    low, high = max(low, type_min), min(high, type_max)
    if low > high:
        raise ShapeError(
            f"input {spec}: its type has no value in the range {spec.low}..{spec.high}",
            hint="correct the range in the interface",
        )
    return low, high


def _finite_range(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the smallest and the largest finite value of a type."""
    import ml_dtypes

    if dtype.kind in "iu" or dtype.name in ("int2", "uint2", "int4", "uint4"):
        integer_info = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
        return integer_info.min, integer_info.max
    float_info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(float_info.min), float(float_info.max)
