"""A session of a decoder: a batch of sequences whose states stay where the engine computes."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ryzen_compile.errors import BackendError, RyzenError, ShapeError, UsageError, did_you_mean
from ryzen_compile.runtime.generation.decoder_spec import SizeRanges, make_decoder_spec
from ryzen_compile.spec import profile
from ryzen_compile.spec.profile import format_shape

if TYPE_CHECKING:
    from ryzen_compile.backends.api import StateBinding
    from ryzen_compile.runtime.generation.step_graphs import StepGraph

Array = np.ndarray[Any, Any]


class DecodeSession:
    """A batch of sequences under way. For one caller at a time; sessions of one engine may run in several threads.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, *step_graphs: StepGraph, batch: int = 1) -> None:
        """Make room for the states of `batch` sequences, over which the graphs of `parts` step, each where it suits.

        A step is run by the first of those that take it. Raises RyzenError where one is not the graph of a decoder whose
        states have fixed shapes, ShapeError where no profile takes `batch`.
        """
        decoders = [make_decoder_spec(part.interface) for part in step_graphs]
        self.decoder = decoders[-1]
        """What a step takes."""
        self.batch = batch
        """How many sequences it holds."""
        self._profiles = tuple(one for part in step_graphs for one in part.profiles)
        ranges = [decoder.width_ranges(part.profiles, batch) for part, decoder in zip(step_graphs, decoders, strict=True)]
        self.width_ranges = tuple(span for spans in ranges for span in spans)
        """How many tokens a step may hold, each range from its least to its most."""
        if not self.width_ranges:
            profile.select_profile(
                self._profiles, self.decoder.input_shapes(batch, self._profiles[0].opt[self.decoder.ids.name][1])
            )
        self._lengths = np.zeros(batch, np.int64)
        self._has_valid_states = True
        self._bindings: list[tuple[SizeRanges, StateBinding]] = []
        for part, decoder, spans in zip(step_graphs, decoders, ranges, strict=True):
            if spans:
                beside = self._bindings[0][1] if self._bindings else None
                steps = part.session.bind_states(decoder.states, decoder.state_shapes(batch), share_with=beside)
                self._bindings.append((spans, steps))
        self._first_binding = self._bindings[0][1]
        self._is_closed = False

    @property
    def lengths(self) -> Array:
        """How many tokens each sequence has seen, (batch,) int64: a copy."""
        return self._lengths.copy()

    def step(self, ids: Any, mask: Any = None) -> Array:
        """Feed the next tokens of every sequence and return the logits, (batch, seq, vocabulary).

        `ids` is (batch, seq). `mask`, of the same shape, is 1 for tokens and 0 for padding behind them; a row may be all
        padding, and padding leaves no trace. Logits of padding mean nothing.

        Raises ShapeError, before anything is run, for ids or a mask that do not fit, for a step outside of the profiles, and
        where a sequence would have more tokens than the capacity of its states. Raises BackendError where the engine fails;
        every row must be reset then.
        """
        self._check_ready()
        feed, counts = self.decoder.prepare_inputs(ids, mask, self.batch)
        seq = feed[self.decoder.ids.name].shape[1]
        if not any(low <= seq <= high for low, high in self.width_ranges):
            profile.select_profile(self._profiles, self.decoder.input_shapes(self.batch, seq))
        steps = next(form for spans, form in self._bindings if any(low <= seq <= high for low, high in spans))
        self._check_capacity(counts)
        self._has_valid_states = False
        logits = np.asarray(steps.run(feed)[self.decoder.logits.name])
        if logits.ndim != 3 or logits.shape[:2] != (self.batch, seq):
            raise BackendError(
                f"`{self.decoder.logits.name}` is {format_shape(logits.shape)}, logits are {self.batch}x{seq}xV",
                hint="let the graph return the logits of every token of a step",
            )
        self._has_valid_states = True
        self._lengths += counts
        return logits

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Begin new sequences in `rows`, or in all: their states are what they were before the first step."""
        self._check_open()
        chosen = range(self.batch) if rows is None else [int(row) for row in rows]
        for row in chosen:
            if not 0 <= row < self.batch:
                raise UsageError(f"this session has no row {row}", hint=f"it has 0..{self.batch - 1}")
        self._first_binding.reset(chosen)
        self._lengths[list(chosen)] = 0
        self._has_valid_states = self._has_valid_states or set(chosen) == set(range(self.batch))

    def read_state(self, name: str) -> Array:
        """Return a copy of the state called `name`, (batch, ...); raises UsageError for an unknown one."""
        self._check_open()
        known = [state.name for state in self.decoder.states]
        if name not in known:
            raise UsageError(f"this decoder has no state `{name}`", hint=did_you_mean(name, known))
        return self._first_binding.read(name)

    def close(self) -> None:
        """Give the memory of the states back; closing twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            for _, steps in self._bindings:
                steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RyzenError("this session is closed", hint="open another: engine.session(batch=...)")

    def _check_ready(self) -> None:
        self._check_open()
        if not self._has_valid_states:
            raise RyzenError("a step failed, and what it left of the states is not known", hint="reset() every row")

    def _check_capacity(self, counts: Array) -> None:
        capacity = self.decoder.capacity
        full = np.flatnonzero(self._lengths + counts > capacity) if capacity is not None else ()
        for row in full:
            raise ShapeError(
                f"row {row} has seen {self._lengths[row]} tokens, with {counts[row]} more it has over {capacity}",
                hint="build the decoder with a larger capacity, or reset the row",
            )
