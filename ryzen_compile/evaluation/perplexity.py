"""Perplexity of documents fed token by token, and the distance of a decoder's logits to those of the other systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import Estimate, MetricResult
from ryzen_compile.evaluation.intervals import bootstrap_ratio
from ryzen_compile.evaluation.systems import Systems, metric_result
from ryzen_compile.evaluation.token_decoders import batches_by_length, chunk_sizes, log_softmax, stream_logits
from ryzen_compile.progress import Stage

Array = np.ndarray[Any, Any]

METRIC_NAMES = ("perplexity", "perplexity-ratio", "bits", "agreement", "kl", "rewrite-agreement", "rewrite-max-abs")
"""The metrics by name:

perplexity         exp of the mean cross-entropy per token, given the tokens before it
perplexity-ratio   perplexity divided by the baseline's on the same documents
bits               mean cross-entropy in bits per token
agreement          share of tokens at which the most likely next token is the baseline's
kl                 mean KL(baseline || system) of the next-token distribution, in nats
rewrite-agreement  agreement with the PyTorch reference with the same KV method; below 1, the rewrite deviates
rewrite-max-abs    largest absolute difference of a logit from that reference
"""


def count_steps(systems: Systems, documents: Sequence[Array], *, chunk_size: int) -> int:
    """Return the number of steps of all systems that `measure_perplexity` runs."""
    batches = batches_by_length([document.shape for document in documents], systems.batch_size)
    steps = sum(len(chunk_sizes(len(documents[items[0]]) - 1, chunk_size)) for items in batches)
    return steps * len(systems.by_name)


def measure_perplexity(
    systems: Systems, documents: Sequence[Array], *, chunk_size: int, seed: int, stage: Stage | None = None
) -> list[MetricResult]:
    """Feed every document to every system in steps of `chunk_size` tokens and compute METRIC_NAMES.

    `documents` are token ids of shape (tokens,), at least 2 each; every token but the first is predicted. Intervals are
    bootstrapped over documents, with the same draws for all systems; `seed` is that of the draws. The items of `stage` are the
    steps of each system.
    """
    accumulator = _LogitAccumulator(systems, len(documents))
    for items in batches_by_length([document.shape for document in documents], systems.batch_size):
        ids = np.stack([documents[item] for item in items])
        step_sizes = chunk_sizes(ids.shape[1] - 1, chunk_size)
        for start, block_logits in stream_logits([*systems.by_name.values()], ids[:, :-1], step_sizes, stage):
            targets = ids[:, start + 1 : start + 1 + block_logits[0].shape[1]]
            accumulator.add(items, dict(zip(systems.by_name, block_logits, strict=True)), targets)
    return accumulator.results(seed)


class _LogitAccumulator:
    """Sums over the tokens of each document, (documents,) float64 each, by metric and system."""

    def __init__(self, systems: Systems, documents: int) -> None:
        self.system_names, self.reference_name = [*systems.by_name], systems.reference_name
        self.token_counts, self.max_abs = np.zeros(documents), np.zeros(documents)
        self.loss, self.baseline_agreement, self.kl = (
            {name: np.zeros(documents) for name in self.system_names} for _ in range(3)
        )
        self.reference_agreement = np.zeros(documents)

    def add(self, items: list[int], logits: dict[str, Array], targets: Array) -> None:
        """Add a block of the documents `items`.

        `logits` are (rows, tokens, vocabulary) by system, `targets` the ids that follow, (rows, tokens).
        """
        self.token_counts[items] += targets.shape[1]
        log_probabilities = {name: log_softmax(system_logits) for name, system_logits in logits.items()}
        baseline = log_probabilities["baseline"]
        probabilities = np.exp(baseline)
        for name, own in log_probabilities.items():
            self.loss[name][items] -= np.take_along_axis(own, targets[..., None], axis=-1).sum(axis=(1, 2))
            self.baseline_agreement[name][items] += _count_argmax_matches(logits[name], logits["baseline"])
            self.kl[name][items] += (probabilities * np.where(probabilities > 0, baseline - own, 0)).sum(axis=(1, 2))
        candidate, reference = logits["candidate"], logits[self.reference_name]
        self.reference_agreement[items] += _count_argmax_matches(candidate, reference)
        self.max_abs[items] = np.maximum(self.max_abs[items], np.abs(candidate - reference).max(axis=(1, 2)))

    def results(self, seed: int) -> list[MetricResult]:
        """Return the result of each metric."""
        count, other_names = len(self.token_counts), self.system_names[1:]

        def result(name: str, estimates: dict[str, Estimate]) -> MetricResult:
            return metric_result(name, count, estimates)

        def mean(sums: dict[str, Array], names: list[str], **options: Any) -> dict[str, Estimate]:
            return {name: bootstrap_ratio(sums[name], self.token_counts, seed=seed, **options) for name in names}

        extra_loss = {name: self.loss[name] - self.loss["baseline"] for name in self.system_names}
        return [
            result("perplexity", mean(self.loss, self.system_names, transform=np.exp)),
            result("perplexity-ratio", mean(extra_loss, other_names, transform=np.exp)),
            result("bits", mean(self.loss, self.system_names, transform=lambda loss: loss / np.log(2))),
            result("agreement", mean(self.baseline_agreement, other_names)),
            result("kl", mean(self.kl, other_names)),
            result("rewrite-agreement", {"candidate": bootstrap_ratio(self.reference_agreement, self.token_counts, seed=seed)}),
            result("rewrite-max-abs", {"candidate": Estimate(value=float(self.max_abs.max()))}),
        ]


def _count_argmax_matches(logits: Array, other: Array) -> Array:
    """Return the number of tokens in each row, (rows,), with the same argmax in both (rows, tokens, vocabulary) arrays."""
    return np.asarray((logits.argmax(axis=-1) == other.argmax(axis=-1)).sum(axis=1))
