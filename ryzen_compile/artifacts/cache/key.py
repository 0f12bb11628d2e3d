"""Keys: all that decides what is built, part by part, and one digest of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from ryzen_compile.utils.record import Record


@dataclass(frozen=True)
class CacheKey:
    """What decides a build: the name of each part and its value in text.

    `graph model` -> a fingerprint, `passes fp16` -> spelling and versions, `profiles`, `backend tensorrt-rtx`, `targets`, ...
    A part that does not change what is built does not belong here; one that does and is missing makes a wrong hit.
    """

    parts: Mapping[str, str]

    @functools.cached_property
    def digest(self) -> str:
        """BLAKE3 of the parts, in whatever order they were given; 64 hex digits."""
        import blake3

        return blake3.blake3(msgspec.json.encode(sorted(self.parts.items()))).hexdigest()


class KeyDifference(Record, frozen=True):
    """A part in which two keys differ."""

    part: str
    cached: str | None
    """Its value in what the cache has; None where that has no such part."""
    current: str | None
    """Its value now; None where it has gone."""

    def __str__(self) -> str:
        if self.cached is None:
            return f"{self.part}: is new: {self.current}"
        if self.current is None:
            return f"{self.part}: has gone: {self.cached}"
        return f"{self.part}: was {self.cached}, is {self.current}"


def key_differences(cached: Mapping[str, str], current: Mapping[str, str]) -> tuple[KeyDifference, ...]:
    """Return the parts in which two keys differ, in the order of `now`, then those that have gone."""
    names = [*current, *(name for name in cached if name not in current)]
    return tuple(
        KeyDifference(part=name, cached=cached.get(name), current=current.get(name))
        for name in names
        if cached.get(name) != current.get(name)
    )
