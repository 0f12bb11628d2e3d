"""Documents for tinylm: prose with facts stated in it, asked for later, and strings that come twice; bytes in, bytes out.

A fact is `{ky=word}`, a question and its answer `{ky?word}`: a key of two letters and a value of four, all random, so that the
answer can come from the context alone. A repeat is `<string|string>`. Prose holds none of `{}<>|`, so that no sentence can be
mistaken for either.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

KEY, VALUE = 2, 4
FACT_BYTES = KEY + VALUE + 3
"""Bytes of `{ky=word}`, and of `{ky?word}`."""

_LETTERS = np.arange(ord("a"), ord("z") + 1, dtype=np.uint8)


class Document(NamedTuple):
    """Bytes and how each is to be judged."""

    text: np.ndarray
    """(length,) uint8."""
    labels: np.ndarray
    """(length,) uint8: PROSE, RANDOM where nobody could tell the byte, ANSWER where the context tells it."""


PROSE, RANDOM, ANSWER = 0, 1, 2


def random_letters(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return (count,) random lower-case letters."""
    return rng.choice(_LETTERS, count)


def fact_text(key: np.ndarray, value: np.ndarray, mark: str = "=") -> np.ndarray:
    """Return `{ky=word}`, or `{ky?word}` with `mark` `?`."""
    return np.concatenate([[ord("{")], key, [ord(mark)], value, [ord("}")]]).astype(np.uint8)


def random_keys(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return (count, KEY) distinct keys."""
    picked = rng.choice(len(_LETTERS) ** KEY, count, replace=False)
    return np.stack([_LETTERS[picked // len(_LETTERS)], _LETTERS[picked % len(_LETTERS)]], axis=1)


def training_document(rng: np.random.Generator, prose: np.ndarray, length: int) -> Document:
    """Return a document of `length` bytes to learn from: prose with some facts, questions about them, and repeats."""
    most = max(2, length // (6 * FACT_BYTES))
    count = int(rng.integers(0, most + 1))
    names, values = random_keys(rng, max(count, 1)), [random_letters(rng, VALUE) for _ in range(max(count, 1))]
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    stated: list[int] = []
    waiting = list(range(count))
    for _ in range(count + int(rng.integers(count, 2 * count + 1)) if count else 0):
        if waiting and (not stated or rng.random() < 0.5):
            at = waiting.pop()
            stated.append(at)
            pieces.append(_label_bytes(fact_text(names[at], values[at]), answer=False))
        elif stated:
            at = int(rng.choice(stated))
            pieces.append(_label_bytes(fact_text(names[at], values[at], "?"), answer=True))
    if rng.random() < 0.3:
        pieces.insert(int(rng.integers(0, len(pieces) + 1)), repeated_string(rng, int(rng.integers(4, max(5, length // 6)))))
    return _insert_pieces(rng, prose, pieces, length)


def repeated_string(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `<string|string>` of `count` random letters, and how its bytes are judged."""
    string = random_letters(rng, count)
    text = np.concatenate([[ord("<")], string, [ord("|")], string, [ord(">")]]).astype(np.uint8)
    kind = np.full(len(text), RANDOM, np.uint8)
    kind[count + 2 :] = ANSWER
    kind[0] = PROSE
    return text, kind


def _label_bytes(text: np.ndarray, *, answer: bool) -> tuple[np.ndarray, np.ndarray]:
    kind = np.full(len(text), RANDOM, np.uint8)
    kind[-VALUE - 1 :] = ANSWER if answer else RANDOM
    kind[-1] = ANSWER
    return text, kind


def _insert_pieces(
    rng: np.random.Generator, prose: np.ndarray, pieces: list[tuple[np.ndarray, np.ndarray]], length: int
) -> Document:
    taken = sum(len(text) for text, _ in pieces)
    while taken > length:
        taken -= len(pieces.pop()[0])
    filler = length - taken
    start = int(rng.integers(0, len(prose) - filler))
    cuts = np.sort(rng.integers(0, filler + 1, len(pieces)))
    texts, kinds, last = [], [], 0
    for cut, (text, kind) in zip(cuts, pieces, strict=True):
        texts += [prose[start + last : start + cut], text]
        kinds += [np.zeros(cut - last, np.uint8), kind]
        last = cut
    texts.append(prose[start + last : start + filler])
    kinds.append(np.zeros(filler - last, np.uint8))
    return Document(np.concatenate(texts), np.concatenate(kinds))
