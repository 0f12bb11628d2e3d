"""Sampling: the next token of each sequence, chosen from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ryzen_compile.errors import RyzenError, UsageError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; what is not neutral applies in the order of the fields. Raises UsageError out of range."""

    repetition_penalty: float = 1.0
    """Above 0: what the logits of tokens that the sequence holds are divided by, or multiplied with where negative."""
    temperature: float = 0.0
    """At least 0: what logits are divided by; 0 is greedy, and then the filters below have no part in it."""
    top_k: int = 0
    """At least 0: only this many of the likeliest tokens, and those as likely as the last of them; 0: all."""
    top_p: float = 1.0
    """In (0, 1]: only the fewest of the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """In [0, 1]: only tokens at least this many times as likely as the likeliest."""

    def __post_init__(self) -> None:
        for name, fine, takes in (
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "above 0"),
            ("temperature", 0 <= self.temperature < np.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "in 0..1"),
        ):
            if not fine:
                raise UsageError(f"`{name}` is {getattr(self, name)}", hint=f"it must be {takes}")


def penalize_repetition(logits: Array, seen: Array, penalty: float) -> Array:
    """Return `logits` (rows, vocabulary) with those of `held` (rows, vocabulary) bool made less likely by `penalty`."""
    return np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Array, k: int) -> Array:
    """Return `logits` (rows, vocabulary) with all below the k-th largest of their row at -inf."""
    k = min(k, logits.shape[-1])
    return np.where(logits < np.partition(logits, -k, axis=-1)[:, -k, None], -np.inf, logits)


def keep_top_p(logits: Array, p: float) -> Array:
    """Return `logits` (rows, vocabulary) with all but the fewest largest of total probability >= `p` at -inf."""
    order = np.argsort(logits, axis=-1, kind="stable")
    tail = softmax(np.take_along_axis(logits, order, axis=-1)).cumsum(axis=-1) <= 1 - p
    tail[:, -1] = False
    out = np.empty_like(tail)
    np.put_along_axis(out, order, tail, axis=-1)
    return np.where(out, -np.inf, logits)


def keep_min_p(logits: Array, p: float) -> Array:
    """Return `logits` (rows, vocabulary) with all less likely than `p` times their row's likeliest at -inf."""
    probabilities = softmax(logits)
    return np.where(probabilities < p * probabilities.max(axis=-1, keepdims=True), -np.inf, logits)


def softmax(logits: Array) -> Array:
    """Return the probabilities of `logits` (rows, vocabulary)."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def probabilities(logits: Array, sampling: SamplingParams) -> Array:
    """Return how likely each token is, (rows, vocabulary), from logits in float64; temperature must not be 0."""
    with np.errstate(over="ignore"):  # what is far below the likeliest may become -inf
        logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return softmax(logits)


def sample_tokens(probs: Array, uniform: Array) -> Array:
    """Return the token of each row, (rows,), where `uniform` (rows,) in [0, 1) cuts the sum of `likely` (rows, vocabulary)."""
    sums = probs.cumsum(axis=-1)
    return np.asarray((sums <= uniform[:, None] * sums[:, -1:]).sum(axis=-1))


class Sampler:
    """Chooses the tokens of several sequences, each in a slot; each draws from a generator of its own."""

    def __init__(self, sampling: SamplingParams, num_slots: int) -> None:
        """Make `slots` slots, in which no sequence has begun."""
        self._sampling = sampling
        self._generators: list[np.random.Generator | None] = [None] * num_slots
        self._new_prompts: dict[int, Array] = {}
        self._seen: Array | None = None

    def start_sequence(self, slot: int, prompt: Array, seed: int) -> None:
        """Begin a sequence of the ids `prompt` in `slot`; `seed` decides what it draws."""
        self._generators[slot] = np.random.default_rng(seed) if self._sampling.temperature else None
        self._new_prompts[slot] = prompt

    def next_tokens(self, slots: Sequence[int], logits: Array) -> Array:
        """Return the next token of the sequences in `slots`, (slots,) int64, from `logits` (slots, vocabulary)."""
        logits = logits.astype(np.float64)
        if not np.isfinite(logits.max(axis=-1)).all():
            raise RyzenError(
                "no token can be chosen: logits are NaN or infinite",
                hint="see which node they come from: ryzen-compile compare PACKAGE --bisect",
            )
        if self._sampling.repetition_penalty != 1:
            held = self._seen_tokens(logits.shape[-1])
            logits = penalize_repetition(logits, held[list(slots)], self._sampling.repetition_penalty)
        if self._sampling.temperature:
            uniform = [generator.random() for slot in slots if (generator := self._generators[slot]) is not None]
            tokens = sample_tokens(probabilities(logits, self._sampling), np.array(uniform))
        else:
            tokens = logits.argmax(axis=-1)
        if self._seen is not None:
            self._seen[list(slots), tokens] = True
        return tokens

    def _seen_tokens(self, vocab_size: int) -> Array:
        """Return which tokens the sequence in each slot holds, (slots, vocabulary) bool."""
        if self._seen is None:
            self._seen = np.zeros((len(self._generators), vocab_size), np.bool_)
        for slot, prompt in self._new_prompts.items():
            self._seen[slot] = False
            self._seen[slot, prompt[prompt < vocab_size]] = True
        self._new_prompts.clear()
        return self._seen
