"""Reshaping of real samples to exactly the shapes that a comparison requires."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ryzen_compile.data.synthetic import RowMode, synthesize
from ryzen_compile.data.validation import check_shapes
from ryzen_compile.spec.dims import dim_names, resolve_dim
from ryzen_compile.spec.interface import Inputs, InputSpec, Interface
from ryzen_compile.spec.profile import InputShapes, Shape

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _SampleRow:
    """One row of a sample."""

    arrays: Mapping[str, Array]
    """The array of every input, with size 1 along its batch axis."""
    valid: Mapping[str, Array]
    """The indices of the valid elements along each dimension with a padding mask, by dimension name."""
    sizes: Mapping[str, int]
    """The size of each dimension of the sample."""
    padded_left: bool
    """Whether padding precedes its valid elements."""


def reshape_samples(
    samples: Sequence[Inputs], interface: Interface, shapes: InputShapes, *, seed: int, rows: RowMode
) -> dict[str, Array]:
    """Return inputs of exactly `shapes`, built from the rows of real samples, starting at row `seed` modulo the row count.

    The valid elements of a row are truncated, or padded on the side on which the samples have their padding. The first row of a
    batch is filled to full length with the elements of the following rows, cyclically; with `rows="identical"` all rows are
    copies of the first. If the batch has more rows than the samples, the second round concatenates each row with the next one,
    the third with the one after it, and so on. Along dimensions without a mask, or with one whose padding value is unknown,
    elements repeat; lengths along such a dimension stay within its size, and the length of a full row is that size. All other
    values are synthetic: rows that would be duplicates, states without elements, and all inputs if
    there are no samples.

    Raises:
        ShapeError: `shapes` do not match the interface.
    """
    inputs = synthesize(interface, shapes, seed=seed, rows=rows)
    real = [row for sample in samples for row in _split_rows(sample, interface)]
    if not real:
        return inputs
    padded_left = any(row.padded_left for row in real)
    start = seed % len(real)
    real = real[start:] + real[:start]
    sizes = check_shapes(interface, shapes)
    count = sizes.get(interface.batch or "", 1)
    selected_rows = [_select_rows(real, index, sizes, rows) for index in range(count)]
    for spec in interface.inputs:
        axis = interface.batch_axis(spec)
        for index, source_rows in enumerate(selected_rows if axis is not None else selected_rows[:1]):
            position = (slice(None),) * (axis or 0) + ((slice(index, index + 1),) if axis is not None else ())
            target = inputs[spec.name][(*position, ...)]
            if source_rows and (values := _build_row(spec, source_rows, target.shape, sizes, padded_left)) is not None:
                target[...] = values
    return inputs


def _split_rows(inputs: Inputs, interface: Interface) -> list[_SampleRow]:
    """Split one sample into its rows."""
    sizes = check_shapes(interface, {name: array.shape for name, array in inputs.items()})
    sample_rows = []
    for index in range(sizes.get(interface.batch or "", 1)):
        arrays = {}
        for spec in interface.inputs:
            axis = interface.batch_axis(spec)
            arrays[spec.name] = inputs[spec.name] if axis is None else np.take(inputs[spec.name], [index], axis)
        valid = {}
        padded_left = False
        for mask in interface.inputs:
            if mask.is_padding_mask and (dim := _masked_dim(mask, interface)) in sizes:
                columns = (arrays[mask.name] != mask.padding_value).reshape(-1, arrays[mask.name].shape[-1]).any(axis=0)
                columns = columns[columns.size - sizes[dim] :]
                valid[dim] = np.flatnonzero(columns)
                padded_left |= bool(columns.size and columns[-1] and not columns[0])
        sample_rows.append(_SampleRow(arrays, valid, sizes, padded_left))
    return sample_rows


def _masked_dim(mask: InputSpec, interface: Interface) -> str:
    """Return the dimension that a mask covers: its last one, or for a sum `past+seq` the term that is not a cache length."""
    dim = mask.dims[-1] if mask.dims else ""
    states = [(interface.input(state.input).dims, state.append_axis) for state in interface.states]
    appended_dims = {dims[append_axis] for dims, append_axis in states if dims is not None and append_axis is not None}
    new_names = [name for name in dim_names(dim) if name not in appended_dims]
    return new_names[0] if len(new_names) == 1 else ""


def _select_rows(sample_rows: Sequence[_SampleRow], index: int, sizes: Mapping[str, int], rows: RowMode) -> list[_SampleRow]:
    """Return the sample rows to concatenate for row `index` of the batch; empty for a synthetic row."""
    masked_dims = sample_rows[0].valid.keys()
    if not masked_dims:
        index = 0 if rows == "identical" else index
        return [sample_rows[index]] if index < len(sample_rows) else []
    if rows == "identical" or index == 0:
        full_rows: list[_SampleRow] = []
        for row in itertools.cycle(sample_rows):
            full_rows.append(row)
            if all(sum(max(1, len(row.valid[dim])) for row in full_rows) >= sizes[dim] for dim in masked_dims):
                return full_rows
    round_, row_index = divmod(index, len(sample_rows))
    if round_ == 0:
        return [sample_rows[row_index]]
    return [sample_rows[row_index], sample_rows[(row_index + round_) % len(sample_rows)]] if round_ < len(sample_rows) else []


def _build_row(
    spec: InputSpec, sample_rows: Sequence[_SampleRow], shape: Shape, sizes: Mapping[str, int], padded_left: bool
) -> Array | None:
    """Return one row of an input with `shape`, or None if its synthetic values are kept."""
    dims = spec.dims
    if dims is None or spec.role == "positions":
        return None
    if spec.length_dim is not None:
        lengths_of_sample: Array = np.resize(sample_rows[0].arrays[spec.name], shape)
        size = sizes[spec.length_dim]
        return np.where(lengths_of_sample == sample_rows[0].sizes[spec.length_dim], size, lengths_of_sample.clip(max=size))
    lengths = {dim: min(max(1, sum(len(row.valid[dim]) for row in sample_rows)), sizes[dim]) for dim in sample_rows[0].valid}
    if spec.is_padding_mask and (count := _valid_count(dims[-1], lengths, sizes)) is not None:
        gap = shape[-1] - count
        columns = np.full(shape[-1], spec.valid_value, dtype=int)
        start = sum(sizes[dim] for dim in dim_names(dims[-1]) if dim not in lengths) if padded_left else count
        columns[start : start + gap] = spec.padding_value
        return np.broadcast_to(columns, shape)
    concat_axis = next((axis for axis, dim in enumerate(dims) if dim in lengths), None)
    parts = []
    for row in sample_rows if concat_axis is not None else sample_rows[:1]:
        array = row.arrays[spec.name]
        for axis, size in enumerate(shape):
            if axis == concat_axis:
                array = np.take(array, row.valid[str(dims[axis])], axis)
            elif size and not array.shape[axis]:
                return None
            else:
                array = np.take(array, np.arange(size) % max(1, array.shape[axis]), axis)
        parts.append(array)
    if concat_axis is None:
        return parts[0]
    joined = np.concatenate(parts, axis=concat_axis)
    truncated = np.take(joined, np.arange(min(shape[concat_axis], joined.shape[concat_axis])), concat_axis)
    padded = np.full(shape, "" if spec.dtype == "string" else max(spec.low or 0, 0), truncated.dtype)
    start = shape[concat_axis] - truncated.shape[concat_axis] if padded_left else 0
    padded[(slice(None),) * concat_axis + (slice(start, start + truncated.shape[concat_axis]),)] = truncated
    return padded


def _valid_count(dim: int | str, lengths: Mapping[str, int], sizes: Mapping[str, int]) -> int | None:
    """Return the number of valid elements in a mask's row, including those of the past; None if its length is fixed."""
    return resolve_dim(dim, {**sizes, **lengths}) if isinstance(dim, str) else None
