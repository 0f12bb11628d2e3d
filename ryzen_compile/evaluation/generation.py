"""Long generation: free-running continuations far beyond the cache size, where small errors accumulate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import Estimate, MetricResult
from ryzen_compile.evaluation.intervals import bootstrap_ratio
from ryzen_compile.evaluation.systems import Systems, metric_result
from ryzen_compile.evaluation.token_decoders import TokenDecoder, batches_by_length, chunk_sizes, log_softmax, stream_logits
from ryzen_compile.progress import SilentStage, Stage
from ryzen_compile.runtime.generation.sampling import Sampler, SamplingParams

Array = np.ndarray[Any, Any]

METRIC_NAMES = ("generated-perplexity", "repetition", "matching-prefix", "rewrite-matching-prefix")
"""The metrics by name:

generated-perplexity     perplexity of the generated text under the baseline, which keeps all tokens
repetition               share of n-grams of NGRAM_SIZE tokens that occur earlier in the same continuation
matching-prefix          share of the continuation before it first differs from the baseline's
rewrite-matching-prefix  the same against the PyTorch reference with the same KV method
"""
NGRAM_SIZE = 8
"""In tokens."""


def count_steps(systems: Systems, prompts: Sequence[Array], *, new_tokens: int, chunk_size: int) -> int:
    """Return the number of steps of all systems that generate; the texts are scored in far fewer."""
    batches = batches_by_length([prompt.shape for prompt in prompts], systems.batch_size)
    steps = sum(len(chunk_sizes(len(prompts[items[0]]), chunk_size)) + new_tokens - 1 for items in batches)
    return steps * len(systems.by_name)


def measure_generation(
    systems: Systems,
    prompts: Sequence[Array],
    *,
    new_tokens: int,
    sampling: SamplingParams,
    chunk_size: int,
    seed: int,
    stage: Stage | None = None,
) -> list[MetricResult]:
    """Continue every prompt by `new_tokens` tokens with every system and compute METRIC_NAMES.

    `prompts` are token ids of shape (tokens,), fed in steps of `chunk_size` tokens. Prompt n is sampled with the seed
    `seed + n` in every system, so that equal logits generate equal texts. Intervals are bootstrapped over prompts. The items
    of `stage` are the steps of each system that generate.
    """
    generated = {system: np.zeros((len(prompts), new_tokens), np.int64) for system in systems.by_name}
    loss = {system: np.zeros(len(prompts)) for system in systems.by_name}
    for items in batches_by_length([prompt.shape for prompt in prompts], systems.batch_size):
        batch, seeds = np.stack([prompts[item] for item in items]), [seed + item for item in items]
        for system, decoder in systems.by_name.items():
            continuations = _generate(decoder, batch, new_tokens, sampling, chunk_size, seeds, stage or SilentStage())
            generated[system][items] = continuations
            loss[system][items] = _sequence_loss(systems.baseline, batch, continuations)
    token_counts = np.full(len(prompts), new_tokens)
    estimates = {
        "generated-perplexity": {
            system: bootstrap_ratio(values, token_counts, seed=seed, transform=np.exp) for system, values in loss.items()
        },
        "repetition": {system: _mean([_repetition(ids) for ids in rows], seed) for system, rows in generated.items()},
        "matching-prefix": {
            system: _mean(_matching_prefix(rows, generated["baseline"]), seed)
            for system, rows in generated.items()
            if system != "baseline"
        },
        "rewrite-matching-prefix": {
            "candidate": _mean(_matching_prefix(generated["candidate"], generated[systems.reference_name]), seed)
        },
    }
    return [metric_result(name, len(prompts), by_system) for name, by_system in estimates.items()]


def _generate(
    decoder: TokenDecoder,
    prompts: Array,
    new_tokens: int,
    sampling: SamplingParams,
    chunk_size: int,
    seeds: Sequence[int],
    stage: Stage,
) -> Array:
    """Return the continuations, (rows, new_tokens), of `prompts`, (rows, tokens)."""
    rows, length = prompts.shape
    sampler, slots = Sampler(sampling, rows), range(rows)
    for row in slots:
        sampler.start_sequence(row, prompts[row], seeds[row])
    decoder.reset()
    start, logits = 0, np.empty(0)
    for size in chunk_sizes(length, chunk_size):
        logits, start = decoder.step(prompts[:, start : start + size])[:, -1], start + size
        stage.advance()
    continuations = np.empty((rows, new_tokens), np.int64)
    for index in range(new_tokens):
        continuations[:, index] = sampler.next_tokens(slots, logits)
        if index + 1 < new_tokens:
            logits = decoder.step(continuations[:, index : index + 1])[:, -1]
            stage.advance()
    return continuations


def _sequence_loss(decoder: TokenDecoder, prompts: Array, generated: Array) -> Array:
    """Return the cross-entropy of `generated`, (rows, tokens), after `prompts` under `decoder`: (rows,), summed, in nats."""
    ids = np.concatenate([prompts, generated], axis=1)
    first, loss = prompts.shape[1] - 1, np.zeros(len(ids))
    for start, (logits,) in stream_logits([decoder], ids[:, :-1], [1] * (ids.shape[1] - 1)):
        begin = max(first - start, 0)
        targets = ids[:, start + 1 + begin : start + 1 + logits.shape[1]]
        loss -= np.take_along_axis(log_softmax(logits[:, begin:]), targets[..., None], axis=-1).sum(axis=(1, 2))
    return loss


def _repetition(ids: Array) -> float:
    """Return the share of n-grams of NGRAM_SIZE tokens of `ids`, (tokens,), that occur earlier in it; 0 without n-grams."""
    ngrams = [ids[start : start + NGRAM_SIZE].tobytes() for start in range(len(ids) - NGRAM_SIZE + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _matching_prefix(sequences: Array, references: Array) -> Array:
    """Return the share of each sequence before it first differs from its reference, (rows,); both are (rows, tokens)."""
    same = np.cumprod(sequences == references, axis=1)
    return np.asarray(same.sum(axis=1) / sequences.shape[1])


def _mean(values: Any, seed: int) -> Estimate:
    shares = np.asarray(values, np.float64)
    return bootstrap_ratio(shares, np.ones(len(shares)), seed=seed)
