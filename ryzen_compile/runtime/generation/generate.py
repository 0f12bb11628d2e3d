"""Generation: continues prompts with a decoder, feeding prompts in chunks and several sequences per batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from ryzen_compile.errors import ShapeError, UsageError, did_you_mean
from ryzen_compile.runtime.generation.decoder_spec import DecoderSpec, make_decoder_spec, nearest_size
from ryzen_compile.runtime.generation.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from ryzen_compile.runtime.generation.session import DecodeSession
    from ryzen_compile.runtime.load import Engine

Array = np.ndarray[Any, Any]
FinishReason = Literal["stop", "length", "capacity"]
"""Why a sequence ended: a stop id was generated, the maximum number of new tokens was reached, or the states are full."""


@dataclass(frozen=True, kw_only=True)
class GeneratedSequence:
    """The continuation of one prompt."""

    tokens: Array
    """The new ids, (tokens,) int64, including the stop id if one ended the sequence."""
    finish_reason: FinishReason
    text: str | None = None
    """The text of the new ids without special tokens; None if the prompt was given as ids."""


class GenerationOptions(TypedDict, total=False):
    """The options of `Engine.generate`, `stream`, `stream_text` and `chat`."""

    max_new_tokens: int
    """The largest number of new tokens of a sequence, at least 1; default 256."""
    temperature: float
    """The logits are divided by it; default 0, which selects the most likely token."""
    top_k: int
    """Only the k most likely tokens; default 0, all."""
    top_p: float
    """The fewest most likely tokens of at least this total probability; default 1."""
    min_p: float
    """Only tokens of at least this fraction of the largest probability; default 0."""
    repetition_penalty: float
    """Reduces the logits of ids that the sequence contains; default 1, which has no effect."""
    seed: int
    """The random generator of the n-th sequence is seeded with `seed + n`; default 0."""
    stop: Collection[int]
    """The ids that end a sequence; default: those of the model's generation configuration, if the package holds one."""
    chunk: int
    """A step processes at most this number of tokens of a prompt; default 128."""


DEFAULT_MAX_NEW_TOKENS = 256
"""The largest number of new tokens of a sequence if none is given."""
DEFAULT_CHUNK = 128
"""The largest number of tokens of a prompt per step if none is given."""


@dataclass(frozen=True, kw_only=True)
class GenerationLimits:
    """When a sequence ends, and how prompts are divided. Raises UsageError for a number below 1."""

    max_new_tokens: int
    stop: frozenset[int] = frozenset()
    """The ids that end a sequence."""
    chunk: int = DEFAULT_CHUNK
    """The maximum number of tokens of one sequence per step."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "chunk"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1 (got {getattr(self, name)})")


@dataclass
class _ActiveSequence:
    """A sequence that is being continued."""

    index: int
    """Its index in the list of prompts."""
    pending: Array
    """The ids of the sequence that no step has processed yet, (tokens,)."""
    num_new_tokens: int = 0
    """The number of generated tokens."""


def parse_options(
    options: GenerationOptions, default_stop: Callable[[], Collection[int]]
) -> tuple[SamplingParams, GenerationLimits, int]:
    """Return the sampling parameters, the limits and the seed; `default_stop` returns the ids that end a sequence.

    Raises UsageError for an option that does not exist and for a value out of range.
    """
    for name in options:
        if name not in GenerationOptions.__annotations__:
            raise UsageError(
                f"there is no generation option `{name}`", hint=did_you_mean(name, [*GenerationOptions.__annotations__])
            )
    values: dict[str, Any] = dict(options)
    limits = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS}
    limits |= {name: values.pop(name) for name in ("max_new_tokens", "chunk") if name in values}
    stop = values.pop("stop", None)
    seed = values.pop("seed", 0)
    stop_ids = frozenset(default_stop() if stop is None else stop)
    return SamplingParams(**values), GenerationLimits(stop=stop_ids, **limits), seed


class Generation:
    """The continuation of a list of prompts. When a sequence ends, the next prompt starts in its row of the batch."""

    def __init__(self, engine: Engine, ids: Any, *, sampling: SamplingParams, limits: GenerationLimits, seed: int) -> None:
        """Validate the request without running anything.

        Raises RyzenError if `engine` is not a decoder with fixed-size states, ShapeError for prompts that it does not support,
        UsageError for a negative seed.
        """
        if seed < 0:
            raise UsageError(f"`seed` must be at least 0 (got {seed})")
        self._engine, self._sampling, self._limits, self._seed = engine, sampling, limits, seed
        self._decoder = make_decoder_spec(engine.interface)
        self._prompts = _parse_prompts(ids, self._decoder)
        max_batch = len(self._prompts) if self._decoder.mask is not None else 1
        self._batch = nearest_size(max_batch, self._decoder.batch_ranges(engine.profiles))
        if self._decoder.mask is None and self._batch > 1:
            raise ShapeError(
                f"this engine requires a batch of at least {self._batch} sequences, but has no mask input",
                hint="build it with a batch of 1",
            )
        self._finish_reasons: dict[int, FinishReason] = {}

    def collect(self) -> list[GeneratedSequence]:
        """Run to the end and return the continuation of each prompt."""
        tokens: list[list[int]] = [[] for _ in self._prompts]
        for index, token in self.stream():
            tokens[index].append(token)
        return [
            GeneratedSequence(tokens=np.array(new_tokens, np.int64), finish_reason=self._finish_reasons[index])
            for index, new_tokens in enumerate(tokens)
        ]

    def finish_reason(self, index: int) -> FinishReason | None:
        """Return why the sequence of the prompt at `index` ended; None while it is being continued."""
        return self._finish_reasons.get(index)

    def stream(self) -> Generator[tuple[int, int]]:
        """Yield each new token as (index of its prompt, id)."""
        sampler = Sampler(self._sampling, self._batch)
        waiting = deque(_ActiveSequence(index=index, pending=prompt) for index, prompt in enumerate(self._prompts))
        active: dict[int, _ActiveSequence] = {}
        with self._engine.session(self._batch) as session:
            while waiting or active:
                for row in range(self._batch):
                    if row not in active and waiting:
                        active[row] = waiting.popleft()
                        sampler.start_sequence(row, active[row].pending, self._seed + active[row].index)
                ready_rows, logits = self._step(session, active)
                tokens = sampler.next_tokens(ready_rows, logits).tolist()
                new_tokens = [(active[row].index, token) for row, token in zip(ready_rows, tokens, strict=True)]
                finished_rows = [
                    row
                    for row, token in zip(ready_rows, tokens, strict=True)
                    if self._is_finished(session, row, active[row], token)
                ]
                for row in finished_rows:
                    del active[row]
                if finished_rows and (waiting or active):
                    session.reset(finished_rows)
                yield from new_tokens

    def _step(self, session: DecodeSession, active: dict[int, _ActiveSequence]) -> tuple[list[int], Array]:
        """Run the next chunk of each sequence; return the rows without pending ids, and the last logits of each of them.

        The first chunk of a prompt is the remainder of the division by the chunk size, so that the last chunk is complete:
        the last chunk may decide which tokens a cache retains.
        """
        decoder = self._decoder
        chunk = min(self._limits.chunk, max(high for _, high in session.width_ranges))
        longest = max(len(sequence.pending) % chunk or chunk for sequence in active.values())
        remaining_capacity = (
            None if decoder.capacity is None else decoder.capacity - max(int(session.lengths[row]) for row in active)
        )
        width = nearest_size(longest, session.width_ranges, remaining_capacity)
        if decoder.mask is None:
            width = min(width, longest)
        ids = np.full((self._batch, width), int(decoder.ids.low or 0), np.int64)
        counts = np.zeros(self._batch, np.int64)
        for row, sequence in active.items():
            size = min(len(sequence.pending) % chunk or chunk, width)
            step_ids, sequence.pending = sequence.pending[:size], sequence.pending[size:]
            ids[row, : len(step_ids)], counts[row] = step_ids, len(step_ids)
        mask = None if decoder.mask is None else np.arange(width) < counts[:, None]
        logits = session.step(ids, mask)
        ready_rows = [row for row, sequence in active.items() if not len(sequence.pending)]
        return ready_rows, logits[ready_rows, counts[ready_rows] - 1]

    def _is_finished(self, session: DecodeSession, row: int, sequence: _ActiveSequence, token: int) -> bool:
        """Append `token` to the sequence in `row` and return whether the sequence ends."""
        sequence.pending = np.array([token], np.int64)
        sequence.num_new_tokens += 1
        capacity, min_width = self._decoder.capacity, min(low for low, _ in session.width_ranges)
        if token in self._limits.stop:
            self._finish_reasons[sequence.index] = "stop"
        elif sequence.num_new_tokens == self._limits.max_new_tokens:
            self._finish_reasons[sequence.index] = "length"
        elif capacity is not None and session.lengths[row] + min_width > capacity:
            self._finish_reasons[sequence.index] = "capacity"
        return sequence.index in self._finish_reasons


def _parse_prompts(ids: Any, decoder: DecoderSpec) -> list[Array]:
    """Return one or several prompts as a list of arrays, (tokens,) int64 each. Raises ShapeError for an invalid prompt."""
    prompts = []
    for index, prompt_ids in enumerate(ids if _is_nested(ids) else [ids]):
        try:
            prompt = np.asarray(prompt_ids)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ShapeError(f"sequence {index} cannot be read as ids: {error}") from error
        if prompt.ndim != 1 or not prompt.size:
            raise ShapeError(f"sequence {index} contains no ids", hint="begin it with a token, such as the BOS token")
        if prompt.dtype.kind not in "iu":
            raise ShapeError(f"sequence {index} is {prompt.dtype.name}, expected integers")
        decoder.check_ids(prompt, f"sequence {index}")
        if decoder.capacity is not None and prompt.size > decoder.capacity:
            raise ShapeError(
                f"sequence {index} contains {prompt.size} ids, but the capacity of the decoder is {decoder.capacity} tokens",
                hint="shorten it, or rewrite the model with a larger capacity (kv-static{capacity=...}) and build it again",
            )
        prompts.append(prompt.astype(np.int64))
    if not prompts:
        raise ShapeError("there is no sequence to continue", hint="pass one sequence of ids, or a list of sequences")
    return prompts


def _is_nested(ids: Any) -> bool:
    """Return whether `ids` is a list of sequences rather than one sequence of numbers."""
    if hasattr(ids, "ndim"):
        return bool(ids.ndim > 1)
    return isinstance(ids, (list, tuple)) and (not ids or not isinstance(ids[0], (int, np.integer)))
