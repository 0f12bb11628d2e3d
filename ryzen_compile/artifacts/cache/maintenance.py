"""Cache maintenance: listing, statistics, explanation of misses, and garbage collection."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.artifacts.cache.key import CacheKey, KeyDifference, key_differences
from ryzen_compile.artifacts.cache.scratch import remove_stale_scratch
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import RyzenError
from ryzen_compile.utils import file_lock
from ryzen_compile.utils.files import quoted_path
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.artifacts.cache.store import CacheEntry, Store

RESULT_MAX_AGE_DAYS = 90
"""The age in days since its last use at which a result without files is removed."""


class CacheEntryInfo(Record, frozen=True):
    """An entry of the cache."""

    key: str
    kind: str
    """The kind of job: `package`, `engine`, ..."""
    parts: dict[str, str]
    files: int
    """The number of files."""
    size_bytes: int
    created_at: str
    """UTC, ISO 8601."""
    last_used_at: float
    """Seconds since 1970."""


class CacheStats(Record, frozen=True):
    """The size of the cache."""

    folder: str
    entries: int
    files: int
    size_bytes: int
    limit_bytes: int


class GCResult(Record, frozen=True):
    """The number of removed entries and files, and their size."""

    entries: int
    files: int
    size_bytes: int
    busy: bool = False
    """Whether nothing was removed because another process uses the cache."""


class CacheExplanation(Record, frozen=True):
    """The reason for a cache hit or miss."""

    hit: bool
    key: str
    message: str
    nearest_key: str | None = None
    """The key of the entry with the fewest differences; among equals the most recently used."""
    differences: tuple[KeyDifference, ...] = ()


def explain_lookup(store: Store, key: CacheKey) -> CacheExplanation:
    """Return whether the cache has a complete entry for `key`; for a miss, the differences from the nearest of that kind."""
    entries = [(used, entry) for used, entry in _read_entries(store) if entry.kind == key.kind]
    if any(entry.key == key.digest and store.is_complete(entry) for _, entry in entries):
        return CacheExplanation(hit=True, key=key.digest, message="an identical build is cached")
    if not entries:
        return CacheExplanation(hit=False, key=key.digest, message=f"the cache has no {key.kind}")
    _, nearest = min(entries, key=lambda item: (len(key_differences(item[1].parts, key.parts)), -item[0]))
    differences = key_differences(nearest.parts, key.parts)
    names = ", ".join(f"`{difference.part}`" for difference in differences)
    return CacheExplanation(
        hit=False,
        key=key.digest,
        message=f"the nearest cached build differs in {names}",
        nearest_key=nearest.key,
        differences=differences,
    )


def list_entries(store: Store) -> tuple[CacheEntryInfo, ...]:
    """Return the entries, most recently used first."""
    return tuple(
        CacheEntryInfo(
            key=entry.key,
            kind=entry.kind,
            parts=entry.parts,
            files=len(entry.files),
            size_bytes=entry.size_bytes,
            created_at=entry.created_at,
            last_used_at=used,
        )
        for used, entry in sorted(_read_entries(store), key=lambda item: -item[0])
    )


def stats(store: Store) -> CacheStats:
    """Return the number of entries and files and the size of the cache."""
    blobs = list(store.blobs())
    return CacheStats(
        folder=str(store.folder),
        entries=sum(1 for _ in _read_entries(store)),
        files=len(blobs),
        size_bytes=sum(size for _, size in blobs),
        limit_bytes=store.limit_bytes,
    )


def collect_garbage(store: Store, *, limit_bytes: int | None = None, wait: bool = True) -> GCResult:
    """Remove the least recently used entries until the rest fits `limit_bytes`, then all files that no entry refers to.

    The default limit is that of the store. With `wait`, blocks while another process restores or stores files; without,
    returns a result with `busy` set in that case.

    Raises:
        RyzenError: The cache folder cannot be written or locked.
    """
    limit = store.limit_bytes if limit_bytes is None else limit_bytes
    with _exclusive_lock(store, wait=wait) as acquired:
        if not acquired:
            return GCResult(entries=0, files=0, size_bytes=0, busy=True)
        kept_blobs, evicted = _select_evictions(store, limit)
        for digest in evicted:
            _unlink_quietly(store.entry_path(digest))
        files = freed_bytes = 0
        for blob, size in list(store.blobs()):
            if blob.name not in kept_blobs:
                _unlink_quietly(blob)
                files, freed_bytes = files + 1, freed_bytes + size
        _remove_stale_files(store)
        return GCResult(entries=len(evicted), files=files, size_bytes=freed_bytes)


def clear(store: Store) -> GCResult:
    """Remove all entries, files and cached results; waits for other processes. Raises RyzenError as `collect_garbage` does."""
    with _exclusive_lock(store, wait=True):
        entries, blobs = len(_list_dir(store.root / "entries")), list(store.blobs())
        for name in ("entries", "blobs", "results"):
            shutil.rmtree(store.root / name, ignore_errors=True)
            (store.root / name).mkdir(exist_ok=True, mode=0o700)
        _remove_stale_files(store)
        return GCResult(entries=entries, files=len(blobs), size_bytes=sum(size for _, size in blobs))


def _select_evictions(store: Store, limit: int) -> tuple[set[str], list[str]]:
    """Return the digests of the blobs to keep and the keys of the entries to remove."""
    names = set(_list_dir(store.root / "entries"))
    kept: dict[str, int] = {}
    full = False
    for used, entry in sorted(_read_entries(store), key=lambda item: -item[0]):
        extended = kept | {file.blake3: file.size_bytes for file in entry.files}
        full = full or sum(extended.values()) > limit
        if (not full) if entry.files else (used >= _oldest_result()):
            kept = extended
            names.discard(entry.key)
    return set(kept), sorted(names)


def _remove_stale_files(store: Store) -> None:
    """Remove incomplete files, expired results, and scratch folders and lock files that no process holds."""
    remove_stale_scratch(store.folder)
    for name in _list_dir(store.tmp_dir):
        _unlink_quietly(store.tmp_dir / name)
    oldest = _oldest_result()
    for parent, _, files in os.walk(store.root / "results"):
        for name in files:
            with suppress(OSError):
                if os.stat(Path(parent) / name).st_mtime < oldest:
                    os.unlink(Path(parent) / name)
    for name in set(_list_dir(store.root / "locks")) - {"gc"}:
        with suppress(OSError):
            lock = file_lock.try_acquire(store.root / "locks" / name, create=False)
            if lock is not None:
                _unlink_quietly(store.root / "locks" / name)
                os.close(lock)


def _oldest_result() -> float:
    return time.time() - RESULT_MAX_AGE_DAYS * 86400


@contextmanager
def _exclusive_lock(store: Store, *, wait: bool) -> Iterator[bool]:
    path = store.root / "locks" / "gc"
    if not store.writable:
        raise RyzenError(
            f"the cache folder {quoted_path(store.folder)} cannot be written",
            hint="set RYZEN_COMPILE_CACHE to another folder",
        )
    with ExitStack() as stack:
        try:
            if wait:
                waiting = Diagnostic(
                    code="cache-wait", severity="info", message="waiting for another process that uses the cache"
                )
                stack.enter_context(file_lock.acquire(path, on_wait=lambda _: store.progress.report(waiting)))
            elif (lock := file_lock.try_acquire(path)) is not None:
                stack.callback(os.close, lock)
            else:
                yield False
                return
        except OSError as error:
            raise RyzenError(
                f"the cache folder {quoted_path(store.folder)} cannot be locked: {error.strerror}",
                hint="set RYZEN_COMPILE_CACHE to a folder on a filesystem that supports locks",
            ) from error
        yield True


def _read_entries(store: Store) -> Iterator[tuple[float, CacheEntry]]:
    """Yield the readable entries, each with the time of its last use in seconds since 1970."""
    for name in _list_dir(store.root / "entries"):
        with suppress(OSError):
            used = store.entry_path(name).stat().st_mtime
            if (entry := store.entry(name)) is not None:
                yield used, entry


def _list_dir(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _unlink_quietly(path: Path) -> None:
    with suppress(OSError):
        os.unlink(path)
