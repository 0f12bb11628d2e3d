"""Synthetic feeds: seeded values that respect types, ranges, roles and each other.

Masks and positions follow from one number for each row: how many of its elements count. With a cache that grows, an input
step of `seq` elements comes after `past` earlier ones: a mask over `past + seq` elements counts all of the past and at
least one new element, and positions start at `past`.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ryzen_compile.data.validation import check_shapes, past_length
from ryzen_compile.errors import ShapeError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import InputSpec, Interface
from ryzen_compile.spec.profile import Shape, Shapes, format_shape

RowMode = Literal["mixed", "identical"]
"""How the rows of a batch relate: `mixed` rows differ, in length too; `identical` rows are one row again and again."""

Array = np.ndarray[Any, Any]


def synthesize(interface: Interface, shapes: Shapes, *, seed: int, rows: RowMode) -> dict[str, Array]:
    """Make one feed of exactly `shapes`; the same for the same arguments, whatever the order of the inputs.

    The rows of a mixed batch have lengths spread evenly from all elements down to a single one, in shuffled order; identical
    rows, and a batch of one, count in full. Raises ShapeError where `shapes` do not fit the interface, or not into memory.
    """
    check_shapes(interface, shapes)
    size = sum(_nbytes(spec, shapes[spec.name]) for spec in interface.inputs)
    if size > _memory_bytes():
        raise _too_large_error(interface, shapes, size)
    try:
        return _synthesize_inputs(interface, shapes, seed, rows)
    except (MemoryError, OverflowError) as error:
        raise _too_large_error(interface, shapes, size) from error


def _synthesize_inputs(interface: Interface, shapes: Shapes, seed: int, rows: RowMode) -> dict[str, Array]:
    past = past_length(interface, shapes)
    feed = {}
    for spec in interface.inputs:
        shape = tuple(shapes[spec.name])
        rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
        batch = interface.batch_axis(spec)
        one = shape if rows == "mixed" or batch is None else (*shape[:batch], 1, *shape[batch + 1 :])
        if spec.role == "mask":
            array = _mask(spec, one, past if _covers_past(interface, shapes, spec, past) else 0, seed)
        elif spec.role == "positions":
            array = _positions(spec, one, past)
        else:
            array = _random_values(spec, one, rng)
        feed[spec.name] = np.array(np.broadcast_to(array, shape), order="C")
    return feed


def _nbytes(spec: InputSpec, shape: Shape) -> int:
    item = 36 if spec.dtype == "string" else numpy_dtype(spec.dtype).itemsize  # the longest word made has nine characters
    return math.prod(map(int, shape)) * item


def _memory_bytes() -> int:
    """Return how much memory this machine has; where it does not tell, how much it could address."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def _too_large_error(interface: Interface, shapes: Shapes, size: int) -> ShapeError:
    spelt = ",".join(f"{spec.name}:{format_shape(shapes[spec.name])}" for spec in interface.inputs)
    memory = _memory_bytes()
    has = f", this machine has {memory / 1e9:.0f} GB" if memory < sys.maxsize else ""
    return ShapeError(
        f"a sample of {spelt} cannot be made: it takes {size} bytes ({size / 1e9:.3g} GB){has}", hint="ask for smaller shapes"
    )


def row_lengths(count: int, minimum: int, maximum: int, *, seed: int) -> Array:
    """Return how many elements of each of `count` rows count: evenly from `most` down to `least`, shuffled by `seed`."""
    lengths = np.floor(np.linspace(maximum, minimum, count)).astype(np.int64)
    return np.random.default_rng([seed, 1]).permutation(lengths)


def _covers_past(interface: Interface, shapes: Mapping[str, Shape], mask: InputSpec, past: int) -> bool:
    """Tell whether a mask speaks of the past and the new elements, and not of the new ones alone."""
    size = shapes[mask.name][-1] if shapes[mask.name] else 1
    new = [shapes[spec.name][-1] for spec in interface.inputs if spec.role in ("ids", "positions") and shapes[spec.name]]
    return past > 0 and size > past and size not in new


def _mask(spec: InputSpec, shape: Shape, past: int, seed: int) -> Array:
    """Return ones for the first elements along the last axis, zeros for the rest; each row of axis 0 has its own number."""
    if not shape:
        return np.ones(shape, numpy_dtype(spec.dtype))
    size, count = shape[-1], shape[0] if len(shape) > 1 else 1
    lengths = row_lengths(count, min(past + 1, size), size, seed=seed)
    ones = np.arange(size) < lengths.reshape(-1, *[1] * (len(shape) - 1))
    return np.broadcast_to(ones.reshape(shape) if len(shape) == 1 else ones, shape).astype(numpy_dtype(spec.dtype))


def _positions(spec: InputSpec, shape: Shape, past: int) -> Array:
    """Return past, past + 1, ... along the last axis, in every row."""
    size = shape[-1] if shape else 1
    if spec.high is not None and past + size - 1 > spec.high:
        raise ShapeError(
            f"input `{spec.name}` would count up to {past + size - 1}, and takes at most {spec.high:g}",
            hint="ask for a shorter length",
        )
    counted = past + np.arange(size)
    return np.broadcast_to(counted if shape else counted[0], shape).astype(numpy_dtype(spec.dtype))


def _random_values(spec: InputSpec, shape: Shape, rng: np.random.Generator) -> Array:
    dtype = numpy_dtype(spec.dtype)
    if spec.dtype == "string":
        words = np.array(["", "a", "token", "two words", "naïve", "数据"])
        return words[rng.integers(0, len(words), shape)]
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    if dtype.kind in "iu" or spec.dtype in ("int2", "uint2", "int4", "uint4"):
        low, high = _value_range(spec, dtype, default=(0, 1))
        return rng.integers(int(low), int(high), shape, dtype=_wide_integer(dtype), endpoint=True).astype(dtype)
    if dtype.kind == "c":
        low, high = spec.low if spec.low is not None else -1.0, spec.high if spec.high is not None else 1.0
        return (rng.uniform(low, high, shape) + 1j * rng.uniform(low, high, shape)).astype(dtype)
    low, high = _value_range(spec, dtype, default=(-1, 1))
    if spec.role == "state" and spec.low is None and spec.high is None:
        return np.clip(rng.standard_normal(shape), *_finite_range(dtype)).astype(dtype)
    return rng.uniform(low, high, shape).astype(dtype)


def _wide_integer(dtype: np.dtype[Any]) -> type[np.int64] | type[np.uint64]:
    return np.uint64 if dtype == np.uint64 else np.int64


def _value_range(spec: InputSpec, dtype: np.dtype[Any], *, default: tuple[int, int]) -> tuple[float, float]:
    """Return the smallest and the largest value that both mean something and can be held."""
    low = spec.low if spec.low is not None else min(default[0], spec.high if spec.high is not None else default[0])
    high = spec.high if spec.high is not None else max(default[1], low)
    least, most = _finite_range(dtype)
    low, high = max(low, least), min(high, most)
    if low > high:
        raise ShapeError(f"input {spec}: no value lies in {spec.low}..{spec.high}", hint="mend the range in its interface")
    return low, high


def _finite_range(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the smallest and the largest finite value of a type."""
    import ml_dtypes

    if dtype.kind in "iu" or dtype.name in ("int2", "uint2", "int4", "uint4"):
        whole = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
        return whole.min, whole.max
    real = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(real.min), float(real.max)
