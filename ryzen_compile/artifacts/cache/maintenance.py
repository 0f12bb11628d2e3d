"""Looking after the cache: what is in it, why a build missed, and what to let go."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ryzen_compile.artifacts.cache.key import CacheKey, KeyDifference, key_differences
from ryzen_compile.artifacts.cache.store import CacheEntry, Store
from ryzen_compile.errors import RyzenError
from ryzen_compile.utils import file_lock
from ryzen_compile.utils.files import quoted_path
from ryzen_compile.utils.record import Record

RESULT_MAX_AGE_DAYS = 90
"""How long a memo lives that nobody asks for."""


class CacheEntryInfo(Record, frozen=True):
    """An entry of the cache."""

    key: str
    parts: dict[str, str]
    files: int
    size_bytes: int
    created_at: str
    last_used_at: float
    """Seconds since 1970."""


class CacheStats(Record, frozen=True):
    """The cache in numbers."""

    folder: str
    entries: int
    files: int
    size_bytes: int
    limit_bytes: int


class GCResult(Record, frozen=True):
    """What was let go."""

    entries: int
    files: int
    size_bytes: int
    busy: bool = False
    """Whether nothing was done because another process uses the cache."""


class CacheExplanation(Record, frozen=True):
    """Why a key hits or misses."""

    hit: bool
    key: str
    message: str
    nearest_key: str | None = None
    """The key of the entry that has most parts in common, the latest used of these."""
    differences: tuple[KeyDifference, ...] = ()


def explain_lookup(store: Store, key: CacheKey) -> CacheExplanation:
    """Tell whether `key` is in the cache and, where it is not, in which parts it differs from the nearest that is."""
    found = list(_read_entries(store))
    if any(entry.key == key.digest and store.is_complete(entry) for _, entry in found):
        return CacheExplanation(hit=True, key=key.digest, message="the same was built before")
    if not found:
        return CacheExplanation(hit=False, key=key.digest, message="the cache is empty")
    _, nearest = min(found, key=lambda item: (len(key_differences(item[1].parts, key.parts)), -item[0]))
    differ = key_differences(nearest.parts, key.parts)
    names = ", ".join(f"`{difference.part}`" for difference in differ)
    return CacheExplanation(
        hit=False,
        key=key.digest,
        message=f"the nearest earlier build differs in {names}",
        nearest_key=nearest.key,
        differences=differ,
    )


def list_entries(store: Store) -> tuple[CacheEntryInfo, ...]:
    """Return the entries, the latest used first."""
    return tuple(
        CacheEntryInfo(
            key=entry.key,
            parts=entry.parts,
            files=len(entry.files),
            size_bytes=entry.size_bytes,
            created_at=entry.created_at,
            last_used_at=used,
        )
        for used, entry in sorted(_read_entries(store), key=lambda item: -item[0])
    )


def stats(store: Store) -> CacheStats:
    """Return the cache in numbers."""
    blobs = list(store.blobs())
    return CacheStats(
        folder=str(store.folder),
        entries=sum(1 for _ in _read_entries(store)),
        files=len(blobs),
        size_bytes=sum(size for _, size in blobs),
        limit_bytes=store.limit_bytes,
    )


def collect_garbage(store: Store, *, limit_bytes: int | None = None, wait: bool = True) -> GCResult:
    """Let go of the entries that were not used for longest until the rest fits the bound, and of all that no entry names.

    What a living process is restoring or keeping is waited for; without `wait`, nothing is done while there is such a one.
    """
    limit = store.limit_bytes if limit_bytes is None else limit_bytes
    with _exclusive_lock(store, wait=wait) as alone:
        if not alone:
            return GCResult(entries=0, files=0, size_bytes=0, busy=True)
        kept, gone = _select_evictions(store, limit)
        for digest in gone:
            _unlink_quietly(store.entry_path(digest))
        files = freed = 0
        for blob, size in list(store.blobs()):
            if blob.name not in kept:
                _unlink_quietly(blob)
                files, freed = files + 1, freed + size
        _remove_stale_files(store)
        return GCResult(entries=len(gone), files=files, size_bytes=freed)


def clear(store: Store) -> GCResult:
    """Let go of everything."""
    with _exclusive_lock(store, wait=True):
        entries, blobs = len(_list_dir(store.root / "entries")), list(store.blobs())
        for name in ("entries", "blobs", "memos"):
            shutil.rmtree(store.root / name, ignore_errors=True)
            (store.root / name).mkdir(exist_ok=True, mode=0o700)
        _remove_stale_files(store)
        return GCResult(entries=entries, files=len(blobs), size_bytes=sum(size for _, size in blobs))


def _select_evictions(store: Store, limit: int) -> tuple[set[str], list[str]]:
    """Return the blobs to keep and the entries to let go of."""
    names = set(_list_dir(store.root / "entries"))
    kept: dict[str, int] = {}
    for _, entry in sorted(_read_entries(store), key=lambda item: -item[0]):
        with_it = kept | {file.blake3: file.size_bytes for file in entry.files}
        if sum(with_it.values()) > limit:
            break
        kept = with_it
        names.discard(entry.key)
    return set(kept), sorted(names)


def _remove_stale_files(store: Store) -> None:
    """Remove what nobody alive uses: half-written files, forgotten memos, locks that nobody holds."""
    for name in _list_dir(store.tmp_dir):
        _unlink_quietly(store.tmp_dir / name)
    oldest = time.time() - RESULT_MAX_AGE_DAYS * 86400
    for parent, _, files in os.walk(store.root / "memos"):
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


@contextmanager
def _exclusive_lock(store: Store, *, wait: bool) -> Iterator[bool]:
    path = store.root / "locks" / "gc"
    if not store.writable:
        raise RyzenError(
            f"the cache {quoted_path(store.folder)} cannot be written", hint="name another with RYZEN_COMPILE_CACHE"
        )
    with ExitStack() as stack:
        try:
            if wait:
                stack.enter_context(
                    file_lock.acquire(path, on_wait=lambda _: store.progress.message("waiting for who uses the cache"))
                )
            elif (lock := file_lock.try_acquire(path)) is not None:
                stack.callback(os.close, lock)
            else:
                yield False
                return
        except OSError as error:
            raise RyzenError(f"the cache {quoted_path(store.folder)} cannot be locked: {error.strerror}") from error
        yield True


def _read_entries(store: Store) -> Iterator[tuple[float, CacheEntry]]:
    """Go through the entries that can be read, each with when it was last used, in seconds since 1970."""
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
