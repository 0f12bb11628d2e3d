"""Text: how well a decoder foretells documents that it is fed token by token, and how alike its logits are to others'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import Figure, Finding
from ryzen_compile.evaluation.intervals import ratio
from ryzen_compile.evaluation.systems import Columns, finding
from ryzen_compile.evaluation.token_decoders import chunks_of, groups, log_probabilities, side_by_side

Array = np.ndarray[Any, Any]

NAMES = ("perplexity", "perplexity-ratio", "bits", "agreement", "kl", "rewrite-agreement", "rewrite-max-abs")
"""The measures, by name:

perplexity         e to the mean loss of a token, given those before it
perplexity-ratio   of that to the baseline's, on the same documents
bits               the mean loss in bits a token
agreement          the share of tokens for which the likeliest is the baseline's
kl                 the mean KL(baseline || column) of what comes next, in nats
rewrite-agreement  agreement with torch with the same method: what is missing of 1 is no cost of the method
rewrite-max-abs    the largest difference of a logit from that
"""


def foretell(columns: Columns, documents: Sequence[Array], *, chunk: int, seed: int) -> list[Finding]:
    """Feed each of `documents`, (tokens,) ids of at least 2, to every column, `chunk` tokens a step, and measure NAMES.

    Every token but the first counts. Intervals are bootstrapped over documents, all columns on the same ones.
    """
    tally = _Tally(columns, len(documents))
    for items in groups([one.shape for one in documents], columns.rows):
        ids = np.stack([documents[item] for item in items])
        for at, logits in side_by_side([*columns.all.values()], ids[:, :-1], chunks_of(ids.shape[1] - 1, chunk)):
            tally.add(items, dict(zip(columns.all, logits, strict=True)), ids[:, at + 1 : at + 1 + logits[0].shape[1]])
    return tally.findings(seed)


class _Tally:
    """Sums over the tokens of each document, (documents,) float64 each, by measure and column."""

    def __init__(self, columns: Columns, documents: int) -> None:
        self.names, self.reference = [*columns.all], columns.reference
        self.tokens, self.farthest = np.zeros(documents), np.zeros(documents)
        self.loss, self.agreed, self.kl = ({name: np.zeros(documents) for name in self.names} for _ in range(3))
        self.alike = np.zeros(documents)

    def add(self, items: list[int], logits: dict[str, Array], targets: Array) -> None:
        """Add a block: `logits` (rows, tokens, vocabulary) by column, of which `targets` (rows, tokens) came next."""
        self.tokens[items] += targets.shape[1]
        logs = {name: log_probabilities(one) for name, one in logits.items()}
        likely = np.exp(logs["baseline"])
        for name, one in logs.items():
            self.loss[name][items] -= np.take_along_axis(one, targets[..., None], axis=-1).sum(axis=(1, 2))
            self.agreed[name][items] += _same_choice(logits[name], logits["baseline"])
            self.kl[name][items] += (likely * np.where(likely > 0, logs["baseline"] - one, 0)).sum(axis=(1, 2))
        mine, theirs = logits["subject"], logits[self.reference]
        self.alike[items] += _same_choice(mine, theirs)
        self.farthest[items] = np.maximum(self.farthest[items], np.abs(mine - theirs).max(axis=(1, 2)))

    def findings(self, seed: int) -> list[Finding]:
        """Return a row a measure."""
        count, others = len(self.tokens), self.names[1:]

        def row(name: str, figures: dict[str, Figure]) -> Finding:
            return finding(name, count, figures)

        def mean(sums: dict[str, Array], names: list[str], **then: Any) -> dict[str, Figure]:
            return {name: ratio(sums[name], self.tokens, seed=seed, **then) for name in names}

        more = {name: self.loss[name] - self.loss["baseline"] for name in self.names}
        return [
            row("perplexity", mean(self.loss, self.names, then=np.exp)),
            row("perplexity-ratio", mean(more, others, then=np.exp)),
            row("bits", mean(self.loss, self.names, then=lambda loss: loss / np.log(2))),
            row("agreement", mean(self.agreed, others)),
            row("kl", mean(self.kl, others)),
            row("rewrite-agreement", {"subject": ratio(self.alike, self.tokens, seed=seed)}),
            row("rewrite-max-abs", {"subject": Figure(value=float(self.farthest.max()))}),
        ]


def _same_choice(one: Array, other: Array) -> Array:
    """Return for how many tokens of each row, (rows,), the likeliest next token is the same in both."""
    return np.asarray((one.argmax(axis=-1) == other.argmax(axis=-1)).sum(axis=1))
