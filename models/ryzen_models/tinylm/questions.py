"""What tinylm is evaluated on: prose it never saw, and questions that only the context can answer. Ids are bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ryzen_compile.spec.recipe import Evaluation, Question, Task
from ryzen_models.tinylm import documents

Array = np.ndarray[Any, Any]

HELD_OUT_TEXT = Path(__file__).with_name("persuasion.txt")
"""The end of Jane Austen's Persuasion, 1817: the first half to calibrate on, the second to evaluate on."""
CONTEXT = 1024
"""Bytes of a document, and of a question with its answer."""
FACTS = 16
"""How many facts `recall` states."""
STRING, COPIED = 96, 32
"""Letters of the string that `copy` repeats, and how many of them count."""

_GOLDEN = (5**0.5 - 1) / 2


@functools.cache
def prose(half: int) -> Array:
    """Return (bytes,) uint8: the first half of the held-out text, or with 1 the second."""
    whole = np.frombuffer(HELD_OUT_TEXT.read_bytes(), np.uint8)
    return whole[: len(whole) // 2] if half == 0 else whole[len(whole) // 2 :]


def streams(seed: int) -> Iterator[Array]:
    """Yield pieces of the second half, CONTEXT bytes each, without end."""
    chance = np.random.default_rng([1, seed])
    while True:
        yield _piece(chance, prose(1), CONTEXT).astype(np.int64)


def calibration(seed: int) -> Iterator[Array]:
    """Yield documents of CONTEXT bytes as it was trained on, with prose of the first half, without end."""
    chance = np.random.default_rng([2, seed])
    while True:
        yield documents.mixed(chance, prose(0), CONTEXT).text.astype(np.int64)


def needle(seed: int) -> Question:
    """Return prose in which one fact stands, at a depth that the seeds go through evenly, and the question about it."""
    return _asked(np.random.default_rng([3, seed]), depth=(seed * _GOLDEN) % 1, others=0)


def recall(seed: int) -> Question:
    """Return the same among FACTS facts."""
    return _asked(np.random.default_rng([4, seed]), depth=(seed * _GOLDEN) % 1, others=FACTS - 1)


def copy(seed: int) -> Question:
    """Return prose with `<string|` at its end: it goes on with the string."""
    chance = np.random.default_rng([5, seed])
    string = documents.letters(chance, STRING)
    before = _piece(chance, prose(1), CONTEXT - STRING - COPIED - 2)
    prompt = np.concatenate([before, [ord("<")], string, [ord("|")]]).astype(np.int64)
    answer = string[:COPIED].astype(np.int64)
    return Question(prompt=prompt, answer=answer, depth=len(before) / len(prompt), distance=STRING + 1)


EVALUATION = Evaluation(
    streams=streams,
    calibration=calibration,
    tasks=(
        Task(name="needle", says="one fact in prose: {ky=word} ... {ky? asks for word", make=needle),
        Task(name="recall", says=f"one of {FACTS} facts in prose", make=recall),
        Task(name="copy", says=f"the first {COPIED} of {STRING} random letters again", make=copy),
    ),
)


def _asked(chance: np.random.Generator, depth: float, others: int) -> Question:
    """Return prose with facts, of which the first, at `depth`, is asked for; the others are strewn at random."""
    names, values = documents.keys(chance, others + 1), [documents.letters(chance, documents.VALUE) for _ in range(others + 1)]
    question = documents.fact(names[0], values[0], "?")[: -documents.VALUE - 1]
    text = _piece(chance, prose(1), CONTEXT - documents.FACT * (others + 1) - len(question) - documents.VALUE)
    cuts = np.concatenate([[int(depth * len(text))], chance.integers(0, len(text) + 1, others)])
    parts, last, at = [], 0, 0
    for nth in np.argsort(cuts, kind="stable"):
        parts += [text[last : cuts[nth]], documents.fact(names[nth], values[nth])]
        last = cuts[nth]
        at = sum(map(len, parts)) if nth == 0 else at
    prompt = np.concatenate([*parts, text[last:], question]).astype(np.int64)
    answer = values[0].astype(np.int64)
    return Question(prompt=prompt, answer=answer, depth=(at - documents.FACT) / len(prompt), distance=len(prompt) - at)


def _piece(chance: np.random.Generator, text: Array, length: int) -> Array:
    start = int(chance.integers(0, len(text) - length + 1))
    return text[start : start + length]
