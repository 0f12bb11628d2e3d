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
from ryzen_compile.artifacts.package.manifest import FileRecord, Manifest
from ryzen_compile.artifacts.package.read import Package, inode_id, list_files, read_manifest
from ryzen_compile.errors import PackageError
from ryzen_compile.utils import atomic_file, file_lock
from ryzen_compile.utils.files import hash_file, is_disk_full, parallel_map, quoted_path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SCRATCH_PREFIX = "aside-"


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
        self._files: dict[str, FileRecord] = {}
        self._pending_syncs: list[Future[None]] = []

    def __enter__(self) -> Staging:
        with _convert_os_errors(self.destination):
            _check_replaceable(self.destination)
            self._created_parents = [parent for parent in self.destination.parents if not parent.exists()]
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            atomic_file.remove_stale(self.destination, self._remove_if_dead)
            self._staging_dir, self._lock = _create_staging_dir(self.destination)
            self.folder.mkdir()
        self._sync_executor = ThreadPoolExecutor(1)
        return self

    @property
    def folder(self) -> Path:
        """The folder that becomes the package."""
        return self._staging_dir / "package"

    def divert_to_rejected(self) -> None:
        """Let a package that lies at the destination stay: what is made goes beside it, as `<name>.rejected.ryzen`."""
        if os.path.lexists(self.destination) and list_files(self.destination):
            self.destination = self.destination.with_name(f"{self.destination.stem}.rejected.ryzen")

    def path(self, relative: str) -> Path:
        """Return where to write the file `relative`; its folder is made. Raises PackageError for a path that may not be."""
        if (why := layout.invalid_path_reason(relative)) is not None:
            raise PackageError(
                f"{quoted_path(relative)} {why}", hint="name it below the package's folder, with plain characters"
            )
        place = self.folder / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    @contextmanager
    def scratch_dir(self) -> Iterator[Path]:
        """Offer an empty folder on the same filesystem that is not part of the package."""
        room = Path(tempfile.mkdtemp(dir=self._staging_dir, prefix=_SCRATCH_PREFIX))
        try:
            yield room
        finally:
            shutil.rmtree(room, ignore_errors=True)

    def strip_staging_prefix(self, text: str) -> str:
        """Return a message in which files of the package are named as they are in the package: the folder here is hidden."""
        return text.replace(f"{self.folder}{os.sep}", "")

    def fsync_async(self, path: Path) -> None:
        """Let a file that nobody writes to any more go to disk in the background, before it is added; or is removed again."""
        # The kernel tells a failed write once: `commit` must hear of it here, as a second sync may not be told.
        self._pending_syncs.append(self._sync_executor.submit(_sync_if_exists, path))

    def add(self, relative: str, *, sha256: str | None = None) -> FileRecord:
        """Record the file `relative` as it lies there now; it must not be written any more.

        Who knows its digest says so, and the file is not read again. It goes to disk while other files are still made.
        """
        place = self.path(relative)
        size = place.stat().st_size
        file = FileRecord(path=relative, sha256=sha256 or hash_file(place, "sha256"), size_bytes=size)
        self._files[relative] = file
        self._pending_syncs.append(self._sync_executor.submit(atomic_file.fsync, place))
        return file

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """What was added, by path."""
        return tuple(self._files[path] for path in sorted(self._files))

    def commit(self, manifest: Manifest) -> Package:
        """Put the package in its place: readers see the old one or the new one, whole.

        The manifest's `files` are filled in; what was written and not yet added is added. All is on disk before it is put
        in place. Raises PackageError.
        """
        with _convert_os_errors(self.destination):
            parallel_map(self.add, sorted(list_files(self.folder) - set(self._files)))
            manifest = msgspec.structs.replace(manifest, files=self.files)
            data = layout.encode(manifest)
            (self.folder / layout.MANIFEST_NAME).write_bytes(data)
            for synced in self._pending_syncs:
                synced.result()
            atomic_file.fsync(self.folder / layout.MANIFEST_NAME)
            for parent, _, _ in os.walk(self.folder):
                atomic_file.fsync(Path(parent))
            found = self.folder.stat()
            _check_replaceable(self.destination)
            swap(self.folder, self.destination, self._staging_dir / "old")
            atomic_file.fsync(self.destination.parent)
        return Package(self.destination, manifest, (found.st_dev, found.st_ino))

    def __exit__(self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sync_executor.shutdown(cancel_futures=True)
        remove_staging_dir(self._staging_dir)
        os.close(self._lock)
        for parent in self._created_parents:
            with suppress(OSError):
                os.rmdir(parent)
        if isinstance(error, OSError) and is_disk_full(error):
            raise _disk_full_error(self.destination, error) from error

    def _remove_if_dead(self, staging_dir: Path) -> None:
        """Remove the folder of a dead builder; a living one holds its lock."""
        with suppress(OSError):
            try:
                lock = file_lock.try_acquire(staging_dir / "lock", create=False)
            except FileNotFoundError:
                os.rmdir(staging_dir)
                return
            if lock is None:
                return
            try:
                if (staging_dir / "old").exists() and not os.path.lexists(self.destination):
                    os.rename(staging_dir / "old", self.destination)
                remove_staging_dir(staging_dir)
            finally:
                os.close(lock)


def replace_manifest(package: Package, manifest: Manifest) -> Package:
    """Write a manifest that says more about the same files, as `verify` does, in one step.

    Raises PackageError where the files differ, or where the manifest was changed since `package` was read.
    """
    if manifest.files != package.manifest.files:
        raise PackageError("the files of a package never change: build another one")
    place = package.path / layout.MANIFEST_NAME
    with _convert_os_errors(package.path):
        if layout.decode(read_manifest(package.path), quoted_path(place)) != package.manifest:
            raise PackageError(f"{quoted_path(place)} was changed meanwhile", hint="run the command again")
        atomic_file.write_atomic(place, layout.encode(manifest))
    return Package(package.path, manifest, package.inode_id)


def swap(new: Path, destination: Path, backup: Path) -> None:
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
        if not _exchange_paths(new, destination):
            os.rename(destination, backup)
            try:
                os.rename(new, destination)
            except BaseException:
                os.rename(backup, destination)
                raise
        return


def remove_staging_dir(staging_dir: Path) -> None:
    """Remove a hidden folder, its lock last: until then whoever finds it can tell that it is dead."""
    for place in (staging_dir / "package", staging_dir / "old", *staging_dir.glob(f"{_SCRATCH_PREFIX}*")):
        shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        os.unlink(staging_dir / "lock")
    with suppress(OSError):
        os.rmdir(staging_dir)


def _sync_if_exists(path: Path) -> None:
    with suppress(FileNotFoundError):
        atomic_file.fsync(path)


def _exchange_paths(one: Path, other: Path) -> bool:
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


def _create_staging_dir(destination: Path) -> tuple[Path, int]:
    while True:
        part = destination.parent / atomic_file.temporary_name(destination)
        part.mkdir()
        # Another builder may take it for a dead one's before it is locked: then it is gone, and another name is tried.
        with suppress(FileNotFoundError):
            lock = file_lock.try_acquire(part / "lock")
            if lock is not None:
                return part, lock


def _check_replaceable(destination: Path) -> None:
    """Refuse to replace what is not a package, or what holds more than a package."""
    while True:
        before = inode_id(destination)
        why = _replacement_error(destination)
        # Another builder may put its package there just now: then what was looked at was partly the one, partly the other.
        if why is None or inode_id(destination) == before:
            break
    if why is not None:
        raise why


def _replacement_error(destination: Path) -> PackageError | None:
    """Return why what lies at `destination` must stay, or None. Raises OSError."""
    try:
        os.lstat(destination)
    except FileNotFoundError:
        return None
    if not destination.is_dir():
        return PackageError(f"{quoted_path(destination)} is there and is not a package", hint="give --output another name")
    names = list_files(destination)
    if not names:
        return None
    try:
        ours = layout.listed_paths(read_manifest(destination), layout.MANIFEST_NAME)
    except PackageError as error:
        return PackageError(
            f"{quoted_path(destination)} is there and is not a package: {error.message}",
            hint="give --output another name, or remove it",
        )
    manifest = destination / layout.MANIFEST_NAME
    strange = {
        name for name in names - ours if name != layout.MANIFEST_NAME and not atomic_file.is_temporary_name(name, manifest)
    }
    if not strange:
        return None
    return PackageError(
        f"{quoted_path(destination)} would be replaced, and with it {quoted_path(min(strange))}, which is not part of the package",
        hint="move it elsewhere",
    )


@contextmanager
def _convert_os_errors(destination: Path) -> Iterator[None]:
    """Turn what the filesystem refuses into one sentence."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise _disk_full_error(destination, error) from error
        place = quoted_path(error.filename if isinstance(error.filename, (str, Path)) else destination)
        raise PackageError(f"{quoted_path(destination)} cannot be written: {place}: {error.strerror}") from error


def _disk_full_error(destination: Path, error: OSError) -> PackageError:
    return PackageError(
        f"{quoted_path(destination)} was not written: {error.strerror}", hint=f"make room in {quoted_path(destination.parent)}"
    )
