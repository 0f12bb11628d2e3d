"""Text: how well a decoder foretells documents that it is fed token by token, and how alike its logits are to others'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import Estimate, MetricResult
from ryzen_compile.evaluation.intervals import bootstrap_ratio
from ryzen_compile.evaluation.systems import Systems, metric_result
from ryzen_compile.evaluation.token_decoders import batches_by_length, chunk_sizes, log_softmax, stream_logits

Array = np.ndarray[Any, Any]

METRIC_NAMES = ("perplexity", "perplexity-ratio", "bits", "agreement", "kl", "rewrite-agreement", "rewrite-max-abs")
"""The measures, by name:

perplexity         e to the mean loss of a token, given those before it
perplexity-ratio   of that to the baseline's, on the same documents
bits               the mean loss in bits a token
agreement          the share of tokens for which the likeliest is the baseline's
kl                 the mean KL(baseline || column) of what comes next, in nats
rewrite-agreement  agreement with torch with the same method: what is missing of 1 is no cost of the method
rewrite-max-abs    the largest difference of a logit from that
"""


def measure_perplexity(systems: Systems, documents: Sequence[Array], *, chunk_size: int, seed: int) -> list[MetricResult]:
    """Feed each of `documents`, (tokens,) ids of at least 2, to every column, `chunk` tokens a step, and measure NAMES.

    Every token but the first counts. Intervals are bootstrapped over documents, all columns on the same ones.
    """
    tally = _LogitAccumulator(systems, len(documents))
    for items in batches_by_length([one.shape for one in documents], systems.batch_size):
        ids = np.stack([documents[item] for item in items])
        for at, logits in stream_logits([*systems.by_name.values()], ids[:, :-1], chunk_sizes(ids.shape[1] - 1, chunk_size)):
            tally.add(items, dict(zip(systems.by_name, logits, strict=True)), ids[:, at + 1 : at + 1 + logits[0].shape[1]])
    return tally.results(seed)


class _LogitAccumulator:
    """Sums over the tokens of each document, (documents,) float64 each, by measure and column."""

    def __init__(self, systems: Systems, documents: int) -> None:
        self.system_names, self.reference_name = [*systems.by_name], systems.reference_name
        self.token_counts, self.max_abs = np.zeros(documents), np.zeros(documents)
        self.loss, self.baseline_agreement, self.kl = (
            {name: np.zeros(documents) for name in self.system_names} for _ in range(3)
        )
        self.reference_agreement = np.zeros(documents)

    def add(self, items: list[int], logits: dict[str, Array], targets: Array) -> None:
        """Add a block: `logits` (rows, tokens, vocabulary) by column, of which `targets` (rows, tokens) came next."""
        self.token_counts[items] += targets.shape[1]
        logs = {name: log_softmax(one) for name, one in logits.items()}
        likely = np.exp(logs["baseline"])
        for name, one in logs.items():
            self.loss[name][items] -= np.take_along_axis(one, targets[..., None], axis=-1).sum(axis=(1, 2))
            self.baseline_agreement[name][items] += _count_argmax_matches(logits[name], logits["baseline"])
            self.kl[name][items] += (likely * np.where(likely > 0, logs["baseline"] - one, 0)).sum(axis=(1, 2))
        mine, theirs = logits["candidate"], logits[self.reference_name]
        self.reference_agreement[items] += _count_argmax_matches(mine, theirs)
        self.max_abs[items] = np.maximum(self.max_abs[items], np.abs(mine - theirs).max(axis=(1, 2)))

    def results(self, seed: int) -> list[MetricResult]:
        """Return a row a measure."""
        count, others = len(self.token_counts), self.system_names[1:]

        def row(name: str, figures: dict[str, Estimate]) -> MetricResult:
            return metric_result(name, count, figures)

        def mean(sums: dict[str, Array], names: list[str], **then: Any) -> dict[str, Estimate]:
            return {name: bootstrap_ratio(sums[name], self.token_counts, seed=seed, **then) for name in names}

        more = {name: self.loss[name] - self.loss["baseline"] for name in self.system_names}
        return [
            row("perplexity", mean(self.loss, self.system_names, then=np.exp)),
            row("perplexity-ratio", mean(more, others, then=np.exp)),
            row("bits", mean(self.loss, self.system_names, then=lambda loss: loss / np.log(2))),
            row("agreement", mean(self.baseline_agreement, others)),
            row("kl", mean(self.kl, others)),
            row("rewrite-agreement", {"candidate": bootstrap_ratio(self.reference_agreement, self.token_counts, seed=seed)}),
            row("rewrite-max-abs", {"candidate": Estimate(value=float(self.max_abs.max()))}),
        ]


def _count_argmax_matches(one: Array, other: Array) -> Array:
    """Return for how many tokens of each row, (rows,), the likeliest next token is the same in both."""
    return np.asarray((one.argmax(axis=-1) == other.argmax(axis=-1)).sum(axis=1))
