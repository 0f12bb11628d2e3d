"""What a decoder of fixed-size states takes at each step, as its interface and its profiles tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.errors import RyzenError, ShapeError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.profile import format_shape

if TYPE_CHECKING:
    from ryzen_compile.spec.interface import InputSpec, Interface, StateSpec, TensorSpec
    from ryzen_compile.spec.profile import Profile

Array = np.ndarray[Any, Any]
SizeRanges = tuple[tuple[int, int], ...]
"""Sizes that are taken, each from its least to its most."""


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """An interface of ids, perhaps a mask, and states of fixed shape; the first output that is no state holds logits."""

    ids: InputSpec
    """(batch, seq)"""
    mask: InputSpec | None
    """(batch, seq): 1 for each token of the step, which are a prefix of its row, and 0 for padding."""
    logits: TensorSpec
    """(batch, seq, vocabulary)"""
    states: tuple[StateSpec, ...]
    state_row_shapes: dict[str, tuple[int, ...]]
    """The shape of a row of each state, by the name of its input."""
    state_dtypes: dict[str, str]
    """The element type of each state, likewise."""
    capacity: int | None
    """How many tokens a sequence may have; None: no bound."""

    def input_shapes(self, batch: int, seq: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every input of a step."""
        tokens = {spec.name: (batch, seq) for spec in (self.ids, self.mask) if spec is not None}
        return tokens | self.state_shapes(batch)

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the states, by the names of their inputs."""
        return {name: (batch, *sizes) for name, sizes in self.state_row_shapes.items()}

    def state_layouts(self) -> dict[str, tuple[float, str, tuple[int, ...]]]:
        """Return what each state holds before the first step, its element type and the shape of a row, by its name."""
        return {
            state.name: (state.initial_value, self.state_dtypes[state.input], self.state_row_shapes[state.input])
            for state in self.states
        }

    def batch_ranges(self, profiles: Iterable[Profile]) -> SizeRanges:
        """Return how many sequences the profiles take."""
        return tuple((one.min[self.ids.name][0], one.max[self.ids.name][0]) for one in profiles)

    def width_ranges(self, profiles: Iterable[Profile], batch: int) -> SizeRanges:
        """Return how many tokens a step may hold, by the profiles that take `batch` sequences; may be empty."""
        names = [spec.name for spec in (self.ids, self.mask) if spec is not None]
        ranges = [
            (max(1, *(one.min[name][1] for name in names)), min(one.max[name][1] for name in names), one) for one in profiles
        ]
        return tuple(
            (low, high) for low, high, one in ranges if low <= high and not one.mismatch(self.input_shapes(batch, low))
        )

    def check_ids(self, ids: Array, label: str) -> None:
        """Raise ShapeError where `ids` lie outside of the range that the interface knows."""
        low, high = self.ids.low or 0, self.ids.high
        least, most = int(ids.min()), int(ids.max())
        if least < low or (high is not None and most > high):
            raise ShapeError(f"{label}: ids lie in {low:g}..{'' if high is None else f'{high:g}'}, got {least}..{most}")

    def prepare_inputs(self, ids: Any, mask: Any, batch: int) -> tuple[dict[str, Array], Array]:
        """Return what a step feeds, by name, and how many tokens each row has, (batch,) int64; raises ShapeError."""
        given = _as_integers(ids, self.ids)
        if given.ndim != 2 or given.shape[0] != batch or given.shape[1] < 1:
            raise ShapeError(
                f"`{self.ids.name}` is {format_shape(given.shape) or 'a scalar'}, a step takes {batch}xN ids, N at least 1",
                hint="give each sequence of the session a row",
            )
        self.check_ids(given, f"`{self.ids.name}`")
        feed = {self.ids.name: given.astype(numpy_dtype(self.ids.dtype))}
        if self.mask is None and mask is not None:
            raise ShapeError("this decoder takes no mask", hint="feed rows of one length, without padding")
        ones = np.ones(given.shape, np.int64) if mask is None or self.mask is None else _as_integers(mask, self.mask)
        if ones.shape != given.shape:
            raise ShapeError(f"the mask is {format_shape(ones.shape)}, and `{self.ids.name}` {format_shape(given.shape)}")
        counts = ones.astype(np.int64).sum(axis=1)
        if not np.array_equal(ones, np.arange(given.shape[1]) < counts[:, None]):
            raise ShapeError("each row of the mask must be ones and then zeros", hint="pad on the right")
        if self.mask is not None:
            feed[self.mask.name] = ones.astype(numpy_dtype(self.mask.dtype))
        return feed, counts


def _as_integers(value: Any, spec: InputSpec) -> Array:
    """Return `value` as an array of integers; raises ShapeError where it is none."""
    try:
        array = np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ShapeError(f"`{spec.name}` cannot be read as an array: {error}") from error
    if array.dtype.kind not in "iub":
        raise ShapeError(f"`{spec.name}` is {array.dtype.name}, it takes integers")
    return array


def make_decoder_spec(interface: Interface) -> DecoderSpec:
    """Return the decoder that `interface` describes; raises RyzenError that says what is missing."""
    inputs = {spec.name: spec for spec in interface.inputs}
    carried, written = {state.input for state in interface.states}, {state.output for state in interface.states}
    ids = [spec for spec in interface.inputs if spec.role == "ids"]
    masks = [spec for spec in interface.inputs if spec.role == "mask"]
    others = [spec for spec in interface.inputs if spec.role not in ("ids", "mask") and spec.name not in carried]
    logits = [spec for spec in interface.outputs if spec.name not in written]
    if not interface.states:
        raise _not_a_decoder("it has no states")
    if (moving := next((one for one in interface.states if one.append_axis is not None), None)) is not None:
        raise _not_a_decoder(f"the state `{moving.name}` grows at each step")
    fixed: dict[str, tuple[int, ...]] = {}
    for state in interface.states:
        dims = inputs[state.input].dims
        row = tuple(dim for dim in (dims or ())[1:] if isinstance(dim, int))
        if not dims or len(row) < len(dims) - 1:
            raise _not_a_decoder(f"the state {inputs[state.input]} has no fixed shape behind a batch dimension")
        fixed[state.input] = row
    if len(ids) != 1 or len(ids[0].dims or ()) != 2:
        raise _not_a_decoder(f"it has {len(ids)} inputs of ids, and takes one (batch, seq)")
    if len(masks) > 1 or any(mask.dims != ids[0].dims for mask in masks):
        raise _not_a_decoder(f"its mask {masks[-1]} is not over the tokens of a step, {ids[0]}")
    if others:
        raise _not_a_decoder(f"`{others[0].name}` is neither ids, a mask nor a state")
    if not logits or len(logits[0].dims or ()) != 3:
        raise _not_a_decoder("its first output that is no state is no logits (batch, seq, vocabulary)")
    return DecoderSpec(
        ids=ids[0],
        mask=masks[0] if masks else None,
        logits=logits[0],
        states=interface.states,
        state_row_shapes=fixed,
        state_dtypes={name: inputs[name].dtype for name in fixed},
        capacity=interface.capacity,
    )


def _not_a_decoder(reason: str) -> RyzenError:
    return RyzenError(
        f"this engine is no decoder of fixed-size states: {reason}",
        hint='build it with the pass that makes one: passes="kv-static{capacity=4096}"',
    )


def nearest_size(wanted: int, ranges: SizeRanges, limit: int | None = None) -> int:
    """Return the least size in `ranges` that holds `wanted`, else the largest; one of at most `room` where there is any."""
    within = [(low, high if limit is None else min(high, limit)) for low, high in ranges if limit is None or low <= limit]
    holding = [max(low, wanted) for low, high in within or ranges if wanted <= high]
    return min(holding) if holding else max(high for _, high in within or ranges)
