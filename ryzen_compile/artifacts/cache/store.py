"""The cache store: files of earlier jobs by digest, and entries that map a key to a result and its files.

    <folder>/v2/entries/<key>           the parts of a key, its files and its payload, checksummed; the mtime is the last use
               /blobs/ab/<blake3>       the files, without duplicates
               /results/ab/<blake3>     small results of expensive computations, checksummed
               /locks/<key>, /locks/gc  exclusive lock of a build; lock of the store, shared by readers and writers of files
               /tmp/                    files that are being written

A process may die at any time: blobs are written before the entry that refers to them, and both are renamed into place. The
store does not call fsync, because stored data is not trusted: a restored blob is checked against its BLAKE3 digest, and a
damaged one is removed and built again. Blobs and restored files are copies, which share blocks on filesystems that support it,
so that a write to a file of a package changes no other file. With RYZEN_COMPILE_CACHE_LINKS=1 a blob is a hard link to the file
of the package that was built first: it takes no disk space, and a write to that file damages the blob, which is detected. A
failure of the cache never fails a build and is reported once.
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
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import RyzenError, UsageError
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.utils import file_lock
from ryzen_compile.utils.files import copy_hashed, link_hashed, parallel_map, quoted_path
from ryzen_compile.utils.record import Record

LAYOUT_VERSION = "v2"
"""Incremented when older versions cannot read the layout of newer ones; different layouts use separate folders."""

CACHE_DIR_ENV = "RYZEN_COMPILE_CACHE"
CACHE_LIMIT_ENV = "RYZEN_COMPILE_CACHE_GB"
CACHE_LINKS_ENV = "RYZEN_COMPILE_CACHE_LINKS"
"""`1`: stored files may be hard links to those of the package."""
DEFAULT_LIMIT_BYTES = 20 * 10**9


class CachedFile(Record, frozen=True):
    """A file of an entry."""

    name: str
    """The name of the file in the result: a relative path with `/` as separator."""
    blake3: str
    sha256: str
    size_bytes: int


class CacheEntry(Record, frozen=True):
    """The result of one key."""

    key: str
    kind: str
    parts: dict[str, str]
    files: tuple[CachedFile, ...]
    payload: msgspec.Raw
    """The result as JSON."""
    created_at: str
    """UTC, ISO 8601."""

    @property
    def size_bytes(self) -> int:
        """The total size of the files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class CacheHit:
    """An entry that was found for a key."""

    key: CacheKey
    files: tuple[CachedFile, ...]
    payload: bytes
    """The JSON that was passed to `Store.put`."""


class Store:
    """A cache folder. All methods are safe for concurrent use by several threads and processes."""

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, limit_bytes: int | None = None, progress: Progress | None = None
    ) -> None:
        """Open the store at `folder`, by default that of RYZEN_COMPILE_CACHE or the user's cache folder.

        `limit_bytes` bounds the size of the stored files; the default is that of RYZEN_COMPILE_CACHE_GB. If the folder cannot
        be used, the reason is reported to `progress`, and all lookups miss.
        """
        self.folder = Path(folder) if folder is not None else default_folder()
        self.limit_bytes = limit_bytes if limit_bytes is not None else default_limit_bytes()
        self.root = self.folder / LAYOUT_VERSION
        self.progress = progress or SilentProgress()
        self._reported: set[str] = set()
        self.readable = self.writable = False
        self._prepare()

    def get(self, key: CacheKey) -> CacheHit | None:
        """Return the cached result of `key`, or None. A hit updates the time of the last use."""
        entry = self.entry(key.digest)
        if entry is None or not self.is_complete(entry):
            return None
        with suppress(OSError):
            os.utime(self.entry_path(key.digest))
        return CacheHit(key, entry.files, bytes(entry.payload))

    def restore(
        self,
        hit: CacheHit,
        folder: Path,
        on_copied: Callable[[Path], object] | None = None,
        *,
        path_of: Callable[[str], str] = str,
    ) -> bool:
        """Copy the files of `hit` to `folder`, check their digests, and return whether all were intact.

        `path_of` returns the path in `folder` of a file by its name; by default the path is the name. `on_copied` is called
        with each file after it is copied, from several threads. If a file is damaged or missing, it is removed from the store,
        all copies are removed from `folder`, and the caller must build. Raises OSError if `folder` cannot be written or has one
        of the files.
        """
        restored: list[Path] = []

        def copy(file: CachedFile) -> bool:
            path = folder / path_of(file.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            restored.append(path)
            if copy_hashed(self.blob_path(file.blake3), path, "blake3") == file.blake3:
                if on_copied is not None:
                    on_copied(path)
                return True
            with suppress(OSError):
                os.unlink(self.blob_path(file.blake3))
            return False

        try:
            with self.shared_lock():
                complete = all(parallel_map(copy, sorted(hit.files, key=lambda file: -file.size_bytes)))
        except OSError as error:
            _unlink_all(restored)
            if not self._is_store_error(error):
                raise
            if not isinstance(error, FileNotFoundError):  # garbage collection may remove the blob after `get`
                self._remove_entry(hit.key.digest, error.strerror or str(error))
            return False
        except BaseException:
            _unlink_all(restored)
            raise
        if not complete:
            _unlink_all(restored)
            self._remove_entry(hit.key.digest, "a file is damaged")
        return complete

    def put(
        self,
        key: CacheKey,
        folder: Path,
        files: Mapping[str, str],
        payload: bytes,
        *,
        path_of: Callable[[str], str] = str,
    ) -> bool:
        """Store `files` of `folder`, name -> sha256, and a JSON `payload` under `key`; return whether they are stored.

        `path_of` returns the path in `folder` of a file by its name; by default the path is the name. The files must not be
        written any more. Files with a known sha256 are not read. A failure is reported to the store's progress, and nothing is
        stored.
        """
        if not self.writable:
            return False
        try:
            size = sum((folder / path_of(name)).stat().st_size for name in files)
            if size > self.limit_bytes:
                self._warn_once(
                    "cache-not-written", f"build not cached: {size} bytes exceed the cache limit of {self.limit_bytes} bytes"
                )
                self._collect_garbage()
                return False
            with self.shared_lock():
                cached_files = parallel_map(lambda item: self._add_blob(folder / path_of(item[0]), *item), files.items())
                entry = CacheEntry(
                    key=key.digest,
                    kind=key.kind,
                    parts=dict(key.parts),
                    files=tuple(cached_files),
                    payload=msgspec.Raw(payload),
                    created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                )
                write_checksummed(self.entry_path(key.digest), msgspec.json.encode(entry), tmp_dir=self.tmp_dir)
        except OSError as error:
            self._warn_once("cache-not-written", f"build not cached in {quoted_path(self.folder)}: {error.strerror}")
            self._collect_garbage()
            return False
        if self.size_bytes() > self.limit_bytes:
            self._collect_garbage()
        return True

    @contextmanager
    def lock(self, key: CacheKey) -> Iterator[None]:
        """Hold the exclusive build lock of `key` during the block; the caller must call `get` again after acquiring it.

        The process that holds the lock is reported to `progress` while waiting. A lock is released when its process dies. On a
        filesystem without locks there is no waiting.
        """
        with ExitStack() as stack:
            if self.writable:
                try:
                    stack.enter_context(file_lock.acquire(self.root / "locks" / key.digest, on_wait=self._report_wait))
                except OSError as error:
                    self._warn_once(
                        "cache-not-written",
                        f"concurrent builds of one key are not serialized: {quoted_path(self.folder)} cannot be locked: "
                        f"{error.strerror}",
                    )
            yield

    def cached_result(self, kind: str, digest: str) -> str | None:
        """Return the result of computation `kind` on the input with this digest, or None if it is not cached."""
        path = self._result_path(kind, digest)
        data = read_checksummed(path) if self.readable else None
        if data is None:
            return None
        with suppress(OSError):
            os.utime(path)
        return data.decode("utf-8", "replace")

    def cache_result(self, kind: str, digest: str, text: str) -> None:
        """Store `text` as the result of computation `kind` on the input with this digest; best effort."""
        if self.writable:
            with suppress(OSError):
                write_checksummed(self._result_path(kind, digest), text.encode(), tmp_dir=self.tmp_dir)

    def size_bytes(self) -> int:
        """Return the total size of all blobs."""
        return sum(size for _, size in self.blobs())

    def blobs(self) -> Iterator[tuple[Path, int]]:
        """Yield the path of each blob and its size in bytes."""
        for parent, _, names in os.walk(self.root / "blobs"):
            for name in names:
                with suppress(FileNotFoundError):
                    yield Path(parent, name), Path(parent, name).stat().st_size

    @property
    def tmp_dir(self) -> Path:
        """The folder of files that are being written."""
        return self.root / "tmp"

    def entry_path(self, digest: str) -> Path:
        """Return the path of the entry of a key digest."""
        return self.root / "entries" / digest

    def blob_path(self, digest: str) -> Path:
        """Return the path of the blob with this BLAKE3 digest."""
        return self.root / "blobs" / digest[:2] / digest

    def entry(self, digest: str) -> CacheEntry | None:
        """Return the entry of a key digest, or None if it is missing or damaged."""
        data = read_checksummed(self.entry_path(digest)) if self.readable else None
        if data is None:
            return None
        try:
            entry = msgspec.json.decode(data, type=CacheEntry)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        return entry if entry.key == digest and all(map(_is_inside_folder, entry.files)) else None

    def is_complete(self, entry: CacheEntry) -> bool:
        """Return whether all files of an entry exist with the right size."""
        return all(map(self._has_blob, entry.files))

    @contextmanager
    def shared_lock(self) -> Iterator[None]:
        """Prevent garbage collection during the block."""
        with ExitStack() as stack:
            # A process that cannot lock the folder cannot collect garbage either, and missing files are detected.
            with suppress(OSError):
                stack.enter_context(file_lock.acquire(self.root / "locks" / "gc", shared=True))
            yield

    def _add_blob(self, source: Path, name: str, sha256: str) -> CachedFile:
        size = source.stat().st_size
        cached_digest = self.cached_result("blake3", sha256)
        if cached_digest is not None:
            file = CachedFile(name=name, blake3=cached_digest, sha256=sha256, size_bytes=size)
            if self._has_blob(file):
                return file
        temporary_path = self.tmp_dir / secrets.token_hex(16)
        try:
            add = link_hashed if os.environ.get(CACHE_LINKS_ENV) == "1" else copy_hashed
            digest = add(source, temporary_path, "blake3")
            blob = self.blob_path(digest)
            blob.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.replace(temporary_path, blob)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary_path)
            raise
        self.cache_result("blake3", sha256, digest)
        return CachedFile(name=name, blake3=digest, sha256=sha256, size_bytes=size)

    def _has_blob(self, file: CachedFile) -> bool:
        try:
            return self.blob_path(file.blake3).stat().st_size == file.size_bytes
        except OSError:
            return False

    def _is_store_error(self, error: OSError) -> bool:
        """Tell whether `error` is a failure to read the store, not a failure to write the folder of a build."""
        path = error.filename if isinstance(error.filename, (str, os.PathLike)) else None
        return error.errno == errno.EIO if path is None else Path(path).is_relative_to(self.root)

    def _remove_entry(self, digest: str, reason: str) -> None:
        self._warn_once("cache-damaged", f"cache entry damaged ({reason}): building again")
        with suppress(OSError):
            os.unlink(self.entry_path(digest))

    def _collect_garbage(self) -> None:
        """Enforce the size limit and remove unreferenced files, unless another process uses the store."""
        from ryzen_compile.artifacts.cache.maintenance import collect_garbage

        with suppress(RyzenError):
            collect_garbage(self, wait=False)

    def _result_path(self, kind: str, digest: str) -> Path:
        import blake3

        name = blake3.blake3(f"{kind}\0{digest}".encode()).hexdigest()
        return self.root / "results" / name[:2] / name

    def _report_wait(self, holder: str) -> None:
        message = f"waiting for {holder}, which runs the same build"
        self.progress.report(Diagnostic(code="cache-wait", severity="info", message=message))

    def _warn_once(self, code: str, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            self.progress.report(Diagnostic(code=code, severity="warning", message=message))

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in ("", "entries", "blobs", "results", "locks", "tmp"):
                (self.root / name).mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            self._warn_once("cache-not-written", f"new builds are not cached: {quoted_path(self.folder)}: {error.strerror}")
        if not self.root.is_dir():
            return
        if (reason := _untrusted_reason(self.folder)) is not None:
            self._warn_once("cache-disabled", f"cache disabled: {quoted_path(self.folder)} {reason}")
            return
        self.readable = True
        self.writable = os.access(self.tmp_dir, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
        if not self.writable:
            self._warn_once("cache-not-written", f"new builds are not cached: {quoted_path(self.folder)} cannot be written")


def default_folder() -> Path:
    """Return the folder in RYZEN_COMPILE_CACHE, by default the user's cache folder for ryzen-compile."""
    import platformdirs

    configured = os.environ.get(CACHE_DIR_ENV)
    return Path(configured).expanduser() if configured else platformdirs.user_cache_path("ryzen-compile")


def default_limit_bytes() -> int:
    """Return the limit in RYZEN_COMPILE_CACHE_GB (in 10^9 bytes), by default 20 GB; raises UsageError for an invalid value."""
    text = os.environ.get(CACHE_LIMIT_ENV)
    if not text:
        return DEFAULT_LIMIT_BYTES
    try:
        size = int(float(text) * 10**9)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise UsageError(
            f"{CACHE_LIMIT_ENV} must be a number of gigabytes of at least 0 (got `{text}`)", hint=f"export {CACHE_LIMIT_ENV}=20"
        )
    return size


def _untrusted_reason(folder: Path) -> str | None:
    """Return why another user may have written files in `folder`, or None. Engines contain code that is executed."""
    if not hasattr(os, "geteuid"):
        return None
    status = folder.stat()
    if status.st_mode & 0o002:
        return "is writable by all users: run `chmod o-w` on it"
    if os.geteuid() not in (0, status.st_uid) and status.st_uid != 0:
        return f"is owned by user {status.st_uid}, not by the current user"
    return None


def _is_inside_folder(file: CachedFile) -> bool:
    path = PurePosixPath(file.name)
    return not path.is_absolute() and ".." not in path.parts


def _unlink_all(paths: list[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            os.unlink(path)
