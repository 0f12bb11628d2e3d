"""Long generation: how a decoder goes on by itself, far beyond what its caches hold, where small damage adds up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import MetricResult
from ryzen_compile.evaluation.intervals import bootstrap_ratio
from ryzen_compile.evaluation.systems import Systems, metric_result
from ryzen_compile.evaluation.token_decoders import TokenDecoder, batches_by_length, chunk_sizes, log_softmax, stream_logits
from ryzen_compile.runtime.generation.sampling import Sampler, SamplingParams

Array = np.ndarray[Any, Any]

METRIC_NAMES = ("generated-perplexity", "repetition", "stays", "rewrite-stays")
"""The measures, by name:

generated-perplexity  the perplexity of what a column wrote, to the baseline that keeps all
repetition            the share of runs of GRAM tokens that it had written before
stays                 for how many tokens it writes what the baseline writes, of those asked for
rewrite-stays         the same with torch with the same method
"""
NGRAM_SIZE = 8
"""Tokens."""


def measure_generation(
    systems: Systems, prompts: Sequence[Array], *, new_tokens: int, sampling: SamplingParams, chunk_size: int, seed: int
) -> list[MetricResult]:
    """Let each column continue each of `prompts`, (tokens,) ids, by `new` tokens, and measure NAMES.

    The n-th prompt draws from `seed + n` in every column, so that equal logits write equal texts. Prompts are fed `chunk`
    tokens a step. Intervals are bootstrapped over prompts.
    """
    written = {column: np.zeros((len(prompts), new_tokens), np.int64) for column in systems.by_name}
    loss = {column: np.zeros(len(prompts)) for column in systems.by_name}
    for items in batches_by_length([one.shape for one in prompts], systems.batch_size):
        begun, seeds = np.stack([prompts[item] for item in items]), [seed + item for item in items]
        for column, decoder in systems.by_name.items():
            more = written[column][items] = _generate(decoder, begun, new_tokens, sampling, chunk_size, seeds)
            loss[column][items] = _sequence_loss(systems.baseline, begun, more)
    rows = {
        "generated-perplexity": {
            column: bootstrap_ratio(one, np.full(len(one), new_tokens), seed=seed, transform=np.exp)
            for column, one in loss.items()
        },
        "repetition": {column: _mean([_repetition(text) for text in texts], seed) for column, texts in written.items()},
        "stays": {
            column: _mean(_matching_prefix(texts, written["baseline"]), seed)
            for column, texts in written.items()
            if column != "baseline"
        },
        "rewrite-stays": {"candidate": _mean(_matching_prefix(written["candidate"], written[systems.reference_name]), seed)},
    }
    return [metric_result(name, len(prompts), figures) for name, figures in rows.items()]


def _generate(
    decoder: TokenDecoder, prompts: Array, new_tokens: int, sampling: SamplingParams, chunk_size: int, seeds: Sequence[int]
) -> Array:
    """Return the next ids of `prompts` (rows, tokens), (rows, new)."""
    rows, length = prompts.shape
    sampler, slots = Sampler(sampling, rows), range(rows)
    for row in slots:
        sampler.start_sequence(row, prompts[row], seeds[row])
    decoder.reset()
    at, logits = 0, np.empty(0)
    for size in chunk_sizes(length, chunk_size):
        logits, at = decoder.step(prompts[:, at : at + size])[:, -1], at + size
    found = np.empty((rows, new_tokens), np.int64)
    for nth in range(new_tokens):
        found[:, nth] = sampler.next_tokens(slots, logits)
        if nth + 1 < new_tokens:
            logits = decoder.step(found[:, nth : nth + 1])[:, -1]
    return found


def _sequence_loss(decoder: TokenDecoder, prompts: Array, generated: Array) -> Array:
    """Return how surprising `written` (rows, tokens) is behind `prompts` to `judge`: a sum over tokens, (rows,) in nats."""
    ids = np.concatenate([prompts, generated], axis=1)
    first, loss = prompts.shape[1] - 1, np.zeros(len(ids))
    for at, (logits,) in stream_logits([decoder], ids[:, :-1], [1] * (ids.shape[1] - 1)):
        since = max(first - at, 0)
        targets = ids[:, at + 1 + since : at + 1 + logits.shape[1]]
        loss -= np.take_along_axis(log_softmax(logits[:, since:]), targets[..., None], axis=-1).sum(axis=(1, 2))
    return loss


def _repetition(ids: Array) -> float:
    """Return the share of the runs of GRAM tokens of `text` (tokens,) that stood in it before; 0 where it has none."""
    runs = [ids[at : at + NGRAM_SIZE].tobytes() for at in range(len(ids) - NGRAM_SIZE + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _matching_prefix(sequences: Array, references: Array) -> Array:
    """Return the share of each of `texts` (rows, tokens) that comes before it first differs from `others`, (rows,)."""
    same = np.cumprod(sequences == references, axis=1)
    return np.asarray(same.sum(axis=1) / sequences.shape[1])


def _mean(values: Any, seed: int) -> Any:
    shares = np.asarray(values, np.float64)
    return bootstrap_ratio(shares, np.ones(len(shares)), seed=seed)
