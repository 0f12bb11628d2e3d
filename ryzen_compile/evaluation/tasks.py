"""Task accuracy: whether a decoder answers questions correctly, by position of the evidence in the context."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ryzen_compile.artifacts.package.manifest import MetricResult
from ryzen_compile.evaluation.intervals import wilson_proportion
from ryzen_compile.evaluation.systems import Systems, metric_result
from ryzen_compile.evaluation.token_decoders import batches_by_length, chunk_sizes, stream_logits
from ryzen_compile.progress import Stage
from ryzen_compile.spec.recipe import Question

Array = np.ndarray[Any, Any]

DEPTH_BINS = 5
"""The number of equal bins of the relative depth, 0..1."""
DISTANCE_BIN_EDGES = (0, 64, 256, 1024, 4096)
"""The lower edges of the distance bins, in tokens."""


def count_steps(systems: Systems, questions: Sequence[Question], *, chunk_size: int) -> int:
    """Return the number of steps of all systems that `measure_task` runs."""
    batches = batches_by_length(_lengths(questions), systems.batch_size)
    return sum(len(_step_sizes(questions[items[0]], chunk_size)) for items in batches) * len(systems.by_name)


def measure_task(
    systems: Systems, name: str, questions: Sequence[Question], *, chunk_size: int, stage: Stage | None = None
) -> list[MetricResult]:
    """Return the share of `questions` that each system answers correctly: overall, by depth and by distance.

    An answer is correct if the greedy continuation equals it, id for id. It is determined from the logits over prompt and
    answer: as long as it is correct, the tokens of the answer are the ones that greedy generation would feed. Prompts are
    fed in steps of `chunk_size` tokens, answers one token at a time. Intervals are Wilson score intervals. The items of `stage`
    are the steps of each system.
    """
    correct = {system: np.zeros(len(questions), bool) for system in systems.by_name}
    for items in batches_by_length(_lengths(questions), systems.batch_size):
        batch = [questions[item] for item in items]
        ids = np.stack([np.concatenate([question.prompt, question.answer]) for question in batch]).astype(np.int64)
        first = len(batch[0].prompt) - 1
        step_sizes = _step_sizes(batch[0], chunk_size)
        wrong = {system: np.zeros(len(items), bool) for system in systems.by_name}
        for start, block_logits in stream_logits([*systems.by_name.values()], ids[:, :-1], step_sizes, stage):
            begin, end = max(first - start, 0), block_logits[0].shape[1]
            targets = ids[:, start + 1 + begin : start + 1 + end]
            for system, logits in zip(systems.by_name, block_logits, strict=True):
                wrong[system] |= (logits[:, begin:].argmax(axis=-1) != targets).any(axis=1)
        for system, mistakes in wrong.items():
            correct[system][items] = ~mistakes
    return [_task_accuracy(name, correct, np.ones(len(questions), bool), ""), *_by_context_position(name, questions, correct)]


def _lengths(questions: Sequence[Question]) -> list[tuple[int, int]]:
    return [(len(question.prompt), len(question.answer)) for question in questions]


def _step_sizes(question: Question, chunk_size: int) -> list[int]:
    """Return the sizes of the steps for prompt and answer; the last id of the answer is not fed."""
    return chunk_sizes(len(question.prompt), chunk_size) + [1] * (len(question.answer) - 1)


def _by_context_position(name: str, questions: Sequence[Question], correct: dict[str, Array]) -> list[MetricResult]:
    depths = np.array([question.depth for question in questions])
    distances = np.array([question.distance for question in questions])
    bins: list[tuple[str, Array]] = []
    for low, high in pairwise(np.linspace(0, 1, DEPTH_BINS + 1)):
        bins.append((f"depth {low:.1f} to {high:.1f}", (depths >= low) & ((depths < high) | (high == 1))))
    for low, high in pairwise((*DISTANCE_BIN_EDGES, np.inf)):
        label = f"distance {low} to {high}" if np.isfinite(high) else f"distance from {low}"
        bins.append((label, (distances >= low) & (distances < high)))
    return [_task_accuracy(name, correct, selected, group) for group, selected in bins if selected.any()]


def _task_accuracy(name: str, correct: dict[str, Array], selected: Array, group: str) -> MetricResult:
    return metric_result(
        name,
        int(selected.sum()),
        {system: wilson_proportion(values[selected]) for system, values in correct.items()},
        group=group,
    )
