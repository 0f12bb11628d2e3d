"""Writing of packages: in a hidden folder next to the destination, then moved there atomically."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import msgspec

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import FileRecord, Manifest
from ryzen_compile.artifacts.package.read import Package, held_inode, inode_id, list_files, read_manifest
from ryzen_compile.errors import PackageError
from ryzen_compile.utils import atomic_file, file_lock
from ryzen_compile.utils.files import hash_file, is_disk_full, parallel_map, quoted_path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Staging:
    """A context manager for writing a package. If the block ends without `commit`, all files are removed.

    The hidden folder `.<name>.<random>.part` contains `package` (the new files), `lock` (locked while the builder's process is
    alive) and, during a swap on a filesystem without atomic exchange, `old`. The next builder of the same package removes the
    hidden folders of killed builders.

        with Staging("model.ryzen") as staging:
            write(staging.path("graphs/model.fold.onnx"))
            staging.add("graphs/model.fold.onnx")
            package = staging.commit(manifest)
    """

    def __init__(self, destination: str | os.PathLike[str]) -> None:
        # If the destination is a symbolic link, its target is replaced and the link is kept.
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
        """Keep an existing package at the destination: `commit` writes to `<name>.rejected.ryzen` next to it instead."""
        if os.path.lexists(self.destination) and list_files(self.destination):
            self.destination = self.destination.with_name(f"{self.destination.stem}.rejected.ryzen")

    def path(self, relative: str) -> Path:
        """Return the path of the file `relative` to write, and create its folder; raises PackageError for an invalid path."""
        if (reason := layout.invalid_path_reason(relative)) is not None:
            raise PackageError(
                f"path {quoted_path(relative)} {reason}",
                hint="use a relative path inside the package with characters that all filesystems support",
            )
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def strip_staging_prefix(self, text: str) -> str:
        """Return `text` with paths of the hidden folder replaced by paths relative to the package."""
        return text.replace(f"{self.folder}{os.sep}", "")

    def fsync_async(self, path: Path) -> None:
        """Start writing a finished file to disk in the background before it is added; it may still be removed."""
        # The kernel reports a failed write only once: `commit` must get it from here, as a second fsync may succeed.
        self._pending_syncs.append(self._sync_executor.submit(_sync_if_exists, path))

    def add(self, relative: str, *, sha256: str | None = None) -> FileRecord:
        """Add the finished file `relative` to the package; it must not be written any more.

        The file is not read if `sha256` is given. It is written to disk in the background.
        """
        path = self.path(relative)
        size = path.stat().st_size
        file = FileRecord(path=relative, sha256=sha256 or hash_file(path, "sha256"), size_bytes=size)
        self._files[relative] = file
        self._pending_syncs.append(self._sync_executor.submit(atomic_file.fsync, path))
        return file

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """The added files, sorted by path."""
        return tuple(self._files[path] for path in sorted(self._files))

    def commit(self, manifest: Manifest) -> Package:
        """Move the package to its destination: readers see either the complete old package or the complete new one.

        Adds all files that were written and not added, and sets the manifest's `files`. All data is on disk before the move.

        Raises:
            PackageError: The manifest is invalid, the disk is full, or the destination cannot be written or replaced.
        """
        with _convert_os_errors(self.destination):
            parallel_map(self.add, sorted(list_files(self.folder) - set(self._files)))
            manifest = msgspec.structs.replace(manifest, files=self.files)
            data = layout.encode(manifest)
            (self.folder / layout.MANIFEST_NAME).write_bytes(data)
            for pending in self._pending_syncs:
                pending.result()
            atomic_file.fsync(self.folder / layout.MANIFEST_NAME)
            for parent, _, _ in os.walk(self.folder):
                atomic_file.fsync(Path(parent))
            status = self.folder.stat()
            _check_replaceable(self.destination)
            swap(self.folder, self.destination, self._staging_dir / "old")
            atomic_file.fsync(self.destination.parent)
        return Package(self.destination, manifest, (status.st_dev, status.st_ino))

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
        """Remove the hidden folder of a builder whose process died; a live one holds its lock."""
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
    """Replace the manifest of a package atomically, as `verify` does to add records; its list of files must be the same.

    Raises:
        PackageError: The list of files differs, or the manifest was changed since `package` was read.
    """
    if manifest.files != package.manifest.files:
        raise PackageError(
            f"the new manifest of {quoted_path(package.path)} lists other files: the files of a package cannot be changed",
            hint="build the package again",
        )
    path = package.path / layout.MANIFEST_NAME
    with _convert_os_errors(package.path):
        if layout.decode(read_manifest(package.path), quoted_path(path)) != package.manifest:
            raise PackageError(f"{quoted_path(path)} was changed since it was read", hint="run the command again")
        atomic_file.write_atomic(path, layout.encode(manifest))
    return Package(package.path, manifest, package.inode_id)


def swap(new: Path, destination: Path, backup: Path) -> None:
    """Move the folder `new` to `destination`, and an existing folder there to `new` or `backup`; raises OSError.

    The exchange is atomic if the kernel and the filesystem support it. Otherwise the existing folder is renamed to `backup`
    first, and for a moment `destination` does not exist.
    """
    while True:
        if not os.path.lexists(destination):
            try:
                os.rename(new, destination)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    continue  # another builder created the destination first: replace its package
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
    """Remove a hidden folder, the lock file last, so that other builders can detect until then that its builder died."""
    for folder in (staging_dir / "package", staging_dir / "old"):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        os.unlink(staging_dir / "lock")
    with suppress(OSError):
        os.rmdir(staging_dir)


def _sync_if_exists(path: Path) -> None:
    with suppress(FileNotFoundError):
        atomic_file.fsync(path)


def _exchange_paths(first: Path, second: Path) -> bool:
    """Exchange two paths atomically; return False if the kernel or the filesystem does not support it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if not renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _create_staging_dir(destination: Path) -> tuple[Path, int]:
    while True:
        staging_dir = destination.parent / atomic_file.temporary_name(destination)
        staging_dir.mkdir()
        # Before the lock is taken, another builder may remove the folder as that of a dead builder: try another name.
        with suppress(FileNotFoundError):
            lock = file_lock.try_acquire(staging_dir / "lock")
            if lock is not None:
                return staging_dir, lock


def _check_replaceable(destination: Path) -> None:
    """Raise PackageError if `destination` exists and is not a package, or contains files that are not part of the package."""
    while True:
        with held_inode(destination) as before:
            error = _replacement_error(destination)
            # If another builder replaced the package during the check, the check saw parts of both: repeat it.
            if error is None or inode_id(destination) == before:
                break
    if error is not None:
        raise error


def _replacement_error(destination: Path) -> PackageError | None:
    """Return the reason why `destination` must not be replaced as an error, or None. Raises OSError."""
    try:
        os.lstat(destination)
    except FileNotFoundError:
        return None
    if not destination.is_dir():
        message = f"{quoted_path(destination)} exists and is not a package"
        return PackageError(message, hint="give another --output name", code="output-exists")
    names = list_files(destination)
    if not names:
        return None
    try:
        listed = layout.listed_paths(read_manifest(destination), layout.MANIFEST_NAME)
    except PackageError as error:
        return PackageError(
            f"{quoted_path(destination)} exists and is not a package: {error.message}",
            hint="give another --output name, or remove the folder",
            code="output-exists",
        )
    manifest = destination / layout.MANIFEST_NAME
    unlisted = {
        name for name in names - listed if name != layout.MANIFEST_NAME and not atomic_file.is_temporary_name(name, manifest)
    }
    if not unlisted:
        return None
    return PackageError(
        f"{quoted_path(destination)} contains {quoted_path(min(unlisted))}, which is not part of the package and would be lost",
        hint="move the file to another folder",
        code="unlisted-file",
    )


@contextmanager
def _convert_os_errors(destination: Path) -> Iterator[None]:
    """Convert OSErrors within the block to PackageErrors."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise _disk_full_error(destination, error) from error
        path = quoted_path(error.filename if isinstance(error.filename, (str, Path)) else destination)
        raise PackageError(
            f"{quoted_path(destination)} cannot be written: {path}: {error.strerror}",
            hint="choose a destination in a folder with write permission",
        ) from error


def _disk_full_error(destination: Path, error: OSError) -> PackageError:
    return PackageError(
        f"{quoted_path(destination)} was not written: {error.strerror}",
        hint=f"free disk space in {quoted_path(destination.parent)}",
    )
