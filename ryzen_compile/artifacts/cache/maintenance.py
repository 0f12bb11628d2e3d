"""Looking after the cache: what is in it, why a build missed, and what to let go."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ryzen_compile.artifacts.cache.key import Difference, Key, differences
from ryzen_compile.artifacts.cache.store import Entry, Store
from ryzen_compile.errors import RyzenError
from ryzen_compile.utils import file_lock
from ryzen_compile.utils.files import shown
from ryzen_compile.utils.record import Record

MEMO_DAYS = 90
"""How long a memo lives that nobody asks for."""


class Listed(Record, frozen=True):
    """An entry of the cache."""

    key: str
    parts: dict[str, str]
    files: int
    size_bytes: int
    made_at: str
    used_at: float
    """Seconds since 1970."""


class Stats(Record, frozen=True):
    """The cache in numbers."""

    folder: str
    entries: int
    files: int
    size_bytes: int
    limit_bytes: int


class Collected(Record, frozen=True):
    """What was let go."""

    entries: int
    files: int
    size_bytes: int
    busy: bool = False
    """Whether nothing was done because another process uses the cache."""


class Explanation(Record, frozen=True):
    """Why a key hits or misses."""

    hit: bool
    key: str
    says: str
    nearest: str | None = None
    """The key of the entry that has most parts in common, the latest used of these."""
    differences: tuple[Difference, ...] = ()


def explain(store: Store, key: Key) -> Explanation:
    """Tell whether `key` is in the cache and, where it is not, in which parts it differs from the nearest that is."""
    found = list(_entries(store))
    if any(entry.key == key.digest and store.is_whole(entry) for _, entry in found):
        return Explanation(hit=True, key=key.digest, says="the same was built before")
    if not found:
        return Explanation(hit=False, key=key.digest, says="the cache is empty")
    _, nearest = min(found, key=lambda item: (len(differences(item[1].parts, key.parts)), -item[0]))
    differ = differences(nearest.parts, key.parts)
    names = ", ".join(f"`{difference.part}`" for difference in differ)
    return Explanation(
        hit=False, key=key.digest, says=f"the nearest earlier build differs in {names}", nearest=nearest.key, differences=differ
    )


def listing(store: Store) -> tuple[Listed, ...]:
    """Return the entries, the latest used first."""
    return tuple(
        Listed(
            key=entry.key,
            parts=entry.parts,
            files=len(entry.files),
            size_bytes=entry.size_bytes,
            made_at=entry.made_at,
            used_at=used,
        )
        for used, entry in sorted(_entries(store), key=lambda item: -item[0])
    )


def stats(store: Store) -> Stats:
    """Return the cache in numbers."""
    blobs = list(store.blobs())
    return Stats(
        folder=str(store.folder),
        entries=sum(1 for _ in _entries(store)),
        files=len(blobs),
        size_bytes=sum(size for _, size in blobs),
        limit_bytes=store.limit_bytes,
    )


def collect(store: Store, *, limit_bytes: int | None = None, wait: bool = True) -> Collected:
    """Let go of the entries that were not used for longest until the rest fits the bound, and of all that no entry names.

    What a living process is restoring or keeping is waited for; without `wait`, nothing is done while there is such a one.
    """
    limit = store.limit_bytes if limit_bytes is None else limit_bytes
    with _alone(store, wait=wait) as alone:
        if not alone:
            return Collected(entries=0, files=0, size_bytes=0, busy=True)
        kept, gone = _choose(store, limit)
        for digest in gone:
            _unlink(store.entry_path(digest))
        files = freed = 0
        for blob, size in list(store.blobs()):
            if blob.name not in kept:
                _unlink(blob)
                files, freed = files + 1, freed + size
        _tidy(store)
        return Collected(entries=len(gone), files=files, size_bytes=freed)


def clear(store: Store) -> Collected:
    """Let go of everything."""
    with _alone(store, wait=True):
        entries, blobs = len(_names(store.root / "entries")), list(store.blobs())
        for name in ("entries", "blobs", "memos"):
            shutil.rmtree(store.root / name, ignore_errors=True)
            (store.root / name).mkdir(exist_ok=True, mode=0o700)
        _tidy(store)
        return Collected(entries=entries, files=len(blobs), size_bytes=sum(size for _, size in blobs))


def _choose(store: Store, limit: int) -> tuple[set[str], list[str]]:
    """Return the blobs to keep and the entries to let go of."""
    names = set(_names(store.root / "entries"))
    kept: dict[str, int] = {}
    for _, entry in sorted(_entries(store), key=lambda item: -item[0]):
        with_it = kept | {file.blake3: file.size_bytes for file in entry.files}
        if sum(with_it.values()) > limit:
            break
        kept = with_it
        names.discard(entry.key)
    return set(kept), sorted(names)


def _tidy(store: Store) -> None:
    """Remove what nobody alive uses: half-written files, forgotten memos, locks that nobody holds."""
    for name in _names(store.parts):
        _unlink(store.parts / name)
    oldest = time.time() - MEMO_DAYS * 86400
    for parent, _, files in os.walk(store.root / "memos"):
        for name in files:
            with suppress(OSError):
                if os.stat(Path(parent) / name).st_mtime < oldest:
                    os.unlink(Path(parent) / name)
    for name in set(_names(store.root / "locks")) - {"gc"}:
        with suppress(OSError):
            lock = file_lock.attempt(store.root / "locks" / name, create=False)
            if lock is not None:
                _unlink(store.root / "locks" / name)
                os.close(lock)


@contextmanager
def _alone(store: Store, *, wait: bool) -> Iterator[bool]:
    path = store.root / "locks" / "gc"
    if not store.writable:
        raise RyzenError(f"the cache {shown(store.folder)} cannot be written", hint="name another with RYZEN_COMPILE_CACHE")
    with ExitStack() as stack:
        try:
            if wait:
                stack.enter_context(
                    file_lock.hold(path, waiting=lambda _: store.progress.say("waiting for who uses the cache"))
                )
            elif (lock := file_lock.attempt(path)) is not None:
                stack.callback(os.close, lock)
            else:
                yield False
                return
        except OSError as error:
            raise RyzenError(f"the cache {shown(store.folder)} cannot be locked: {error.strerror}") from error
        yield True


def _entries(store: Store) -> Iterator[tuple[float, Entry]]:
    """Go through the entries that can be read, each with when it was last used, in seconds since 1970."""
    for name in _names(store.root / "entries"):
        with suppress(OSError):
            used = store.entry_path(name).stat().st_mtime
            if (entry := store.entry(name)) is not None:
                yield used, entry


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _unlink(path: Path) -> None:
    with suppress(OSError):
        os.unlink(path)
