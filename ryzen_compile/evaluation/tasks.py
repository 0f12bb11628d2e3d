"""Tasks: whether a decoder goes on with the answer, by where in its context that is to be found."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import MetricResult
from ryzen_compile.evaluation.intervals import wilson_proportion
from ryzen_compile.evaluation.systems import Systems, metric_result
from ryzen_compile.evaluation.token_decoders import batches_by_length, chunk_sizes, stream_logits
from ryzen_compile.spec.recipe import Question

Array = np.ndarray[Any, Any]

DEPTH_BINS = 5
"""How many bins of equal width the depths 0..1 are put into."""
DISTANCE_BIN_EDGES = (0, 64, 256, 1024, 4096)
"""Where bins of distances begin, in tokens."""


def measure_task(systems: Systems, name: str, questions: Sequence[Question], *, chunk_size: int) -> list[MetricResult]:
    """Return the share of `questions` that each column answers right: in all, by depth and by distance, with Wilson intervals.

    Right is a greedy continuation that is the answer, id for id. It is read off the logits over prompt and answer: as long as
    it is right, what a greedy continuation feeds is the answer. Prompts are fed `chunk` tokens a step, answers one by one.
    """
    right = {column: np.zeros(len(questions), bool) for column in systems.by_name}
    for items in batches_by_length([(len(one.prompt), len(one.answer)) for one in questions], systems.batch_size):
        asked = [questions[item] for item in items]
        ids = np.stack([np.concatenate([one.prompt, one.answer]) for one in asked]).astype(np.int64)
        first = len(asked[0].prompt) - 1
        sizes = chunk_sizes(first + 1, chunk_size) + [1] * (len(asked[0].answer) - 1)
        wrong = {column: np.zeros(len(items), bool) for column in systems.by_name}
        for at, logits in stream_logits([*systems.by_name.values()], ids[:, :-1], sizes):
            since, until = max(first - at, 0), logits[0].shape[1]
            for column, one in zip(systems.by_name, logits, strict=True):
                chosen = one[:, since:].argmax(axis=-1)
                wrong[column] |= (chosen != ids[:, at + 1 + since : at + 1 + until]).any(axis=1)
        for column, missed in wrong.items():
            right[column][items] = ~missed
    return [_task_accuracy(name, right, np.ones(len(questions), bool), ""), *_by_context_position(name, questions, right)]


def _by_context_position(name: str, questions: Sequence[Question], correct: dict[str, Array]) -> list[MetricResult]:
    depths = np.array([one.depth for one in questions])
    distances = np.array([one.distance for one in questions])
    bins: list[tuple[str, Array]] = []
    for low, high in pairwise(np.linspace(0, 1, DEPTH_BINS + 1)):
        bins.append((f"depth {low:.1f} to {high:.1f}", (depths >= low) & ((depths < high) | (high == 1))))
    for near, far in pairwise((*DISTANCE_BIN_EDGES, np.inf)):
        words = f"distance {near} to {far}" if np.isfinite(far) else f"distance from {near}"
        bins.append((words, (distances >= near) & (distances < far)))
    return [_task_accuracy(name, correct, inside, part) for part, inside in bins if inside.any()]


def _task_accuracy(name: str, correct: dict[str, Array], selected: Array, group: str) -> MetricResult:
    return metric_result(
        name, int(selected.sum()), {column: wilson_proportion(one[selected]) for column, one in correct.items()}, group=group
    )
