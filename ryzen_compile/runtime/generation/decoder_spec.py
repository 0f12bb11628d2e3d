"""`DecoderSpec`: the inputs of one step of a decoder with fixed-size states, derived from its interface and its profiles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.errors import RyzenError, ShapeError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import InputSpec, Interface, StateSpec, TensorSpec
from ryzen_compile.spec.profile import format_shape

if TYPE_CHECKING:
    from ryzen_compile.spec.profile import Profile

Array = np.ndarray[Any, Any]
SizeRanges = tuple[tuple[int, int], ...]
"""Ranges of supported sizes, each as (smallest, largest), both inclusive."""


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder with inputs ids, optionally a mask, and states of fixed shape; its first non-state output holds the logits."""

    ids: InputSpec
    """(batch, seq)"""
    mask: InputSpec | None
    """(batch, seq): 1 for each token of the step, which are a prefix of the row, and 0 for padding."""
    logits: TensorSpec
    """(batch, seq, vocabulary)"""
    states: tuple[StateSpec, ...]
    state_row_shapes: dict[str, tuple[int, ...]]
    """{state input name: shape of one row}."""
    state_dtypes: dict[str, str]
    """{state input name: element type}."""
    capacity: int | None
    """The maximum number of tokens in a sequence; None: unbounded."""

    def input_shapes(self, batch: int, seq: int) -> dict[str, tuple[int, ...]]:
        """Return {input name: shape} of a step of `batch` rows of `seq` tokens."""
        tokens = {spec.name: (batch, seq) for spec in (self.ids, self.mask) if spec is not None}
        return tokens | self.state_shapes(batch)

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Return {state input name: shape} for `batch` rows."""
        return {name: (batch, *sizes) for name, sizes in self.state_row_shapes.items()}

    def state_layouts(self) -> dict[str, tuple[float, str, tuple[int, ...]]]:
        """Return {state name: (initial value, element type, shape of one row)}."""
        return {
            state.name: (state.initial_value, self.state_dtypes[state.input], self.state_row_shapes[state.input])
            for state in self.states
        }

    def batch_ranges(self, profiles: Iterable[Profile]) -> SizeRanges:
        """Return the ranges of the number of sequences that `profiles` support."""
        return tuple((profile.min[self.ids.name][0], profile.max[self.ids.name][0]) for profile in profiles)

    def width_ranges(self, profiles: Iterable[Profile], batch: int) -> SizeRanges:
        """Return the ranges of tokens per step of the profiles that support `batch` sequences; empty if none does."""
        names = [spec.name for spec in (self.ids, self.mask) if spec is not None]
        ranges = [
            (max(1, *(profile.min[name][1] for name in names)), min(profile.max[name][1] for name in names), profile)
            for profile in profiles
        ]
        return tuple(
            (low, high) for low, high, profile in ranges if low <= high and not profile.mismatch(self.input_shapes(batch, low))
        )

    def check_ids(self, ids: Array, label: str) -> None:
        """Raise ShapeError, prefixed with `label`, if an id is outside the range of the interface."""
        low, high = self.ids.low or 0, self.ids.high
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < low or (high is not None and largest > high):
            limits = f"at least {low:g}" if high is None else f"in {low:g}..{high:g}"
            raise ShapeError(f"{label}: ids must be {limits} (got {smallest}..{largest})")

    def prepare_inputs(self, ids: Any, mask: Any, batch: int) -> tuple[dict[str, Array], Array]:
        """Return {input name: array} of a step, and the number of tokens of each row, (batch,) int64.

        `ids` is (batch, seq), `mask` the same or None. Raises ShapeError if they do not match the decoder.
        """
        id_array = _as_integers(ids, self.ids)
        if id_array.ndim != 2 or id_array.shape[0] != batch or id_array.shape[1] < 1:
            raise ShapeError(
                f"`{self.ids.name}` is {format_shape(id_array.shape) or 'a scalar'}, expected {batch}xN ids with N at least 1",
                hint="pass one row per sequence of the session",
            )
        self.check_ids(id_array, f"`{self.ids.name}`")
        inputs = {self.ids.name: id_array.astype(numpy_dtype(self.ids.dtype))}
        if self.mask is None and mask is not None:
            raise ShapeError("this decoder has no mask input", hint="pass rows of equal length, without padding")
        mask_array = np.ones(id_array.shape, np.int64) if mask is None or self.mask is None else _as_integers(mask, self.mask)
        if mask_array.shape != id_array.shape:
            raise ShapeError(
                f"the mask is {format_shape(mask_array.shape)}, but `{self.ids.name}` is {format_shape(id_array.shape)}"
            )
        counts = mask_array.astype(np.int64).sum(axis=1)
        if not np.array_equal(mask_array, np.arange(id_array.shape[1]) < counts[:, None]):
            raise ShapeError("each row of the mask must be ones followed by zeros", hint="pad on the right")
        if self.mask is not None:
            inputs[self.mask.name] = mask_array.astype(numpy_dtype(self.mask.dtype))
        return inputs, counts


def _as_integers(value: Any, spec: InputSpec) -> Array:
    """Return `value` as an array of integers. Raises ShapeError if it is not one."""
    try:
        array = np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ShapeError(f"`{spec.name}` cannot be read as an array: {error}") from error
    if array.dtype.kind not in "iub":
        raise ShapeError(f"`{spec.name}` is {array.dtype.name}, expected integers")
    return array


def make_decoder_spec(interface: Interface) -> DecoderSpec:
    """Return the decoder described by `interface`. Raises RyzenError, with the reason, if it is not such a decoder."""
    inputs = {spec.name: spec for spec in interface.inputs}
    state_inputs, state_outputs = {state.input for state in interface.states}, {state.output for state in interface.states}
    ids = [spec for spec in interface.inputs if spec.role == "ids"]
    masks = [spec for spec in interface.inputs if spec.role == "mask"]
    others = [spec for spec in interface.inputs if spec.role not in ("ids", "mask") and spec.name not in state_inputs]
    logits = [spec for spec in interface.outputs if spec.name not in state_outputs]
    if not interface.states:
        hint = "only a language model that was exported with its KV caches generates: ryzen-compile export hf:FOLDER dec/"
        raise _not_a_decoder("it has no states", hint=hint)
    if (growing := next((state for state in interface.states if state.append_axis is not None), None)) is not None:
        raise _not_a_decoder(f"the state `{growing.name}` grows at each step")
    row_shapes: dict[str, tuple[int, ...]] = {}
    for state in interface.states:
        dims = inputs[state.input].dims
        row_shape = tuple(dim for dim in (dims or ())[1:] if isinstance(dim, int))
        if not dims or len(row_shape) < len(dims) - 1:
            raise _not_a_decoder(f"the state {inputs[state.input]} has no fixed shape after a batch dim")
        row_shapes[state.input] = row_shape
    if len(ids) != 1 or len(ids[0].dims or ()) != 2:
        raise _not_a_decoder(f"it has {len(ids)} inputs of ids, expected one of shape (batch, seq)")
    if len(masks) > 1 or any(mask.dims != ids[0].dims for mask in masks):
        raise _not_a_decoder(f"its mask {masks[-1]} does not cover the tokens of one step, as {ids[0]} does")
    if any(mask.padding_value == 1 for mask in masks):
        raise _not_a_decoder(f"its mask {masks[0]} marks padding with 1, expected 0")
    if others:
        raise _not_a_decoder(f"`{others[0].name}` is neither ids, a mask nor a state")
    if not logits or len(logits[0].dims or ()) != 3:
        raise _not_a_decoder("its first output that is not a state has no logits of shape (batch, seq, vocabulary)")
    return DecoderSpec(
        ids=ids[0],
        mask=masks[0] if masks else None,
        logits=logits[0],
        states=interface.states,
        state_row_shapes=row_shapes,
        state_dtypes={name: inputs[name].dtype for name in row_shapes},
        capacity=interface.capacity,
    )


def _not_a_decoder(reason: str, *, hint: str | None = None) -> RyzenError:
    return RyzenError(
        f"this engine is not a decoder with fixed-size states: {reason}",
        hint=hint
        or "create one first: ryzen-compile rewrite MODEL.onnx decode.onnx --passes 'kv-static{capacity=4096}', "
        "then build decode.onnx",
    )


def nearest_size(size: int, ranges: SizeRanges, limit: int | None = None) -> int:
    """Return the smallest supported size that is at least `size`, else the largest supported one.

    The result is at most `limit` if `ranges` contain such a size.
    """
    within_limit = [(low, high if limit is None else min(high, limit)) for low, high in ranges if limit is None or low <= limit]
    sufficient = [max(low, size) for low, high in within_limit or ranges if size <= high]
    return min(sufficient) if sufficient else max(high for _, high in within_limit or ranges)
