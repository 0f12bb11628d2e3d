"""Training documents for tinylm: prose with inserted facts, questions about them, and repeated strings, all as bytes.

A fact is `{ky=word}`, a question with its answer `{ky?word}`: a key of two and a value of four random letters, so that the
answer can only come from the context. A repeat is `<string|string>`. Prose contains none of `{}<>|`, so that it cannot be
confused with facts or repeats.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

KEY, VALUE = 2, 4
FACT_BYTES = KEY + VALUE + 3
"""Length of `{ky=word}` and of `{ky?word}` in bytes."""

_LETTERS = np.arange(ord("a"), ord("z") + 1, dtype=np.uint8)


class Document(NamedTuple):
    """The bytes of a document, with a label for each byte."""

    text: np.ndarray
    """(length,) uint8."""
    labels: np.ndarray
    """(length,) uint8: PROSE, RANDOM for unpredictable bytes, ANSWER for bytes that follow from the context."""


PROSE, RANDOM, ANSWER = 0, 1, 2


def random_letters(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return random lower-case letters, (count,) uint8."""
    return rng.choice(_LETTERS, count)


def fact_text(key: np.ndarray, value: np.ndarray, mark: str = "=") -> np.ndarray:
    """Return the bytes of `{ky=word}`, or of `{ky?word}` if `mark` is `?`."""
    return np.concatenate([[ord("{")], key, [ord(mark)], value, [ord("}")]]).astype(np.uint8)


def random_keys(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return distinct random keys, (count, KEY) uint8."""
    indices = rng.choice(len(_LETTERS) ** KEY, count, replace=False)
    return np.stack([_LETTERS[indices // len(_LETTERS)], _LETTERS[indices % len(_LETTERS)]], axis=1)


def training_document(rng: np.random.Generator, prose: np.ndarray, length: int) -> Document:
    """Return a training document of `length` bytes: prose with facts, questions about them, and repeated strings."""
    max_facts = max(2, length // (6 * FACT_BYTES))
    count = int(rng.integers(0, max_facts + 1))
    keys, values = random_keys(rng, max(count, 1)), [random_letters(rng, VALUE) for _ in range(max(count, 1))]
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    stated: list[int] = []
    unstated = list(range(count))
    for _ in range(count + int(rng.integers(count, 2 * count + 1)) if count else 0):
        if unstated and (not stated or rng.random() < 0.5):
            index = unstated.pop()
            stated.append(index)
            pieces.append(_label_bytes(fact_text(keys[index], values[index]), answer=False))
        elif stated:
            index = int(rng.choice(stated))
            pieces.append(_label_bytes(fact_text(keys[index], values[index], "?"), answer=True))
    if rng.random() < 0.3:
        pieces.insert(int(rng.integers(0, len(pieces) + 1)), repeated_string(rng, int(rng.integers(4, max(5, length // 6)))))
    return _insert_pieces(rng, prose, pieces, length)


def repeated_string(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of `<string|string>` with `count` random letters, and their labels."""
    string = random_letters(rng, count)
    text = np.concatenate([[ord("<")], string, [ord("|")], string, [ord(">")]]).astype(np.uint8)
    labels = np.full(len(text), RANDOM, np.uint8)
    labels[count + 2 :] = ANSWER
    labels[0] = PROSE
    return text, labels


def _label_bytes(text: np.ndarray, *, answer: bool) -> tuple[np.ndarray, np.ndarray]:
    labels = np.full(len(text), RANDOM, np.uint8)
    labels[-VALUE - 1 :] = ANSWER if answer else RANDOM
    labels[-1] = ANSWER
    return text, labels


def _insert_pieces(
    rng: np.random.Generator, prose: np.ndarray, pieces: list[tuple[np.ndarray, np.ndarray]], length: int
) -> Document:
    inserted = sum(len(text) for text, _ in pieces)
    while inserted > length:
        inserted -= len(pieces.pop()[0])
    prose_length = length - inserted
    start = int(rng.integers(0, len(prose) - prose_length))
    cuts = np.sort(rng.integers(0, prose_length + 1, len(pieces)))
    texts, all_labels, previous = [], [], 0
    for cut, (text, labels) in zip(cuts, pieces, strict=True):
        texts += [prose[start + previous : start + cut], text]
        all_labels += [np.zeros(cut - previous, np.uint8), labels]
        previous = cut
    texts.append(prose[start + previous : start + prose_length])
    all_labels.append(np.zeros(prose_length - previous, np.uint8))
    return Document(np.concatenate(texts), np.concatenate(all_labels))
