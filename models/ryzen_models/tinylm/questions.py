"""Evaluation data for tinylm: held-out prose, and questions that require the context. Token ids are bytes."""

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
"""The end of Jane Austen's Persuasion, 1817: the first half is for calibration, the second half for evaluation."""
CONTEXT_BYTES = 1024
"""Length of a document, and of a question with its answer, in bytes."""
FACT_COUNT = 16
"""Number of facts in a question of `recall`."""
STRING_LENGTH, COPIED_LENGTH = 96, 32
"""Number of letters of the string in a question of `copy`, and the number of letters in its answer."""

_GOLDEN_RATIO_CONJUGATE = (5**0.5 - 1) / 2


@functools.cache
def prose(half: int) -> Array:
    """Return one half of the held-out text, (bytes,) uint8: the first (0) or the second (1)."""
    text = np.frombuffer(HELD_OUT_TEXT.read_bytes(), np.uint8)
    return text[: len(text) // 2] if half == 0 else text[len(text) // 2 :]


def evaluation_documents(seed: int) -> Iterator[Array]:
    """Yield random excerpts of the second half of the text, CONTEXT_BYTES bytes each, indefinitely."""
    rng = np.random.default_rng([1, seed])
    while True:
        yield _random_excerpt(rng, prose(1), CONTEXT_BYTES).astype(np.int64)


def calibration(seed: int) -> Iterator[Array]:
    """Yield documents in the form of the training data, CONTEXT_BYTES bytes each, indefinitely; prose is of the first half."""
    rng = np.random.default_rng([2, seed])
    while True:
        yield documents.training_document(rng, prose(0), CONTEXT_BYTES).text.astype(np.int64)


def needle(seed: int) -> Question:
    """Return prose with one fact and a question about it; depths are distributed evenly over consecutive seeds."""
    return _fact_question(np.random.default_rng([3, seed]), depth=(seed * _GOLDEN_RATIO_CONJUGATE) % 1, others=0)


def recall(seed: int) -> Question:
    """Return prose with FACT_COUNT facts and a question about one of them."""
    return _fact_question(np.random.default_rng([4, seed]), depth=(seed * _GOLDEN_RATIO_CONJUGATE) % 1, others=FACT_COUNT - 1)


def copy(seed: int) -> Question:
    """Return prose that ends with `<string|`; the answer is the start of the string."""
    rng = np.random.default_rng([5, seed])
    string = documents.random_letters(rng, STRING_LENGTH)
    before = _random_excerpt(rng, prose(1), CONTEXT_BYTES - STRING_LENGTH - COPIED_LENGTH - 2)
    prompt = np.concatenate([before, [ord("<")], string, [ord("|")]]).astype(np.int64)
    answer = string[:COPIED_LENGTH].astype(np.int64)
    return Question(prompt=prompt, answer=answer, depth=len(before) / len(prompt), distance=STRING_LENGTH + 1)


EVALUATION = EvaluationData(
    documents=evaluation_documents,
    calibration=calibration,
    tasks=(
        Task(name="needle", description="retrieve one fact in prose: {ky=word} ... {ky? asks for word", make_question=needle),
        Task(name="recall", description=f"retrieve one of {FACT_COUNT} facts in prose", make_question=recall),
        Task(
            name="copy", description=f"repeat the first {COPIED_LENGTH} of {STRING_LENGTH} random letters", make_question=copy
        ),
    ),
)


def _fact_question(rng: np.random.Generator, depth: float, others: int) -> Question:
    """Return prose with facts and a question about the fact at `depth`; the other facts are at random positions."""
    keys, values = (
        documents.random_keys(rng, others + 1),
        [documents.random_letters(rng, documents.VALUE) for _ in range(others + 1)],
    )
    question = documents.fact_text(keys[0], values[0], "?")[: -documents.VALUE - 1]
    text = _random_excerpt(rng, prose(1), CONTEXT_BYTES - documents.FACT_BYTES * (others + 1) - len(question) - documents.VALUE)
    positions = np.concatenate([[int(depth * len(text))], rng.integers(0, len(text) + 1, others)])
    parts, previous, answer_position = [], 0, 0
    for index in np.argsort(positions, kind="stable"):
        parts += [text[previous : positions[index]], documents.fact_text(keys[index], values[index])]
        previous = positions[index]
        answer_position = sum(map(len, parts)) if index == 0 else answer_position
    prompt = np.concatenate([*parts, text[previous:], question]).astype(np.int64)
    answer = values[0].astype(np.int64)
    return Question(
        prompt=prompt,
        answer=answer,
        depth=(answer_position - documents.FACT_BYTES) / len(prompt),
        distance=len(prompt) - answer_position,
    )


def _random_excerpt(rng: np.random.Generator, text: Array, length: int) -> Array:
    start = int(rng.integers(0, len(text) - length + 1))
    return text[start : start + length]
