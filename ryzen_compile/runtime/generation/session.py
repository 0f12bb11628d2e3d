"""`DecodeSession`: decodes a batch of sequences step by step, with states that stay on the device of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.errors import BackendError, RyzenError, ShapeError, UsageError, did_you_mean
from ryzen_compile.runtime.generation.decoder_spec import SizeRanges, make_decoder_spec
from ryzen_compile.spec import profile
from ryzen_compile.spec.profile import format_shape
from ryzen_compile.utils.closeable import Closeable

if TYPE_CHECKING:
    from ryzen_compile.backends.api import StateBinding
    from ryzen_compile.runtime.generation.step_graphs import StepGraph

Array = np.ndarray[Any, Any]


class DecodeSession(Closeable):
    """The decoding state of a batch of sequences. Not thread-safe; sessions of one engine may run in different threads.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, *step_graphs: StepGraph, batch: int = 1, owner: object = None) -> None:
        """Allocate the states of `batch` sequences; each step runs on the first of `step_graphs` that supports its width.

        `owner` holds the graphs open and is kept alive as long as this session.

        Raises RyzenError if a graph is not a decoder with fixed-size states, ShapeError if no profile supports `batch`.
        """
        decoders = [make_decoder_spec(step_graph.interface) for step_graph in step_graphs]
        self.decoder = decoders[-1]
        """The inputs, logits and states of a step."""
        self._owner = owner
        self.batch = batch
        """The number of sequences."""
        self._profiles = tuple(item for step_graph in step_graphs for item in step_graph.profiles)
        ranges = [
            decoder.width_ranges(step_graph.profiles, batch) for step_graph, decoder in zip(step_graphs, decoders, strict=True)
        ]
        self.width_ranges = tuple(width_range for graph_ranges in ranges for width_range in graph_ranges)
        """The supported numbers of tokens per step, as ranges (smallest, largest)."""
        if not self.width_ranges:
            profile.select_profile(
                self._profiles, self.decoder.input_shapes(batch, self._profiles[0].opt[self.decoder.ids.name][1])
            )
        self._lengths = np.zeros(batch, np.int64)
        self._has_valid_states = True
        self._bindings: list[tuple[SizeRanges, StateBinding]] = []
        for step_graph, decoder, graph_ranges in zip(step_graphs, decoders, ranges, strict=True):
            if graph_ranges:
                share_with = self._bindings[0][1] if self._bindings else None
                binding = step_graph.session.bind_states(decoder.states, decoder.state_shapes(batch), share_with=share_with)
                self._bindings.append((graph_ranges, binding))
        self._first_binding = self._bindings[0][1]
        self._is_closed = False

    @property
    def lengths(self) -> Array:
        """The number of tokens in each sequence, (batch,) int64; a copy."""
        return self._lengths.copy()

    def step(self, ids: Any, mask: Any = None) -> Array:
        """Run one step on the next tokens of every sequence and return the logits, (batch, seq, vocabulary).

        `ids` is (batch, seq). `mask`, of the same shape, is 1 for tokens and 0 for padding, which follows the tokens of a row;
        a row may consist of padding only. Padding does not affect the states, and its logits are undefined.

        Raises ShapeError, before anything runs, for ids or a mask that do not match the decoder, for a step outside the
        profiles, and for a sequence that would exceed the capacity of the states. Raises BackendError if the engine fails;
        every row must be reset afterwards.
        """
        self._check_ready()
        inputs, counts = self.decoder.prepare_inputs(ids, mask, self.batch)
        seq = inputs[self.decoder.ids.name].shape[1]
        if not any(low <= seq <= high for low, high in self.width_ranges):
            profile.select_profile(self._profiles, self.decoder.input_shapes(self.batch, seq))
        binding = next(
            binding for graph_ranges, binding in self._bindings if any(low <= seq <= high for low, high in graph_ranges)
        )
        self._check_capacity(counts)
        self._has_valid_states = False
        logits = np.asarray(binding.run(inputs)[self.decoder.logits.name])
        if logits.ndim != 3 or logits.shape[:2] != (self.batch, seq):
            raise BackendError(
                f"`{self.decoder.logits.name}` is {format_shape(logits.shape)}, expected logits {self.batch}x{seq}xV",
                hint="change the graph to return the logits of every token of a step",
            )
        self._has_valid_states = True
        self._lengths += counts
        return logits

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Start new sequences in `rows`, or in all rows: their states return to the initial values.

        Raises UsageError for a row that does not exist.
        """
        self._check_open()
        row_indices = range(self.batch) if rows is None else [int(row) for row in rows]
        for row in row_indices:
            if not 0 <= row < self.batch:
                raise UsageError(f"this session has no row {row}", hint=f"its rows are 0..{self.batch - 1}")
        self._first_binding.reset(row_indices)
        self._lengths[list(row_indices)] = 0
        self._has_valid_states = self._has_valid_states or set(row_indices) == set(range(self.batch))

    def read_state(self, name: str) -> Array:
        """Return a copy of the state called `name`, (batch, ...). Raises UsageError for an unknown name."""
        self._check_open()
        names = [state.name for state in self.decoder.states]
        if name not in names:
            raise UsageError(f"this decoder has no state `{name}`", hint=did_you_mean(name, names))
        return self._first_binding.read(name)

    def close(self) -> None:
        """Free the memory of the states; a second call has no effect."""
        if not self._is_closed:
            self._is_closed = True
            for _, binding in self._bindings:
                binding.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RyzenError("this session is closed", hint="open another one: engine.session(batch=...)")

    def _check_ready(self) -> None:
        self._check_open()
        if not self._has_valid_states:
            raise RyzenError("the states are undefined because a step failed", hint="reset() every row")

    def _check_capacity(self, counts: Array) -> None:
        capacity = self.decoder.capacity
        full_rows = np.flatnonzero(self._lengths + counts > capacity) if capacity is not None else ()
        for row in full_rows:
            raise ShapeError(
                f"row {row} has {self._lengths[row]} tokens; {counts[row]} more would exceed the capacity of {capacity}",
                hint="reset the row, or rewrite the model with a larger capacity (kv-static{capacity=...}) and build it again",
            )
