"""The store: files of earlier builds by digest, and entries that say which of them belong to which key.

    <folder>/v1/entries/<key>           the parts of a key, its files and its payload, sealed; its mtime is its last use
               /blobs/ab/<blake3>       the files, each once
               /memos/ab/<blake3>       small facts that are costly to find out again, sealed
               /locks/<key>, /locks/gc  who builds what, and who reads or writes files of the store (shared)
               /parts/                  what is being written

A process may die at any instant: blobs come before the entry that names them, and both appear by renaming. Nothing is
waited for on disk, because nothing is believed: a restored blob is checked against its BLAKE3, and what does not match is
dropped and built again. That is why a blob may be a link to the file in the package that was built first: it takes no room,
and who writes into that package spoils one blob, which is noticed. What is restored is always a copy, so that no two
packages share a file. No failure of the cache fails a build; what went wrong is told once.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import msgspec

from ryzen_compile.artifacts.cache.checksummed_file import read_checksummed, write_checksummed
from ryzen_compile.artifacts.cache.key import CacheKey
from ryzen_compile.errors import RyzenError, UsageError
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.utils import file_lock
from ryzen_compile.utils.files import copy_hashed, link_hashed, parallel_map, quoted_path
from ryzen_compile.utils.record import Record

LAYOUT_VERSION = "v1"
"""Goes up when older versions of the tool could not read what newer ones write: they then live side by side."""

CACHE_DIR_ENV = "RYZEN_COMPILE_CACHE"
CACHE_LIMIT_ENV = "RYZEN_COMPILE_CACHE_GB"
DEFAULT_LIMIT_BYTES = 20 * 10**9


class CachedFile(Record, frozen=True):
    """A file of an entry."""

    path: str
    """Relative to what was built, with `/`."""
    blake3: str
    sha256: str
    size_bytes: int


class CacheEntry(Record, frozen=True):
    """What was built for one key."""

    key: str
    parts: dict[str, str]
    files: tuple[CachedFile, ...]
    payload: msgspec.Raw
    """JSON of the one who built it."""
    created_at: str
    """UTC, ISO 8601."""

    @property
    def size_bytes(self) -> int:
        """The size of its files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class CacheHit:
    """An entry that was found for a key."""

    key: CacheKey
    files: tuple[CachedFile, ...]
    payload: bytes
    """The JSON that was put."""


class Store:
    """A cache folder. Its methods may be called from several threads and processes at once."""

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, limit_bytes: int | None = None, progress: Progress | None = None
    ) -> None:
        """Use `folder`, else what RYZEN_COMPILE_CACHE names, else the user's cache folder, up to `limit_bytes`.

        A folder that cannot be used is told to `progress`, and the store then finds and keeps nothing.
        """
        self.folder = Path(folder) if folder is not None else default_folder()
        self.limit_bytes = limit_bytes if limit_bytes is not None else default_limit_bytes()
        self.root = self.folder / LAYOUT_VERSION
        self.progress = progress or SilentProgress()
        self._reported: set[str] = set()
        self.readable = self.writable = False
        self._prepare()

    def get(self, key: CacheKey) -> CacheHit | None:
        """Return what was built for `key`, or None. A hit counts as a use."""
        entry = self.entry(key.digest)
        if entry is None or not self.is_complete(entry):
            return None
        with suppress(OSError):
            os.utime(self.entry_path(key.digest))
        return CacheHit(key, entry.files, bytes(entry.payload))

    def restore(self, hit: CacheHit, folder: Path, on_copied: Callable[[Path], object] | None = None) -> bool:
        """Copy the files of `hit` below `folder`, checking each byte on the way, and tell whether all were whole.

        `copied` is called with each file as soon as it is there, from several threads. Where one was not whole it is dropped,
        nothing is left below `folder`, and the caller builds. Raises OSError where `folder` cannot be written.
        """
        done: list[Path] = []

        def copy(file: CachedFile) -> bool:
            place = folder / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(place):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
            done.append(place)
            if copy_hashed(self.blob_path(file.blake3), place, "blake3") == file.blake3:
                if on_copied is not None:
                    on_copied(place)
                return True
            with suppress(OSError):
                os.unlink(self.blob_path(file.blake3))
            return False

        try:
            with self.shared_lock():
                whole = all(parallel_map(copy, sorted(hit.files, key=lambda file: -file.size_bytes)))
        except OSError as error:
            _unlink_all(done)
            if not self._is_store_error(error):
                raise
            if not isinstance(error, FileNotFoundError):  # that was let go of since `get`, as any other may be
                self._remove_entry(hit.key.digest, error.strerror or str(error))
            return False
        except BaseException:
            _unlink_all(done)
            raise
        if not whole:
            _unlink_all(done)
            self._remove_entry(hit.key.digest, "a file is damaged")
        return whole

    def put(self, key: CacheKey, folder: Path, files: Mapping[str, str], payload: bytes) -> bool:
        """Keep the files below `folder`, by relative path and sha256, and a JSON `payload`; tell whether they are kept.

        They are finished: nobody writes to them any more. Files whose sha256 the store knows are not read. What cannot be kept
        is told, and nothing of it stays.
        """
        if not self.writable:
            return False
        try:
            size = sum((folder / path).stat().st_size for path in files)
            if size > self.limit_bytes:
                self._report_once(f"not kept in the cache: {size} bytes are more than its bound of {self.limit_bytes}")
                self._collect_garbage()
                return False
            with self.shared_lock():
                kept = parallel_map(lambda item: self._add_blob(folder, *item), files.items())
                entry = CacheEntry(
                    key=key.digest,
                    parts=dict(key.parts),
                    files=tuple(kept),
                    payload=msgspec.Raw(payload),
                    created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                )
                write_checksummed(self.entry_path(key.digest), msgspec.json.encode(entry), tmp_dir=self.tmp_dir)
        except OSError as error:
            self._report_once(f"not kept in the cache: {quoted_path(self.folder)}: {error.strerror}")
            self._collect_garbage()
            return False
        if self.size_bytes() > self.limit_bytes:
            self._collect_garbage()
        return True

    def add_blobs(self, folder: Path, files: Mapping[str, str]) -> None:
        """Take files that a later `put` will name, by relative path and sha256, so that it need not; best effort.

        Until it does they belong to no build, and go when the store lets go of anything.
        """
        if not self.writable:
            return
        with suppress(OSError):
            if sum((folder / path).stat().st_size for path in files) > self.limit_bytes:
                return
            with self.shared_lock():
                parallel_map(lambda item: self._add_blob(folder, *item), files.items())
        if self.size_bytes() > self.limit_bytes:
            self._collect_garbage()

    @contextmanager
    def lock(self, key: CacheKey) -> Iterator[None]:
        """Hold the right to build for `key`: who comes later waits, is told for whom, and then asks `get` again.

        A holder who dies gives it up. Where the folder knows no locks there is no waiting.
        """
        with ExitStack() as stack:
            if self.writable:
                try:
                    stack.enter_context(file_lock.acquire(self.root / "locks" / key.digest, on_wait=self._report_wait))
                except OSError as error:
                    self._report_once(f"builders do not wait for each other: {quoted_path(self.folder)}: {error.strerror}")
            yield

    def cached_result(self, kind: str, digest: str) -> str | None:
        """Return what was memoized under `kind` for the thing with this digest, or None."""
        path = self._result_path(kind, digest)
        data = read_checksummed(path) if self.readable else None
        if data is None:
            return None
        with suppress(OSError):
            os.utime(path)
        return data.decode("utf-8", "replace")

    def cache_result(self, kind: str, digest: str, text: str) -> None:
        """Remember `text` under `kind` for the thing with this digest; best effort."""
        if self.writable:
            with suppress(OSError):
                write_checksummed(self._result_path(kind, digest), text.encode(), tmp_dir=self.tmp_dir)

    def size_bytes(self) -> int:
        """Return the size of all files that are kept."""
        return sum(size for _, size in self.blobs())

    def blobs(self) -> Iterator[tuple[Path, int]]:
        """Go through the files that are kept, each with its size in bytes."""
        for parent, _, names in os.walk(self.root / "blobs"):
            for name in names:
                with suppress(FileNotFoundError):
                    yield Path(parent, name), Path(parent, name).stat().st_size

    @property
    def tmp_dir(self) -> Path:
        """The folder of what is being written."""
        return self.root / "parts"

    def entry_path(self, digest: str) -> Path:
        """Return where the entry of a key lies."""
        return self.root / "entries" / digest

    def blob_path(self, digest: str) -> Path:
        """Return where the file with this BLAKE3 lies."""
        return self.root / "blobs" / digest[:2] / digest

    def entry(self, digest: str) -> CacheEntry | None:
        """Return the entry of a key; None where there is none or where it is damaged."""
        data = read_checksummed(self.entry_path(digest)) if self.readable else None
        if data is None:
            return None
        try:
            entry = msgspec.json.decode(data, type=CacheEntry)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        return entry if entry.key == digest and all(map(_is_inside_folder, entry.files)) else None

    def is_complete(self, entry: CacheEntry) -> bool:
        """Return whether all files of an entry are there, as large as they should be."""
        return all(map(self._has_blob, entry.files))

    @contextmanager
    def shared_lock(self) -> Iterator[None]:
        """Keep what the store holds from being collected during the block."""
        with ExitStack() as stack:
            # Who cannot lock a folder cannot collect it either, and whatever is gone is noticed.
            with suppress(OSError):
                stack.enter_context(file_lock.acquire(self.root / "locks" / "gc", shared=True))
            yield

    def _add_blob(self, folder: Path, path: str, sha256: str) -> CachedFile:
        source = folder / path
        size = source.stat().st_size
        known = self.cached_result("blake3", sha256)
        if known is not None:
            file = CachedFile(path=path, blake3=known, sha256=sha256, size_bytes=size)
            if self._has_blob(file):
                return file
        part = self.tmp_dir / secrets.token_hex(16)
        try:
            digest = link_hashed(source, part, "blake3")
            blob = self.blob_path(digest)
            blob.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.replace(part, blob)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(part)
            raise
        self.cache_result("blake3", sha256, digest)
        return CachedFile(path=path, blake3=digest, sha256=sha256, size_bytes=size)

    def _has_blob(self, file: CachedFile) -> bool:
        try:
            return self.blob_path(file.blake3).stat().st_size == file.size_bytes
        except OSError:
            return False

    def _is_store_error(self, error: OSError) -> bool:
        """Whether it was the store that could not be read, and not a builder's folder that could not be written."""
        place = error.filename if isinstance(error.filename, (str, os.PathLike)) else None
        return error.errno == errno.EIO if place is None else Path(place).is_relative_to(self.root)

    def _remove_entry(self, digest: str, reason: str) -> None:
        self._report_once(f"the cache is damaged ({reason}): the build is done again")
        with suppress(OSError):
            os.unlink(self.entry_path(digest))

    def _collect_garbage(self) -> None:
        """Let go of what is over the bound and of what belongs to no entry, unless somebody else uses the store just now."""
        from ryzen_compile.artifacts.cache.maintenance import collect_garbage

        with suppress(RyzenError):
            collect_garbage(self, wait=False)

    def _result_path(self, kind: str, digest: str) -> Path:
        import blake3

        name = blake3.blake3(f"{kind}\0{digest}".encode()).hexdigest()
        return self.root / "memos" / name[:2] / name

    def _report_wait(self, holder: str) -> None:
        self.progress.message(f"waiting for {holder}, which builds the same")

    def _report_once(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            self.progress.message(message)

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in ("", "entries", "blobs", "memos", "locks", "parts"):
                (self.root / name).mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            self._report_once(f"nothing new is kept in the cache: {quoted_path(self.folder)}: {error.strerror}")
        if not self.root.is_dir():
            return
        if (why := _untrusted_reason(self.folder)) is not None:
            self._report_once(f"the cache is not used: {quoted_path(self.folder)} {why}")
            return
        self.readable = True
        self.writable = os.access(self.tmp_dir, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
        if not self.writable:
            self._report_once(f"nothing new is kept in the cache: {quoted_path(self.folder)} cannot be written")


def default_folder() -> Path:
    """Return the folder that RYZEN_COMPILE_CACHE names, else the user's cache folder for this tool."""
    import platformdirs

    named = os.environ.get(CACHE_DIR_ENV)
    return Path(named).expanduser() if named else platformdirs.user_cache_path("ryzen-compile")


def default_limit_bytes() -> int:
    """Return the bound of RYZEN_COMPILE_CACHE_GB (10^9 bytes), else 20 GB; raises UsageError for what is not a size."""
    text = os.environ.get(CACHE_LIMIT_ENV)
    if not text:
        return DEFAULT_LIMIT_BYTES
    try:
        size = int(float(text) * 10**9)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise UsageError(f"{CACHE_LIMIT_ENV} is `{text}`, not a number of gigabytes", hint=f"export {CACHE_LIMIT_ENV}=20")
    return size


def _untrusted_reason(folder: Path) -> str | None:
    """Return why what lies in `folder` may come from another user, or None: engines hold code that will run here."""
    if not hasattr(os, "geteuid"):
        return None
    found = folder.stat()
    if found.st_mode & 0o002:
        return "can be written by everybody; `chmod o-w` it"
    if os.geteuid() not in (0, found.st_uid) and found.st_uid != 0:
        return f"belongs to user {found.st_uid}, not to you"
    return None


def _is_inside_folder(file: CachedFile) -> bool:
    path = PurePosixPath(file.path)
    return not path.is_absolute() and ".." not in path.parts


def _unlink_all(paths: list[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            os.unlink(path)
