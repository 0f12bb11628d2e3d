"""Tasks: whether a decoder goes on with the answer, by where in its context that is to be found."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import Finding
from ryzen_compile.evaluation.intervals import share
from ryzen_compile.evaluation.systems import Columns, finding
from ryzen_compile.evaluation.token_decoders import chunks_of, groups, side_by_side
from ryzen_compile.spec.recipe import Question

Array = np.ndarray[Any, Any]

DEPTHS = 5
"""How many bins of equal width the depths 0..1 are put into."""
DISTANCES = (0, 64, 256, 1024, 4096)
"""Where bins of distances begin, in tokens."""


def ask(columns: Columns, name: str, questions: Sequence[Question], *, chunk: int) -> list[Finding]:
    """Return the share of `questions` that each column answers right: in all, by depth and by distance, with Wilson intervals.

    Right is a greedy continuation that is the answer, id for id. It is read off the logits over prompt and answer: as long as
    it is right, what a greedy continuation feeds is the answer. Prompts are fed `chunk` tokens a step, answers one by one.
    """
    right = {column: np.zeros(len(questions), bool) for column in columns.all}
    for items in groups([(len(one.prompt), len(one.answer)) for one in questions], columns.rows):
        asked = [questions[item] for item in items]
        ids = np.stack([np.concatenate([one.prompt, one.answer]) for one in asked]).astype(np.int64)
        first = len(asked[0].prompt) - 1
        sizes = chunks_of(first + 1, chunk) + [1] * (len(asked[0].answer) - 1)
        wrong = {column: np.zeros(len(items), bool) for column in columns.all}
        for at, logits in side_by_side([*columns.all.values()], ids[:, :-1], sizes):
            since, until = max(first - at, 0), logits[0].shape[1]
            for column, one in zip(columns.all, logits, strict=True):
                chosen = one[:, since:].argmax(axis=-1)
                wrong[column] |= (chosen != ids[:, at + 1 + since : at + 1 + until]).any(axis=1)
        for column, missed in wrong.items():
            right[column][items] = ~missed
    return [_share(name, right, np.ones(len(questions), bool), ""), *_by_place(name, questions, right)]


def _by_place(name: str, questions: Sequence[Question], right: dict[str, Array]) -> list[Finding]:
    depths = np.array([one.depth for one in questions])
    distances = np.array([one.distance for one in questions])
    bins: list[tuple[str, Array]] = []
    for low, high in pairwise(np.linspace(0, 1, DEPTHS + 1)):
        bins.append((f"depth {low:.1f} to {high:.1f}", (depths >= low) & ((depths < high) | (high == 1))))
    for near, far in pairwise((*DISTANCES, np.inf)):
        words = f"distance {near} to {far}" if np.isfinite(far) else f"distance from {near}"
        bins.append((words, (distances >= near) & (distances < far)))
    return [_share(name, right, inside, part) for part, inside in bins if inside.any()]


def _share(name: str, right: dict[str, Array], inside: Array, part: str) -> Finding:
    return finding(name, int(inside.sum()), {column: share(one[inside]) for column, one in right.items()}, part=part)
