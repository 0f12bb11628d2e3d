"""Hostile values that all mutations share: numbers, names, JSON and bytes."""

from __future__ import annotations

import random
from typing import Any

INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    16,
    63,
    64,
    65,
    127,
    255,
    1000,
    2**15,
    2**31 - 1,
    2**31,
    -(2**31),
    2**40,
    2**62,
    2**63 - 1,
    -(2**63),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, -1e38, 1e308, float("inf"), float("-inf"), float("nan"))
NAMES = (
    "",
    "x",
    "y",
    "?",
    "a+b",
    "past+seq",
    "N",
    "-1",
    "a b",
    "../x",
    "/etc/passwd",
    "\x1b[2J",
    "a\nb",
    "é",
    "数据",
    "\u202e",
    "x" * 300,
    "x" * 20_000,
    "None",
    "`",
    "{}",
    "%s",
    "\x00",
    "🙂",
)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return `content` after one change: bits flipped, bytes inserted, removed, overwritten or repeated, or the end cut off."""
    data = bytearray(content)
    kind = rng.choice(("flip", "flip", "flip", "insert", "remove", "overwrite", "repeat", "truncate", "extend"))
    position = rng.randrange(len(data) + 1)
    length = rng.choice((1, 1, 2, 4, 8, 64))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 8))):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        data[position:position] = rng.randbytes(length)
    elif kind == "remove":
        del data[position : position + length]
    elif kind == "overwrite":
        data[position : position + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    elif kind == "repeat":
        data[position:position] = data[position : position + length * 8] * rng.choice((1, 2, 100))
    elif kind == "truncate":
        del data[position:]
    else:
        data += rng.randbytes(length)
    return bytes(data)


def hostile_json(rng: random.Random, depth: int = 0) -> Any:
    """Return a JSON value that a record rarely expects."""
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice(INTEGERS)
    if kind == 1:
        return rng.choice((10**40, -(10**40), 0.5, 1e308))
    if kind == 2:
        return rng.choice(NAMES)
    if kind == 3:
        return rng.choice((None, True, False))
    if kind == 4 and depth < 3:
        return [hostile_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5 and depth < 3:
        return {rng.choice(NAMES): hostile_json(rng, depth + 1) for _ in range(rng.randrange(3))}
    return rng.choice(([], {}, "", 0))


def mutate_json(document: Any, rng: random.Random) -> Any:
    """Return a JSON document with one value replaced, removed, repeated or exchanged."""
    places = list(_places(document))
    if not places:
        return hostile_json(rng)
    container, key = rng.choice(places)
    kind = rng.choice(("replace", "replace", "remove", "exchange", "add", "repeat"))
    if kind == "replace":
        container[key] = hostile_json(rng)
    elif kind == "remove":
        del container[key]
    elif kind == "exchange":
        other, other_key = rng.choice(places)
        container[key], other[other_key] = other[other_key], container[key]
    elif kind == "add" and isinstance(container, dict):
        container[rng.choice(NAMES)] = hostile_json(rng)
    elif isinstance(container, list):
        container.append(container[key])
    return document


def _places(document: Any) -> Any:
    """Yield the container and the key or index of every value."""
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in list(items):
        yield document, key
        yield from _places(value)
