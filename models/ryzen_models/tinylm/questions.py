"""What tinylm is evaluated on: prose it never saw, and questions that only the context can answer. Ids are bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ryzen_compile.spec.recipe import EvaluationData, Question, Task
from ryzen_models.tinylm import documents

Array = np.ndarray[Any, Any]

HELD_OUT_TEXT = Path(__file__).with_name("persuasion.txt")
"""The end of Jane Austen's Persuasion, 1817: the first half to calibrate on, the second to evaluate on."""
CONTEXT_BYTES = 1024
"""Bytes of a document, and of a question with its answer."""
FACT_COUNT = 16
"""How many facts `recall` states."""
STRING_LENGTH, COPIED_LENGTH = 96, 32
"""Letters of the string that `copy` repeats, and how many of them count."""

_GOLDEN_RATIO_CONJUGATE = (5**0.5 - 1) / 2


@functools.cache
def prose(half: int) -> Array:
    """Return (bytes,) uint8: the first half of the held-out text, or with 1 the second."""
    whole = np.frombuffer(HELD_OUT_TEXT.read_bytes(), np.uint8)
    return whole[: len(whole) // 2] if half == 0 else whole[len(whole) // 2 :]


def streams(seed: int) -> Iterator[Array]:
    """Yield pieces of the second half, CONTEXT bytes each, without end."""
    chance = np.random.default_rng([1, seed])
    while True:
        yield _random_excerpt(chance, prose(1), CONTEXT_BYTES).astype(np.int64)


def calibration(seed: int) -> Iterator[Array]:
    """Yield documents of CONTEXT bytes as it was trained on, with prose of the first half, without end."""
    chance = np.random.default_rng([2, seed])
    while True:
        yield documents.training_document(chance, prose(0), CONTEXT_BYTES).text.astype(np.int64)


def needle(seed: int) -> Question:
    """Return prose in which one fact stands, at a depth that the seeds go through evenly, and the question about it."""
    return _fact_question(np.random.default_rng([3, seed]), depth=(seed * _GOLDEN_RATIO_CONJUGATE) % 1, others=0)


def recall(seed: int) -> Question:
    """Return the same among FACTS facts."""
    return _fact_question(np.random.default_rng([4, seed]), depth=(seed * _GOLDEN_RATIO_CONJUGATE) % 1, others=FACT_COUNT - 1)


def copy(seed: int) -> Question:
    """Return prose with `<string|` at its end: it goes on with the string."""
    chance = np.random.default_rng([5, seed])
    string = documents.random_letters(chance, STRING_LENGTH)
    before = _random_excerpt(chance, prose(1), CONTEXT_BYTES - STRING_LENGTH - COPIED_LENGTH - 2)
    prompt = np.concatenate([before, [ord("<")], string, [ord("|")]]).astype(np.int64)
    answer = string[:COPIED_LENGTH].astype(np.int64)
    return Question(prompt=prompt, answer=answer, depth=len(before) / len(prompt), distance=STRING_LENGTH + 1)


EVALUATION = EvaluationData(
    streams=streams,
    calibration=calibration,
    tasks=(
        Task(name="needle", description="one fact in prose: {ky=word} ... {ky? asks for word", make_question=needle),
        Task(name="recall", description=f"one of {FACT_COUNT} facts in prose", make_question=recall),
        Task(name="copy", description=f"the first {COPIED_LENGTH} of {STRING_LENGTH} random letters again", make_question=copy),
    ),
)


def _fact_question(rng: np.random.Generator, depth: float, others: int) -> Question:
    """Return prose with facts, of which the first, at `depth`, is asked for; the others are strewn at random."""
    names, values = (
        documents.random_keys(rng, others + 1),
        [documents.random_letters(rng, documents.VALUE) for _ in range(others + 1)],
    )
    question = documents.fact_text(names[0], values[0], "?")[: -documents.VALUE - 1]
    text = _random_excerpt(rng, prose(1), CONTEXT_BYTES - documents.FACT_BYTES * (others + 1) - len(question) - documents.VALUE)
    cuts = np.concatenate([[int(depth * len(text))], rng.integers(0, len(text) + 1, others)])
    parts, last, at = [], 0, 0
    for nth in np.argsort(cuts, kind="stable"):
        parts += [text[last : cuts[nth]], documents.fact_text(names[nth], values[nth])]
        last = cuts[nth]
        at = sum(map(len, parts)) if nth == 0 else at
    prompt = np.concatenate([*parts, text[last:], question]).astype(np.int64)
    answer = values[0].astype(np.int64)
    return Question(prompt=prompt, answer=answer, depth=(at - documents.FACT_BYTES) / len(prompt), distance=len(prompt) - at)


def _random_excerpt(rng: np.random.Generator, text: Array, length: int) -> Array:
    start = int(rng.integers(0, len(text) - length + 1))
    return text[start : start + length]
