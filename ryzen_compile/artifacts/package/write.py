"""Write a package: in a hidden folder beside its place, then swapped in whole."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import msgspec

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import File, Manifest
from ryzen_compile.artifacts.package.read import Package, identify, read_manifest, walk
from ryzen_compile.errors import PackageError
from ryzen_compile.utils import atomic_file, file_lock
from ryzen_compile.utils.files import at_once, hash_file, is_full, shown

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_ASIDE = "aside-"


class Staging:
    """A package in the making. Leaving the block without `commit` leaves nothing behind, whatever the reason.

    The hidden folder `.<name>.<random>.part` holds `package` (what is being made), `lock` (locked as long as its builder
    lives) and, for the moment of a swap without the kernel's help, `old`. The next builder of the same package removes the
    folders of those who were killed.

        with Staging("model.ryzen") as staging:
            write(staging.path("graphs/model.fp32.onnx"))
            staging.add("graphs/model.fp32.onnx")
            package = staging.commit(manifest)
    """

    def __init__(self, destination: str | os.PathLike[str]) -> None:
        # Where the destination is a link, what it points to is replaced, and the link stays.
        self.destination = Path(os.path.realpath(destination))
        self._files: dict[str, File] = {}
        self._syncing: list[Future[None]] = []

    def __enter__(self) -> Staging:
        with _told(self.destination):
            _check_replaceable(self.destination)
            self._parents = [parent for parent in self.destination.parents if not parent.exists()]
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            atomic_file.sweep(self.destination, self._discard)
            self._part, self._lock = _make_part(self.destination)
            self.folder.mkdir()
        self._disk = ThreadPoolExecutor(1)
        return self

    @property
    def folder(self) -> Path:
        """The folder that becomes the package."""
        return self._part / "package"

    def spare(self) -> None:
        """Let a package that lies at the destination stay: what is made goes beside it, as `<name>.rejected.ryzen`."""
        if os.path.lexists(self.destination) and walk(self.destination):
            self.destination = self.destination.with_name(f"{self.destination.stem}.rejected.ryzen")

    def path(self, relative: str) -> Path:
        """Return where to write the file `relative`; its folder is made. Raises PackageError for a path that may not be."""
        if (why := layout.path_problem(relative)) is not None:
            raise PackageError(f"{shown(relative)} {why}", hint="name it below the package's folder, with plain characters")
        place = self.folder / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    @contextmanager
    def aside(self) -> Iterator[Path]:
        """Offer an empty folder on the same filesystem that is not part of the package."""
        room = Path(tempfile.mkdtemp(dir=self._part, prefix=_ASIDE))
        try:
            yield room
        finally:
            shutil.rmtree(room, ignore_errors=True)

    def relative(self, text: str) -> str:
        """Return a message in which files of the package are named as they are in the package: the folder here is hidden."""
        return text.replace(f"{self.folder}{os.sep}", "")

    def finished(self, place: Path) -> None:
        """Let a file that nobody writes to any more go to disk in the background, before it is added; or is removed again."""
        # The kernel tells a failed write once: `commit` must hear of it here, as a second sync may not be told.
        self._syncing.append(self._disk.submit(_sync_if_there, place))

    def add(self, relative: str, *, sha256: str | None = None) -> File:
        """Record the file `relative` as it lies there now; it must not be written any more.

        Who knows its digest says so, and the file is not read again. It goes to disk while other files are still made.
        """
        place = self.path(relative)
        size = place.stat().st_size
        file = File(path=relative, sha256=sha256 or hash_file(place, "sha256"), size_bytes=size)
        self._files[relative] = file
        self._syncing.append(self._disk.submit(atomic_file.sync, place))
        return file

    @property
    def files(self) -> tuple[File, ...]:
        """What was added, by path."""
        return tuple(self._files[path] for path in sorted(self._files))

    def commit(self, manifest: Manifest) -> Package:
        """Put the package in its place: readers see the old one or the new one, whole.

        The manifest's `files` are filled in; what was written and not yet added is added. All is on disk before it is put
        in place. Raises PackageError.
        """
        with _told(self.destination):
            at_once(self.add, sorted(walk(self.folder) - set(self._files)))
            manifest = msgspec.structs.replace(manifest, files=self.files)
            data = layout.encode(manifest)
            (self.folder / layout.MANIFEST).write_bytes(data)
            for synced in self._syncing:
                synced.result()
            atomic_file.sync(self.folder / layout.MANIFEST)
            for parent, _, _ in os.walk(self.folder):
                atomic_file.sync(Path(parent))
            found = self.folder.stat()
            _check_replaceable(self.destination)
            swap(self.folder, self.destination, self._part / "old")
            atomic_file.sync(self.destination.parent)
        return Package(self.destination, manifest, (found.st_dev, found.st_ino))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._disk.shutdown(cancel_futures=True)
        remove_part(self._part)
        os.close(self._lock)
        for parent in self._parents:
            with suppress(OSError):
                os.rmdir(parent)
        if isinstance(error, OSError) and is_full(error):
            raise _no_room(self.destination, error) from error

    def _discard(self, part: Path) -> None:
        """Remove the folder of a dead builder; a living one holds its lock."""
        with suppress(OSError):
            try:
                lock = file_lock.attempt(part / "lock", create=False)
            except FileNotFoundError:
                os.rmdir(part)
                return
            if lock is None:
                return
            try:
                if (part / "old").exists() and not os.path.lexists(self.destination):
                    os.rename(part / "old", self.destination)
                remove_part(part)
            finally:
                os.close(lock)


def replace_manifest(package: Package, manifest: Manifest) -> Package:
    """Write a manifest that says more about the same files, as `verify` does, in one step.

    Raises PackageError where the files differ, or where the manifest was changed since `package` was read.
    """
    if manifest.files != package.manifest.files:
        raise PackageError("the files of a package never change: build another one")
    place = package.path / layout.MANIFEST
    with _told(package.path):
        if layout.decode(read_manifest(package.path), shown(place)) != package.manifest:
            raise PackageError(f"{shown(place)} was changed meanwhile", hint="run the command again")
        atomic_file.write_atomic(place, layout.encode(manifest))
    return Package(package.path, manifest, package.identity)


def swap(new: Path, destination: Path, aside: Path) -> None:
    """Put the folder `new` at `destination` and what was there away, in one step where the kernel can; raises OSError.

    Where it cannot, what was there is at `aside` for a moment in which there is nothing at `destination`.
    """
    while True:
        if not os.path.lexists(destination):
            try:
                os.rename(new, destination)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    continue  # another builder was faster: what it made is replaced
                raise
            return
        if not _exchange(new, destination):
            os.rename(destination, aside)
            try:
                os.rename(new, destination)
            except BaseException:
                os.rename(aside, destination)
                raise
        return


def remove_part(part: Path) -> None:
    """Remove a hidden folder, its lock last: until then whoever finds it can tell that it is dead."""
    for place in (part / "package", part / "old", *part.glob(f"{_ASIDE}*")):
        shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        os.unlink(part / "lock")
    with suppress(OSError):
        os.rmdir(part)


def _sync_if_there(place: Path) -> None:
    with suppress(FileNotFoundError):
        atomic_file.sync(place)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the kernel or the filesystem cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if not renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _make_part(destination: Path) -> tuple[Path, int]:
    while True:
        part = destination.parent / atomic_file.hidden_name(destination)
        part.mkdir()
        # Another builder may take it for a dead one's before it is locked: then it is gone, and another name is tried.
        with suppress(FileNotFoundError):
            lock = file_lock.attempt(part / "lock")
            if lock is not None:
                return part, lock


def _check_replaceable(destination: Path) -> None:
    """Refuse to replace what is not a package, or what holds more than a package."""
    while True:
        before = identify(destination)
        why = _irreplaceable(destination)
        # Another builder may put its package there just now: then what was looked at was partly the one, partly the other.
        if why is None or identify(destination) == before:
            break
    if why is not None:
        raise why


def _irreplaceable(destination: Path) -> PackageError | None:
    """Return why what lies at `destination` must stay, or None. Raises OSError."""
    try:
        os.lstat(destination)
    except FileNotFoundError:
        return None
    if not destination.is_dir():
        return PackageError(f"{shown(destination)} is there and is not a package", hint="give --output another name")
    names = walk(destination)
    if not names:
        return None
    try:
        ours = layout.listed(read_manifest(destination), layout.MANIFEST)
    except PackageError as error:
        return PackageError(
            f"{shown(destination)} is there and is not a package: {error.says}", hint="give --output another name, or remove it"
        )
    manifest = destination / layout.MANIFEST
    strange = {name for name in names - ours if name != layout.MANIFEST and not atomic_file.is_hidden(name, manifest)}
    if not strange:
        return None
    return PackageError(
        f"{shown(destination)} would be replaced, and with it {shown(min(strange))}, which is not part of the package",
        hint="move it elsewhere",
    )


@contextmanager
def _told(destination: Path) -> Iterator[None]:
    """Turn what the filesystem refuses into one sentence."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise _no_room(destination, error) from error
        place = shown(error.filename if isinstance(error.filename, (str, Path)) else destination)
        raise PackageError(f"{shown(destination)} cannot be written: {place}: {error.strerror}") from error


def _no_room(destination: Path, error: OSError) -> PackageError:
    return PackageError(
        f"{shown(destination)} was not written: {error.strerror}", hint=f"make room in {shown(destination.parent)}"
    )
