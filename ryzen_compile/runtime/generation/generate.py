"""Generation: sequences continued by a decoder, prompts fed in chunks, several sequences at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.runtime.generation.decoder_spec import DecoderSpec, make_decoder_spec, nearest_size
from ryzen_compile.runtime.generation.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from ryzen_compile.runtime.generation.session import DecodeSession
    from ryzen_compile.runtime.load import Engine

Array = np.ndarray[Any, Any]
FinishReason = Literal["stop", "length", "capacity"]
"""Why a sequence ended: by a stop id, with as many new tokens as asked for, or because its states are full."""


@dataclass(frozen=True, kw_only=True)
class GeneratedSequence:
    """How a sequence went on."""

    tokens: Array
    """The new ids, (new,) int64; a stop id that ended it is the last of them."""
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class GenerationLimits:
    """When a sequence ends, and how much of a prompt is fed at once. Raises UsageError for numbers below 1."""

    max_new_tokens: int
    stop: frozenset[int] = frozenset()
    """The ids that end a sequence."""
    chunk: int = 128
    """The most tokens of a sequence that a step feeds."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "chunk"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` is {getattr(self, name)}", hint="it must be at least 1")


@dataclass
class _ActiveSequence:
    """A sequence under way."""

    index: int
    """Its place among the prompts."""
    pending: Array
    """Those of its ids that no step has fed."""
    num_new_tokens: int = 0
    """How many tokens it has beyond its prompt."""


class Generation:
    """Sequences to continue. Where there are more than the profiles take, the next begins in the row of one that ended."""

    def __init__(self, engine: Engine, ids: Any, *, sampling: SamplingParams, limits: GenerationLimits, seed: int) -> None:
        """Check all that was asked for; nothing is run yet.

        Raises RyzenError for an engine that is no decoder, ShapeError for prompts that it cannot take, UsageError for a
        seed below 0.
        """
        if seed < 0:
            raise UsageError(f"`seed` is {seed}", hint="it must be at least 0")
        self._engine, self._sampling, self._limits, self._seed = engine, sampling, limits, seed
        self._decoder = make_decoder_spec(engine.interface)
        self._prompts = _parse_prompts(ids, self._decoder)
        together = len(self._prompts) if self._decoder.mask is not None else 1
        self._batch = nearest_size(together, self._decoder.batch_ranges(engine.profiles))
        if self._decoder.mask is None and self._batch > 1:
            raise ShapeError("this engine takes several sequences at once, and no mask", hint="build it with a batch of 1")
        self._finish_reasons: dict[int, FinishReason] = {}

    def collect(self) -> list[GeneratedSequence]:
        """Run to the end and return how each sequence went on."""
        tokens: list[list[int]] = [[] for _ in self._prompts]
        for index, token in self.stream():
            tokens[index].append(token)
        return [
            GeneratedSequence(tokens=np.array(new, np.int64), finish_reason=self._finish_reasons[index])
            for index, new in enumerate(tokens)
        ]

    def stream(self) -> Iterator[tuple[int, int]]:
        """Yield each new token as (index of its sequence, id)."""
        sampler = Sampler(self._sampling, self._batch)
        waiting = deque(_ActiveSequence(index=index, pending=prompt) for index, prompt in enumerate(self._prompts))
        rows: dict[int, _ActiveSequence] = {}
        with self._engine.session(self._batch) as session:
            while waiting or rows:
                for row in range(self._batch):
                    if row not in rows and waiting:
                        rows[row] = waiting.popleft()
                        sampler.start_sequence(row, rows[row].pending, self._seed + rows[row].index)
                last, logits = self._step(session, rows)
                chosen = sampler.next_tokens(last, logits).tolist()
                new = [(rows[row].index, token) for row, token in zip(last, chosen, strict=True)]
                over = [
                    row for row, token in zip(last, chosen, strict=True) if self._is_finished(session, row, rows[row], token)
                ]
                for row in over:
                    del rows[row]
                if over and (waiting or rows):
                    session.reset(over)
                yield from new

    def _step(self, session: DecodeSession, rows: dict[int, _ActiveSequence]) -> tuple[list[int], Array]:
        """Feed the next chunk of each sequence; return the rows with nothing left to feed, and their last logits.

        The first chunk of a prompt is what is left over, so that its last is whole: caches may choose by it what they keep.
        """
        decoder = self._decoder
        most = min(self._limits.chunk, max(high for _, high in session.width_ranges))
        wanted = max(len(one.pending) % most or most for one in rows.values())
        room = None if decoder.capacity is None else decoder.capacity - max(int(session.lengths[row]) for row in rows)
        width = nearest_size(wanted, session.width_ranges, room)
        if decoder.mask is None:
            width = min(width, wanted)
        ids = np.full((self._batch, width), int(decoder.ids.low or 0), np.int64)
        counts = np.zeros(self._batch, np.int64)
        for row, one in rows.items():
            size = min(len(one.pending) % most or most, width)
            fed, one.pending = one.pending[:size], one.pending[size:]
            ids[row, : len(fed)], counts[row] = fed, len(fed)
        mask = None if decoder.mask is None else np.arange(width) < counts[:, None]
        logits = session.step(ids, mask)
        last = [row for row, one in rows.items() if not len(one.pending)]
        return last, logits[last, counts[last] - 1]

    def _is_finished(self, session: DecodeSession, row: int, sequence: _ActiveSequence, token: int) -> bool:
        """Append `token` to a sequence and return whether that ends it."""
        sequence.pending = np.array([token], np.int64)
        sequence.num_new_tokens += 1
        capacity, least = self._decoder.capacity, min(low for low, _ in session.width_ranges)
        if token in self._limits.stop:
            self._finish_reasons[sequence.index] = "stop"
        elif sequence.num_new_tokens == self._limits.max_new_tokens:
            self._finish_reasons[sequence.index] = "length"
        elif capacity is not None and session.lengths[row] + least > capacity:
            self._finish_reasons[sequence.index] = "capacity"
        return sequence.index in self._finish_reasons


def _parse_prompts(ids: Any, decoder: DecoderSpec) -> list[Array]:
    """Return one sequence of ids or several as a list of arrays, (ids,) int64 each; raises ShapeError."""
    several = ids if _is_nested(ids) else [ids]
    prompts = []
    for index, one in enumerate(several):
        try:
            prompt = np.asarray(one)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ShapeError(f"sequence {index} cannot be read as ids: {error}") from error
        if prompt.ndim != 1 or not prompt.size:
            raise ShapeError(f"sequence {index} holds no ids", hint="begin it with a token, such as the one for a beginning")
        if prompt.dtype.kind not in "iu":
            raise ShapeError(f"sequence {index} is {prompt.dtype.name}, ids are integers")
        decoder.check_ids(prompt, f"sequence {index}")
        if decoder.capacity is not None and prompt.size > decoder.capacity:
            raise ShapeError(
                f"sequence {index} holds {prompt.size} ids, the decoder takes {decoder.capacity} tokens",
                hint="shorten it, or build the decoder with a larger capacity",
            )
        prompts.append(prompt.astype(np.int64))
    if not prompts:
        raise ShapeError("there is no sequence to continue", hint="give one sequence of ids, or a list of such")
    return prompts


def _is_nested(ids: Any) -> bool:
    """Whether these are several sequences of ids; one is a row of numbers."""
    if hasattr(ids, "ndim"):
        return bool(ids.ndim > 1)
    return isinstance(ids, (list, tuple)) and (not ids or not isinstance(ids[0], (int, np.integer)))
