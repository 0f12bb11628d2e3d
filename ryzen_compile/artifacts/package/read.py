"""Read a package: nothing of it is believed before its digest is checked.

What is promised. `read` reads the manifest alone: it refuses paths that leave the folder, links, and files that are missing or
of another size. `verify_digests` promises that the bytes at a path had the listed digest when it returned; `read_bytes` that
the bytes it returns have it. Whoever can write to the folder can also write the manifest: digests tell damage and half-copied
files, and which bytes an accuracy was measured on; they are no signature.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import FileRecord, Manifest
from ryzen_compile.errors import ModelError, PackageError
from ryzen_compile.utils.files import copy_and_hash, hasher, parallel_map, quoted_path

_StatSignature = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Package:
    """A package on disk."""

    path: Path
    manifest: Manifest
    inode_id: tuple[int, int]
    """Device and inode of the folder that was read: a builder may put another in its place."""
    _verified: dict[str, _StatSignature] = field(default_factory=dict, repr=False, compare=False)
    _references_cache: dict[str, tuple[_StatSignature, frozenset[str]]] = field(default_factory=dict, repr=False, compare=False)

    def file(self, path: str) -> FileRecord:
        """Return what the manifest says of the file `path`; raises PackageError where it lists no such file."""
        for file in self.manifest.files:
            if file.path == path:
                return file
        raise PackageError(f"{quoted_path(self.path)} lists no file {quoted_path(path)}", hint="see `ryzen-compile inspect`")

    def verify_digests(self, *paths: str) -> None:
        """Check the sha256 of the listed files `paths`, two at once; raises PackageError.

        What a graph among them refers to must be among them too. A file that was checked through this object and was not
        written since is not read again.
        """
        self._verify_files([self.file(path) for path in dict.fromkeys(paths)])
        for path in paths:
            if path.endswith(".onnx"):
                self._check_references(path, set(paths))

    def check(self) -> None:
        """Check the sha256 of every file, and that each variant refers to nothing but its weights; raises PackageError."""
        self._verify_files(self.manifest.files)
        for graph in self.manifest.graphs:
            for variant in graph.variants:
                self._check_references(variant.path, set(variant.weights))

    def read_bytes(self, path: str) -> bytearray:
        """Return the bytes of the listed file `path`, whose sha256 was checked on these very bytes; raises PackageError."""
        file = self.file(path)
        with self._detect_replacement(), _open_checked(self.path, file) as reading:
            data = bytearray(file.size_bytes)
            view, count = memoryview(data), 0
            while got := reading.readinto(view[count:]):
                count += got
            digest = hasher("sha256")
            digest.update(view[:count])
            _check_digest(self.path, file, digest.hexdigest())
        return data

    def copy(self, file: FileRecord, output: io.FileIO) -> None:
        """Write the bytes of a listed file, and check their sha256 on the way; raises PackageError."""
        with self._detect_replacement(), _open_checked(self.path, file) as reading:
            _check_digest(self.path, file, copy_and_hash(reading, output, "sha256")[0])

    def unlisted_files(self) -> tuple[str, ...]:
        """Return the files in the folder that the manifest does not list: they are never opened."""
        return tuple(sorted(list_files(self.path) - {layout.MANIFEST_NAME, *(file.path for file in self.manifest.files)}))

    def _verify_files(self, files: Iterable[FileRecord]) -> None:
        with self._detect_replacement():
            parallel_map(self._verify_file, sorted(files, key=lambda file: -file.size_bytes))

    def _check_references(self, path: str, allowed: set[str]) -> None:
        """Refuse a graph, verified just now, that reads a file which is not among `allowed`."""
        with self._detect_replacement():
            for location in sorted(self._external_references(path) - allowed):
                raise PackageError(
                    f"{quoted_path(self.path)}: {quoted_path(path)} reads {quoted_path(location)}, which is not among the weights that the "
                    "manifest lists for it",
                    hint="do not load it: it was not made by ryzen-compile",
                )

    def _external_references(self, path: str) -> frozenset[str]:
        from ryzen_compile.ir import protobuf_scan
        from ryzen_compile.ir.weight_files import resolve_model_file

        known = self._references_cache.get(path)
        if known is not None and known[0] == self._verified[path]:
            return known[1]
        try:
            places = protobuf_scan.read_skeleton(resolve_model_file(self.path / path)).tensor_locations
        except ModelError as error:
            raise PackageError(f"{quoted_path(self.path)} holds a graph that cannot be read: {error.message}") from error
        folder = PurePosixPath(path).parent
        found = frozenset(str(folder / place.location) for place in places if place.location is not None)
        self._references_cache[path] = self._verified[path], found
        return found

    @contextmanager
    def _detect_replacement(self) -> Iterator[None]:
        """Tell a package that was built anew while it was read from one that is damaged."""
        try:
            yield
        except PackageError as error:
            if inode_id(self.path) == self.inode_id:
                raise
            raise PackageError(f"{quoted_path(self.path)} was built anew while it was read", hint="load it again") from error

    def _verify_file(self, file: FileRecord) -> None:
        with _open_checked(self.path, file) as reading:
            signature = _stat_signature(os.fstat(reading.fileno()))
            if self._verified.get(file.path) == signature:
                return
            _check_digest(self.path, file, copy_and_hash(reading, None, "sha256")[0])
        self._verified[file.path] = signature


def read_package(path: str | os.PathLike[str]) -> Package:
    """Read the manifest of a package and check it against what lies there; raises PackageError.

    Only the manifest is read: see `Package.verify_digests` for the other files. Files that it does not list are ignored.
    """
    folder = Path(path)
    while True:
        before = inode_id(folder)
        try:
            manifest = layout.decode(read_manifest(folder), quoted_path(folder / layout.MANIFEST_NAME))
            seen: set[str] = set()
            for file in manifest.files:
                _check_file(folder, file, seen)
        except PackageError:
            if inode_id(folder) == before:
                raise
        if before is not None and inode_id(folder) == before:
            return Package(folder, manifest, before)


def inode_id(folder: Path) -> tuple[int, int] | None:
    """Return the device and inode of a folder; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def read_manifest(folder: Path) -> bytes:
    """Return the bytes of the manifest in `folder`; raises PackageError."""
    if not folder.is_dir():
        missing = "there is no" if not os.path.lexists(folder) else "not a package, because not a folder:"
        raise PackageError(
            f"{missing} {quoted_path(folder)}", hint="make one with `ryzen-compile build`, or `ryzen-compile unpack` one"
        )
    place = folder / layout.MANIFEST_NAME
    try:
        _check_regular(os.lstat(place), place)
        with open(place, "rb", opener=_open_nofollow) as reading:
            _check_regular(os.fstat(reading.fileno()), place)
            data = reading.read(layout.MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise PackageError(f"{quoted_path(folder)} is not a package: it has no {layout.MANIFEST_NAME}") from None
    except OSError as error:
        raise PackageError(f"{quoted_path(place)} cannot be read: {error.strerror}") from error
    if len(data) > layout.MAX_MANIFEST_BYTES:
        raise PackageError(f"{quoted_path(place)} is not a manifest: it has more than {layout.MAX_MANIFEST_BYTES} bytes")
    return data


def list_files(folder: Path) -> set[str]:
    """Return the paths of everything below `folder` that is not a folder, relative and with `/`; links are not followed."""
    found: set[str] = set()
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found.update((Path(parent) / name).relative_to(folder).as_posix() for name in (*names, *links))
    return found


def _check_file(folder: Path, file: FileRecord, checked_folders: set[str]) -> None:
    """Refuse a listed file that is missing, no plain file, of another size, or behind a link."""
    place = folder / file.path
    for parent in reversed(place.relative_to(folder).parents[:-1]):
        if str(parent) not in checked_folders:
            if (folder / parent).is_symlink():
                raise PackageError(
                    f"{quoted_path(folder / parent)} is a link", hint="a package holds plain files and folders only"
                )
            checked_folders.add(str(parent))
    try:
        found = os.lstat(place)
    except OSError as error:
        raise PackageError(
            f"{quoted_path(folder)} is damaged: {quoted_path(file.path)} cannot be read: {error.strerror}",
            hint="build or fetch it again",
        ) from error
    _check_regular(found, place)
    _check_size(folder, file, found.st_size)


def _check_regular(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "not a file"
        raise PackageError(f"{quoted_path(path)} is {kind}", hint="a package holds plain files and folders only")


def _check_size(folder: Path, file: FileRecord, size: int) -> None:
    if size != file.size_bytes:
        raise PackageError(
            f"{quoted_path(folder)} is damaged: {quoted_path(file.path)} has {size} bytes, the manifest says {file.size_bytes}",
            hint="build or fetch it again",
        )


def _check_digest(folder: Path, file: FileRecord, digest: str) -> None:
    if digest != file.sha256:
        raise PackageError(
            f"{quoted_path(folder)} is damaged: {quoted_path(file.path)} has sha256 {digest}, the manifest says {file.sha256}",
            hint="do not load it; build or fetch it again",
        )


@contextmanager
def _open_checked(folder: Path, file: FileRecord) -> Iterator[io.FileIO]:
    try:
        descriptor = _open_nofollow(str(folder / file.path), os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise PackageError(
            f"{quoted_path(folder)} is damaged: {quoted_path(file.path)} cannot be read: {error.strerror}"
        ) from error
    with io.FileIO(descriptor) as reading:
        found = os.fstat(descriptor)
        _check_regular(found, folder / file.path)
        _check_size(folder, file, found.st_size)
        yield reading


def _open_nofollow(path: str, flags: int) -> int:
    # Not through a link, and without waiting for the other end of a pipe.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _stat_signature(status: os.stat_result) -> _StatSignature:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
