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

from ryzen_compile.artifacts.cache.checksummed_file import read_sealed, write_sealed
from ryzen_compile.artifacts.cache.key import Key
from ryzen_compile.errors import RyzenError, UsageError
from ryzen_compile.progress import Progress, Silent
from ryzen_compile.utils import file_lock
from ryzen_compile.utils.files import at_once, copy_hashed, link_hashed, shown
from ryzen_compile.utils.record import Record

LAYOUT = "v1"
"""Goes up when older versions of the tool could not read what newer ones write: they then live side by side."""

FOLDER_VARIABLE = "RYZEN_COMPILE_CACHE"
LIMIT_VARIABLE = "RYZEN_COMPILE_CACHE_GB"
LIMIT_BYTES = 20 * 10**9


class KeptFile(Record, frozen=True):
    """A file of an entry."""

    path: str
    """Relative to what was built, with `/`."""
    blake3: str
    sha256: str
    size_bytes: int


class Entry(Record, frozen=True):
    """What was built for one key."""

    key: str
    parts: dict[str, str]
    files: tuple[KeptFile, ...]
    payload: msgspec.Raw
    """JSON of the one who built it."""
    made_at: str
    """UTC, ISO 8601."""

    @property
    def size_bytes(self) -> int:
        """The size of its files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class Hit:
    """An entry that was found for a key."""

    key: Key
    files: tuple[KeptFile, ...]
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
        self.root = self.folder / LAYOUT
        self.progress = progress or Silent()
        self._told: set[str] = set()
        self.readable = self.writable = False
        self._prepare()

    def get(self, key: Key) -> Hit | None:
        """Return what was built for `key`, or None. A hit counts as a use."""
        entry = self.entry(key.digest)
        if entry is None or not self.is_whole(entry):
            return None
        with suppress(OSError):
            os.utime(self.entry_path(key.digest))
        return Hit(key, entry.files, bytes(entry.payload))

    def restore(self, hit: Hit, folder: Path, copied: Callable[[Path], object] | None = None) -> bool:
        """Copy the files of `hit` below `folder`, checking each byte on the way, and tell whether all were whole.

        `copied` is called with each file as soon as it is there, from several threads. Where one was not whole it is dropped,
        nothing is left below `folder`, and the caller builds. Raises OSError where `folder` cannot be written.
        """
        done: list[Path] = []

        def copy(file: KeptFile) -> bool:
            place = folder / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(place):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
            done.append(place)
            if copy_hashed(self.blob_path(file.blake3), place, "blake3") == file.blake3:
                if copied is not None:
                    copied(place)
                return True
            with suppress(OSError):
                os.unlink(self.blob_path(file.blake3))
            return False

        try:
            with self.sharing():
                whole = all(at_once(copy, sorted(hit.files, key=lambda file: -file.size_bytes)))
        except OSError as error:
            _remove(done)
            if not self._is_ours(error):
                raise
            if not isinstance(error, FileNotFoundError):  # that was let go of since `get`, as any other may be
                self._drop(hit.key.digest, error.strerror or str(error))
            return False
        except BaseException:
            _remove(done)
            raise
        if not whole:
            _remove(done)
            self._drop(hit.key.digest, "a file is damaged")
        return whole

    def put(self, key: Key, folder: Path, files: Mapping[str, str], payload: bytes) -> bool:
        """Keep the files below `folder`, by relative path and sha256, and a JSON `payload`; tell whether they are kept.

        They are finished: nobody writes to them any more. Files whose sha256 the store knows are not read. What cannot be kept
        is told, and nothing of it stays.
        """
        if not self.writable:
            return False
        try:
            size = sum((folder / path).stat().st_size for path in files)
            if size > self.limit_bytes:
                self._say(f"not kept in the cache: {size} bytes are more than its bound of {self.limit_bytes}")
                self._collect()
                return False
            with self.sharing():
                kept = at_once(lambda item: self._keep(folder, *item), files.items())
                entry = Entry(
                    key=key.digest,
                    parts=dict(key.parts),
                    files=tuple(kept),
                    payload=msgspec.Raw(payload),
                    made_at=datetime.now(UTC).isoformat(timespec="seconds"),
                )
                write_sealed(self.entry_path(key.digest), msgspec.json.encode(entry), parts=self.parts)
        except OSError as error:
            self._say(f"not kept in the cache: {shown(self.folder)}: {error.strerror}")
            self._collect()
            return False
        if self.size_bytes() > self.limit_bytes:
            self._collect()
        return True

    def keep(self, folder: Path, files: Mapping[str, str]) -> None:
        """Take files that a later `put` will name, by relative path and sha256, so that it need not; best effort.

        Until it does they belong to no build, and go when the store lets go of anything.
        """
        if not self.writable:
            return
        with suppress(OSError):
            if sum((folder / path).stat().st_size for path in files) > self.limit_bytes:
                return
            with self.sharing():
                at_once(lambda item: self._keep(folder, *item), files.items())
        if self.size_bytes() > self.limit_bytes:
            self._collect()

    @contextmanager
    def lock(self, key: Key) -> Iterator[None]:
        """Hold the right to build for `key`: who comes later waits, is told for whom, and then asks `get` again.

        A holder who dies gives it up. Where the folder knows no locks there is no waiting.
        """
        with ExitStack() as stack:
            if self.writable:
                try:
                    stack.enter_context(file_lock.hold(self.root / "locks" / key.digest, waiting=self._waiting))
                except OSError as error:
                    self._say(f"builders do not wait for each other: {shown(self.folder)}: {error.strerror}")
            yield

    def memo(self, kind: str, digest: str) -> str | None:
        """Return what was memoized under `kind` for the thing with this digest, or None."""
        path = self._memo_path(kind, digest)
        data = read_sealed(path) if self.readable else None
        if data is None:
            return None
        with suppress(OSError):
            os.utime(path)
        return data.decode("utf-8", "replace")

    def memoize(self, kind: str, digest: str, text: str) -> None:
        """Remember `text` under `kind` for the thing with this digest; best effort."""
        if self.writable:
            with suppress(OSError):
                write_sealed(self._memo_path(kind, digest), text.encode(), parts=self.parts)

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
    def parts(self) -> Path:
        """The folder of what is being written."""
        return self.root / "parts"

    def entry_path(self, digest: str) -> Path:
        """Return where the entry of a key lies."""
        return self.root / "entries" / digest

    def blob_path(self, digest: str) -> Path:
        """Return where the file with this BLAKE3 lies."""
        return self.root / "blobs" / digest[:2] / digest

    def entry(self, digest: str) -> Entry | None:
        """Return the entry of a key; None where there is none or where it is damaged."""
        data = read_sealed(self.entry_path(digest)) if self.readable else None
        if data is None:
            return None
        try:
            entry = msgspec.json.decode(data, type=Entry)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        return entry if entry.key == digest and all(map(_is_below, entry.files)) else None

    def is_whole(self, entry: Entry) -> bool:
        """Return whether all files of an entry are there, as large as they should be."""
        return all(map(self._holds, entry.files))

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Keep what the store holds from being collected during the block."""
        with ExitStack() as stack:
            # Who cannot lock a folder cannot collect it either, and whatever is gone is noticed.
            with suppress(OSError):
                stack.enter_context(file_lock.hold(self.root / "locks" / "gc", shared=True))
            yield

    def _keep(self, folder: Path, path: str, sha256: str) -> KeptFile:
        source = folder / path
        size = source.stat().st_size
        known = self.memo("blake3", sha256)
        if known is not None:
            file = KeptFile(path=path, blake3=known, sha256=sha256, size_bytes=size)
            if self._holds(file):
                return file
        part = self.parts / secrets.token_hex(16)
        try:
            digest = link_hashed(source, part, "blake3")
            blob = self.blob_path(digest)
            blob.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.replace(part, blob)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(part)
            raise
        self.memoize("blake3", sha256, digest)
        return KeptFile(path=path, blake3=digest, sha256=sha256, size_bytes=size)

    def _holds(self, file: KeptFile) -> bool:
        try:
            return self.blob_path(file.blake3).stat().st_size == file.size_bytes
        except OSError:
            return False

    def _is_ours(self, error: OSError) -> bool:
        """Whether it was the store that could not be read, and not a builder's folder that could not be written."""
        place = error.filename if isinstance(error.filename, (str, os.PathLike)) else None
        return error.errno == errno.EIO if place is None else Path(place).is_relative_to(self.root)

    def _drop(self, digest: str, why: str) -> None:
        self._say(f"the cache is damaged ({why}): the build is done again")
        with suppress(OSError):
            os.unlink(self.entry_path(digest))

    def _collect(self) -> None:
        """Let go of what is over the bound and of what belongs to no entry, unless somebody else uses the store just now."""
        from ryzen_compile.artifacts.cache.maintenance import collect

        with suppress(RyzenError):
            collect(self, wait=False)

    def _memo_path(self, kind: str, digest: str) -> Path:
        import blake3

        name = blake3.blake3(f"{kind}\0{digest}".encode()).hexdigest()
        return self.root / "memos" / name[:2] / name

    def _waiting(self, who: str) -> None:
        self.progress.say(f"waiting for {who}, which builds the same")

    def _say(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self.progress.say(line)

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in ("", "entries", "blobs", "memos", "locks", "parts"):
                (self.root / name).mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            self._say(f"nothing new is kept in the cache: {shown(self.folder)}: {error.strerror}")
        if not self.root.is_dir():
            return
        if (why := _distrust(self.folder)) is not None:
            self._say(f"the cache is not used: {shown(self.folder)} {why}")
            return
        self.readable = True
        self.writable = os.access(self.parts, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
        if not self.writable:
            self._say(f"nothing new is kept in the cache: {shown(self.folder)} cannot be written")


def default_folder() -> Path:
    """Return the folder that RYZEN_COMPILE_CACHE names, else the user's cache folder for this tool."""
    import platformdirs

    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else platformdirs.user_cache_path("ryzen-compile")


def default_limit_bytes() -> int:
    """Return the bound of RYZEN_COMPILE_CACHE_GB (10^9 bytes), else 20 GB; raises UsageError for what is not a size."""
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return LIMIT_BYTES
    try:
        size = int(float(text) * 10**9)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise UsageError(f"{LIMIT_VARIABLE} is `{text}`, not a number of gigabytes", hint=f"export {LIMIT_VARIABLE}=20")
    return size


def _distrust(folder: Path) -> str | None:
    """Return why what lies in `folder` may come from another user, or None: engines hold code that will run here."""
    if not hasattr(os, "geteuid"):
        return None
    found = folder.stat()
    if found.st_mode & 0o002:
        return "can be written by everybody; `chmod o-w` it"
    if os.geteuid() not in (0, found.st_uid) and found.st_uid != 0:
        return f"belongs to user {found.st_uid}, not to you"
    return None


def _is_below(file: KeptFile) -> bool:
    path = PurePosixPath(file.path)
    return not path.is_absolute() and ".." not in path.parts


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            os.unlink(path)
