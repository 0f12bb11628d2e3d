"""Fitting: real samples brought to exactly the shapes that a comparison asks for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.data.synthetic import RowMode, synthesize
from ryzen_compile.data.validation import check_shapes
from ryzen_compile.spec.interface import InputSpec, Interface, resolve_dim
from ryzen_compile.spec.profile import Shape, Shapes

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Inputs

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _SampleRow:
    """One row of a sample."""

    arrays: Mapping[str, Array]
    """Of every input; with one row along the batch."""
    lengths: Mapping[str, int]
    """How many elements count along each dimension that a mask speaks of, by its name."""


def reshape_samples(
    samples: Sequence[Inputs], interface: Interface, shapes: Shapes, *, seed: int, rows: RowMode
) -> dict[str, Array]:
    """Make one feed of exactly `shapes` from the rows of real samples, beginning at the `seed`-th.

    Each row is cut, or padded behind its own elements, which the mask then excludes. The first row of a batch is made full
    instead by going on with the elements of the rows after it, again and again; identical rows repeat that one. Where there
    are fewer rows than the batch takes, the second round joins each with its neighbour, the third with the next but one.
    What cannot be had so is synthetic: rows that would repeat others, states without elements, a feed without samples.
    Along dimensions that no mask speaks of, elements repeat. Raises ShapeError where `shapes` do not fit the interface.
    """
    made = synthesize(interface, shapes, seed=seed, rows=rows)
    real = [row for feed in samples for row in _split_rows(feed, interface)]
    if not real:
        return made
    start = seed % len(real)
    real = real[start:] + real[:start]
    sizes = check_shapes(interface, shapes)
    count = sizes.get(interface.batch or "", 1)
    batch = [_select_rows(real, at, sizes, rows) for at in range(count)]
    for spec in interface.inputs:
        axis = interface.batch_axis(spec)
        for at, pieces in enumerate(batch if axis is not None else batch[:1]):
            place = (slice(None),) * (axis or 0) + ((slice(at, at + 1),) if axis is not None else ())
            room = made[spec.name][place]
            if pieces and (filled := _build_row(spec, pieces, room.shape, sizes)) is not None:
                room[...] = filled
    return made


def _split_rows(inputs: Inputs, interface: Interface) -> list[_SampleRow]:
    """Cut one sample into its rows."""
    sizes = check_shapes(interface, {name: array.shape for name, array in inputs.items()})
    found = []
    for at in range(sizes.get(interface.batch or "", 1)):
        arrays = {}
        for spec in interface.inputs:
            axis = interface.batch_axis(spec)
            arrays[spec.name] = inputs[spec.name] if axis is None else np.take(inputs[spec.name], [at], axis)
        lengths = {}
        for mask in interface.inputs:
            if mask.role == "mask" and (dim := _masked_dim(mask, interface)) in sizes:
                ones = int(np.count_nonzero(arrays[mask.name]) // max(1, np.prod(arrays[mask.name].shape[:-1], dtype=int)))
                lengths[dim] = ones - (arrays[mask.name].shape[-1] - sizes[dim])
        found.append(_SampleRow(arrays, lengths))
    return found


def _masked_dim(mask: InputSpec, interface: Interface) -> str:
    """Return the dimension whose elements a mask counts: its last, or of `past+seq` the one that is not a cache's."""
    dim = mask.dims[-1] if mask.dims else ""
    carried = [(interface.input(state.input).dims, state.append_axis) for state in interface.states]
    grown = {dims[grows] for dims, grows in carried if dims is not None and grows is not None}
    new = [term.strip() for term in str(dim).split("+") if term.strip() not in grown]
    return new[0] if len(new) == 1 else ""


def _select_rows(sample_rows: Sequence[_SampleRow], index: int, sizes: Mapping[str, int], rows: RowMode) -> list[_SampleRow]:
    """Return the rows to join into row `at` of the batch; none where it should be synthetic."""
    counted = sample_rows[0].lengths.keys()
    if not counted:
        index = 0 if rows == "identical" else index
        return [sample_rows[index]] if index < len(sample_rows) else []
    if rows == "identical" or index == 0:
        full: list[_SampleRow] = []
        for row in itertools.cycle(sample_rows):
            full.append(row)
            if all(sum(max(1, one.lengths[dim]) for one in full) >= sizes[dim] for dim in counted):
                return full
    turn, first = divmod(index, len(sample_rows))
    if turn == 0:
        return [sample_rows[first]]
    return [sample_rows[first], sample_rows[(first + turn) % len(sample_rows)]] if turn < len(sample_rows) else []


def _build_row(spec: InputSpec, sample_rows: Sequence[_SampleRow], shape: Shape, sizes: Mapping[str, int]) -> Array | None:
    """Return one row of an input, in `shape`; None where it stays as it was made."""
    dims = spec.dims
    if dims is None or spec.role == "positions":
        return None
    counted = {dim: _clamped_length([row.lengths[dim] for row in sample_rows], sizes[dim]) for dim in sample_rows[0].lengths}
    if spec.role == "mask" and dims and (ones := _mask_length(dims[-1], counted, sizes)) is not None:
        return np.broadcast_to(np.arange(shape[-1]) < ones, shape)
    along = next((axis for axis, dim in enumerate(dims) if dim in counted), None)
    parts = []
    for row in sample_rows if along is not None else sample_rows[:1]:
        array = row.arrays[spec.name]
        for axis, size in enumerate(shape):
            if axis == along:
                array = np.take(array, np.arange(row.lengths[str(dims[axis])]), axis)
            elif size and not array.shape[axis]:
                return None
            else:
                array = np.take(array, np.arange(size) % max(1, array.shape[axis]), axis)
        parts.append(array)
    if along is None:
        return parts[0]
    joined = np.concatenate(parts, axis=along)
    kept = np.take(joined, np.arange(min(shape[along], joined.shape[along])), along)
    padded = np.full(shape, "" if spec.dtype == "string" else max(spec.low or 0, 0), kept.dtype)
    padded[(slice(None),) * along + (slice(kept.shape[along]),)] = kept
    return padded


def _clamped_length(lengths: Sequence[int], maximum: int) -> int:
    return min(max(1, sum(lengths)), maximum)


def _mask_length(dim: int | str, counted: Mapping[str, int], sizes: Mapping[str, int]) -> int | None:
    """Return how many elements of a mask's row count, all of the past among them; None where its length is fixed."""
    return resolve_dim(dim, {**sizes, **counted}) if isinstance(dim, str) else None
