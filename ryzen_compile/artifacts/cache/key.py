"""Cache keys: everything that determines a result, by part, and one digest of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from ryzen_compile.utils.record import Record


@dataclass(frozen=True)
class CacheKey:
    """The kind of a result and the inputs that determine it: the name of each part and its value as text.

    `graphs.model.fingerprint` -> a digest, `graphs.model.passes.fold@onnxruntime` -> pipeline text,
    `code.packages.ryzen_passes` -> a digest, ... `jobs.job.JobKey` creates keys from typed records.
    """

    kind: str
    """The kind of job: `engine`."""
    parts: Mapping[str, str]

    @functools.cached_property
    def digest(self) -> str:
        """The BLAKE3 digest of the kind and the parts, independent of their order; 64 hex digits."""
        import blake3

        return blake3.blake3(msgspec.json.encode((self.kind, sorted(self.parts.items())))).hexdigest()


class KeyDifference(Record, frozen=True):
    """A part whose value differs between two keys."""

    part: str
    cached: str | None
    """The value in the cached key; None if that key does not have the part."""
    current: str | None
    """The value in the current key; None if that key does not have the part."""

    def __str__(self) -> str:
        if self.cached is None:
            return f"{self.part}: added: {self.current}"
        if self.current is None:
            return f"{self.part}: removed: {self.cached}"
        return f"{self.part}: changed from {self.cached} to {self.current}"


def key_differences(cached: Mapping[str, str], current: Mapping[str, str]) -> tuple[KeyDifference, ...]:
    """Return the parts whose values differ between two keys: those of `current` in order, then removed ones."""
    names = [*current, *(name for name in cached if name not in current)]
    return tuple(
        KeyDifference(part=name, cached=cached.get(name), current=current.get(name))
        for name in names
        if cached.get(name) != current.get(name)
    )
