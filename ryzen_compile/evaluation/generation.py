"""Long generation: how a decoder goes on by itself, far beyond what its caches hold, where small damage adds up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import Finding
from ryzen_compile.evaluation.intervals import ratio
from ryzen_compile.evaluation.systems import Columns, finding
from ryzen_compile.evaluation.token_decoders import Decoder, chunks_of, groups, log_probabilities, side_by_side
from ryzen_compile.runtime.generation.sampling import Sampler, Sampling

Array = np.ndarray[Any, Any]

NAMES = ("generated-perplexity", "repetition", "stays", "rewrite-stays")
"""The measures, by name:

generated-perplexity  the perplexity of what a column wrote, to the baseline that keeps all
repetition            the share of runs of GRAM tokens that it had written before
stays                 for how many tokens it writes what the baseline writes, of those asked for
rewrite-stays         the same with torch with the same method
"""
GRAM = 8
"""Tokens."""


def go_on(columns: Columns, prompts: Sequence[Array], *, new: int, sampling: Sampling, chunk: int, seed: int) -> list[Finding]:
    """Let each column continue each of `prompts`, (tokens,) ids, by `new` tokens, and measure NAMES.

    The n-th prompt draws from `seed + n` in every column, so that equal logits write equal texts. Prompts are fed `chunk`
    tokens a step. Intervals are bootstrapped over prompts.
    """
    written = {column: np.zeros((len(prompts), new), np.int64) for column in columns.all}
    loss = {column: np.zeros(len(prompts)) for column in columns.all}
    for items in groups([one.shape for one in prompts], columns.rows):
        begun, seeds = np.stack([prompts[item] for item in items]), [seed + item for item in items]
        for column, decoder in columns.all.items():
            more = written[column][items] = _continue(decoder, begun, new, sampling, chunk, seeds)
            loss[column][items] = _loss(columns.baseline, begun, more)
    rows = {
        "generated-perplexity": {
            column: ratio(one, np.full(len(one), new), seed=seed, then=np.exp) for column, one in loss.items()
        },
        "repetition": {column: _mean([_repetition(text) for text in texts], seed) for column, texts in written.items()},
        "stays": {
            column: _mean(_stays(texts, written["baseline"]), seed) for column, texts in written.items() if column != "baseline"
        },
        "rewrite-stays": {"subject": _mean(_stays(written["subject"], written[columns.reference]), seed)},
    }
    return [finding(name, len(prompts), figures) for name, figures in rows.items()]


def _continue(decoder: Decoder, prompts: Array, new: int, sampling: Sampling, chunk: int, seeds: Sequence[int]) -> Array:
    """Return the next ids of `prompts` (rows, tokens), (rows, new)."""
    rows, length = prompts.shape
    sampler, slots = Sampler(sampling, rows), range(rows)
    for row in slots:
        sampler.begin(row, prompts[row], seeds[row])
    decoder.begin()
    at, logits = 0, np.empty(0)
    for size in chunks_of(length, chunk):
        logits, at = decoder.step(prompts[:, at : at + size])[:, -1], at + size
    found = np.empty((rows, new), np.int64)
    for nth in range(new):
        found[:, nth] = sampler.choose(slots, logits)
        if nth + 1 < new:
            logits = decoder.step(found[:, nth : nth + 1])[:, -1]
    return found


def _loss(judge: Decoder, prompts: Array, written: Array) -> Array:
    """Return how surprising `written` (rows, tokens) is behind `prompts` to `judge`: a sum over tokens, (rows,) in nats."""
    ids = np.concatenate([prompts, written], axis=1)
    first, loss = prompts.shape[1] - 1, np.zeros(len(ids))
    for at, (logits,) in side_by_side([judge], ids[:, :-1], [1] * (ids.shape[1] - 1)):
        since = max(first - at, 0)
        targets = ids[:, at + 1 + since : at + 1 + logits.shape[1]]
        loss -= np.take_along_axis(log_probabilities(logits[:, since:]), targets[..., None], axis=-1).sum(axis=(1, 2))
    return loss


def _repetition(text: Array) -> float:
    """Return the share of the runs of GRAM tokens of `text` (tokens,) that stood in it before; 0 where it has none."""
    runs = [text[at : at + GRAM].tobytes() for at in range(len(text) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _stays(texts: Array, others: Array) -> Array:
    """Return the share of each of `texts` (rows, tokens) that comes before it first differs from `others`, (rows,)."""
    same = np.cumprod(texts == others, axis=1)
    return np.asarray(same.sum(axis=1) / texts.shape[1])


def _mean(values: Any, seed: int) -> Any:
    shares = np.asarray(values, np.float64)
    return ratio(shares, np.ones(len(shares)), seed=seed)
