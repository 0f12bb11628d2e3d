"""Sampling: selects the next token of each sequence from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ryzen_compile.errors import RyzenError, UsageError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling parameters, applied in the order of the fields; the defaults have no effect.

    Raises UsageError for a value that is out of range.
    """

    repetition_penalty: float = 1.0
    """Above 0. The logits of tokens in the sequence are divided by it if positive, and multiplied by it if negative."""
    temperature: float = 0.0
    """At least 0. The logits are divided by it; 0 is greedy decoding, for which the filters below have no effect."""
    top_k: int = 0
    """At least 0. Only the k most likely tokens, and those as likely as the k-th, are sampled; 0: all tokens."""
    top_p: float = 1.0
    """In (0, 1]. Only the smallest set of most likely tokens with at least this total probability is sampled."""
    min_p: float = 0.0
    """In [0, 1]. Only tokens with at least this fraction of the probability of the most likely token are sampled."""

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "above 0"),
            ("temperature", 0 <= self.temperature < np.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "in 0..1"),
        ):
            if not valid:
                raise UsageError(f"`{name}` must be {expected} (got {getattr(self, name)})")


def penalize_repetition(logits: Array, seen: Array, penalty: float) -> Array:
    """Return `logits` (rows, vocabulary) with those of the tokens in `seen` (rows, vocabulary) bool reduced by `penalty`."""
    return np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Array, k: int) -> Array:
    """Return `logits` (rows, vocabulary) with those below the k-th largest of their row set to -inf."""
    k = min(k, logits.shape[-1])
    return np.where(logits < np.partition(logits, -k, axis=-1)[:, -k, None], -np.inf, logits)


def keep_top_p(logits: Array, p: float) -> Array:
    """Return `logits` (rows, vocabulary) with all but the fewest largest of total probability at least `p` set to -inf."""
    order = np.argsort(logits, axis=-1, kind="stable")
    sorted_removed = softmax(np.take_along_axis(logits, order, axis=-1)).cumsum(axis=-1) <= 1 - p
    sorted_removed[:, -1] = False
    removed = np.empty_like(sorted_removed)
    np.put_along_axis(removed, order, sorted_removed, axis=-1)
    return np.where(removed, -np.inf, logits)


def keep_min_p(logits: Array, p: float) -> Array:
    """Return `logits` (rows, vocabulary) with those less probable than `p` times the maximum of their row set to -inf."""
    probs = softmax(logits)
    return np.where(probs < p * probs.max(axis=-1, keepdims=True), -np.inf, logits)


def softmax(logits: Array) -> Array:
    """Return the probabilities (rows, vocabulary) of `logits` (rows, vocabulary)."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def probabilities(logits: Array, sampling: SamplingParams) -> Array:
    """Return the probability of each token, (rows, vocabulary), for logits in float64; the temperature must not be 0."""
    with np.errstate(over="ignore"):  # logits far below the maximum may become -inf
        logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return softmax(logits)


def sample_tokens(probs: Array, uniform: Array) -> Array:
    """Return one token per row, (rows,), by inversion: the cumulative `probs` (rows, vocabulary) exceed `uniform` (rows,).

    `uniform` is in [0, 1).
    """
    sums = probs.cumsum(axis=-1)
    return np.asarray((sums <= uniform[:, None] * sums[:, -1:]).sum(axis=-1))


class Sampler:
    """Samples the tokens of several sequences, each in one slot with its own random generator."""

    def __init__(self, sampling: SamplingParams, num_slots: int) -> None:
        """Create `num_slots` empty slots."""
        self._sampling = sampling
        self._generators: list[np.random.Generator | None] = [None] * num_slots
        self._new_prompts: dict[int, Array] = {}
        self._seen: Array | None = None

    def start_sequence(self, slot: int, prompt: Array, seed: int) -> None:
        """Start a sequence in `slot` with the ids `prompt` (tokens,) and a random generator seeded with `seed`."""
        self._generators[slot] = np.random.default_rng(seed) if self._sampling.temperature else None
        self._new_prompts[slot] = prompt

    def next_tokens(self, slots: Sequence[int], logits: Array) -> Array:
        """Return the next token of the sequences in `slots`, (slots,) int64, given `logits` (slots, vocabulary).

        Raises RyzenError if the logits of a row are NaN or infinite.
        """
        logits = logits.astype(np.float64)
        if not np.isfinite(logits.max(axis=-1)).all():
            raise RyzenError(
                "no token can be sampled: the logits are NaN or infinite",
                hint="find the node that produces them: ryzen-compile compare PACKAGE --baseline MODEL.onnx --bisect",
            )
        if self._sampling.repetition_penalty != 1:
            seen = self._seen_tokens(logits.shape[-1])
            logits = penalize_repetition(logits, seen[list(slots)], self._sampling.repetition_penalty)
        if self._sampling.temperature:
            uniform = [generator.random() for slot in slots if (generator := self._generators[slot]) is not None]
            tokens = sample_tokens(probabilities(logits, self._sampling), np.array(uniform))
        else:
            tokens = logits.argmax(axis=-1)
        if self._seen is not None:
            self._seen[list(slots), tokens] = True
        return tokens

    def _seen_tokens(self, vocab_size: int) -> Array:
        """Return whether the sequence in each slot contains each token, (slots, vocabulary) bool."""
        if self._seen is None:
            self._seen = np.zeros((len(self._generators), vocab_size), np.bool_)
        for slot, prompt in self._new_prompts.items():
            self._seen[slot] = False
            self._seen[slot, prompt[prompt < vocab_size]] = True
        self._new_prompts.clear()
        return self._seen
