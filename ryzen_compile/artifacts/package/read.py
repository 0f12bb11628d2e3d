"""Reading of packages: no file is used before its digest is checked.

Guarantees: `read_package` reads only the manifest and rejects paths outside the folder, symbolic links, and files that are
missing or of another size. `verify_digests` guarantees that the files had the listed digests when it returned; `read_bytes`
guarantees that the returned bytes have the listed digest. A user who can write to the folder can also write the manifest:
digests detect damage and incomplete copies, and identify the bytes for which an accuracy was measured, but are not a signature.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import FileRecord, Manifest
from ryzen_compile.errors import ModelError, PackageError
from ryzen_compile.utils.files import copy_and_hash, hasher, parallel_map, quoted_path
from ryzen_compile.utils.path_hints import folder_content_hint, missing_path_hint
from ryzen_compile.utils.summarized import Summarized

_StatSignature = tuple[int, int, int, int, int]

_REGULAR_FILES_HINT = "a package contains only regular files and folders"
_RESTORE_HINT = "build or download the package again"


@dataclass(frozen=True, repr=False)
class Package(Summarized):
    """A package on disk."""

    path: Path
    manifest: Manifest
    inode_id: tuple[int, int]
    """Device and inode of the folder when it was read; they differ after a builder replaced the package."""
    _verified: dict[str, _StatSignature] = field(default_factory=dict, repr=False, compare=False)
    _references_cache: dict[str, tuple[_StatSignature, frozenset[str]]] = field(default_factory=dict, repr=False, compare=False)

    def __fspath__(self) -> str:
        """Return the path of the folder, so that a package stands wherever a path of one is taken."""
        return str(self.path)

    @property
    def summary(self) -> str:
        """The path, the graphs and the targets of the engines."""
        graphs = ", ".join(graph.name for graph in self.manifest.graphs)
        targets = ", ".join(dict.fromkeys(str(target) for engine in self.manifest.engines for target in engine.targets))
        return f"{self.path}: {graphs}{f' for {targets}' if targets else ''}"

    def _details(self) -> list[str]:
        return [
            f"{variant.path}: {variant.precision}, " + ("met" if accuracy.met else "NOT MET") + f" in {accuracy.cases} cases"
            for graph in self.manifest.graphs
            for variant in graph.variants
            for accuracy in variant.accuracy
        ]

    def file(self, path: str) -> FileRecord:
        """Return the record of the file `path` in the manifest; raises PackageError if the file is not listed."""
        for file in self.manifest.files:
            if file.path == path:
                return file
        raise PackageError(
            f"the manifest of {quoted_path(self.path)} does not list the file {quoted_path(path)}",
            hint="run `ryzen-compile inspect` to list the files of the package",
        )

    def verify_digests(self, *paths: str) -> None:
        """Check the sha256 of the listed files `paths`, two files in parallel.

        A graph among `paths` must not refer to files that are not in `paths`. Files that this object has already checked are
        not read again unless they were modified.

        Raises:
            PackageError: A file is not listed, damaged or missing, or a graph refers to another file.
        """
        self._verify_files([self.file(path) for path in dict.fromkeys(paths)])
        for path in paths:
            if path.endswith(".onnx"):
                self._check_references(path, set(paths))

    def check(self) -> None:
        """Check the sha256 of every file, and that each variant refers only to its listed weights; raises PackageError."""
        self._verify_files(self.manifest.files)
        for graph in self.manifest.graphs:
            for variant in graph.variants:
                self._check_references(variant.path, set(variant.weights))

    def read_bytes(self, path: str) -> bytearray:
        """Return the bytes of the listed file `path`; the sha256 of the returned bytes is checked. Raises PackageError."""
        file = self.file(path)
        with self._detect_replacement(), _open_checked(self.path, file) as stream:
            data = bytearray(file.size_bytes)
            view, count = memoryview(data), 0
            while read := stream.readinto(view[count:]):
                count += read
            digest = hasher("sha256")
            digest.update(view[:count])
            _check_digest(self.path, file, digest.hexdigest())
        return data

    def copy(self, file: FileRecord, output: io.FileIO) -> None:
        """Copy the bytes of a listed file to `output` and check their sha256 while copying; raises PackageError."""
        with self._detect_replacement(), _open_checked(self.path, file) as stream:
            _check_digest(self.path, file, copy_and_hash(stream, output, "sha256")[0])

    def unlisted_files(self) -> tuple[str, ...]:
        """Return the files in the folder that the manifest does not list. Such files are never opened."""
        return tuple(sorted(list_files(self.path) - {layout.MANIFEST_NAME, *(file.path for file in self.manifest.files)}))

    def _verify_files(self, files: Iterable[FileRecord]) -> None:
        with self._detect_replacement():
            parallel_map(self._verify_file, sorted(files, key=lambda file: -file.size_bytes))

    def _check_references(self, path: str, allowed: set[str]) -> None:
        """Raise PackageError if a verified graph refers to a file that is not in `allowed`."""
        with self._detect_replacement():
            for location in sorted(self._external_references(path) - allowed):
                raise PackageError(
                    f"{quoted_path(self.path)}: graph {quoted_path(path)} reads {quoted_path(location)}, which the manifest "
                    "does not list as a weight file of the graph",
                    hint="do not load this package: ryzen-compile does not write such packages",
                )

    def _external_references(self, path: str) -> frozenset[str]:
        from ryzen_compile.ir import protobuf_scan
        from ryzen_compile.ir.weight_files import resolve_model_file

        cached = self._references_cache.get(path)
        if cached is not None and cached[0] == self._verified[path]:
            return cached[1]
        try:
            locations = protobuf_scan.read_skeleton(resolve_model_file(self.path / path)).tensor_locations
        except ModelError as error:
            raise PackageError(
                f"{quoted_path(self.path)} contains a graph that cannot be read: {error.message}", hint=_RESTORE_HINT
            ) from error
        folder = PurePosixPath(path).parent
        references = frozenset(str(folder / location.location) for location in locations if location.location is not None)
        self._references_cache[path] = self._verified[path], references
        return references

    @contextmanager
    def _detect_replacement(self) -> Iterator[None]:
        """Convert errors within the block if the package was replaced: then it is not damaged, and can be loaded again."""
        with held_inode(self.path):
            try:
                yield
            except PackageError as error:
                if inode_id(self.path) == self.inode_id and not self._is_of_another_build():
                    raise
                raise PackageError(
                    f"{quoted_path(self.path)} was replaced by another build while it was read", hint="load the package again"
                ) from error

    def _is_of_another_build(self) -> bool:
        """Return whether the manifest lists other files now: a later build can have the inode of a folder that was removed."""
        try:
            return layout.decode(read_manifest(self.path), layout.MANIFEST_NAME).files != self.manifest.files
        except PackageError:
            return False

    def _verify_file(self, file: FileRecord) -> None:
        with _open_checked(self.path, file) as stream:
            signature = _stat_signature(os.fstat(stream.fileno()))
            if self._verified.get(file.path) == signature:
                return
            _check_digest(self.path, file, copy_and_hash(stream, None, "sha256")[0])
        self._verified[file.path] = signature


def read_package(path: str | os.PathLike[str]) -> Package:
    """Read the manifest of a package and check that all listed files exist with the listed size.

    The content of the files is not read: see `Package.verify_digests`. Unlisted files are ignored.

    Raises:
        PackageError: The folder is not a package, the manifest is invalid, or a file is missing, a link or of another size.
    """
    folder = Path(path)
    while True:
        with held_inode(folder) as before:
            try:
                manifest = layout.decode(read_manifest(folder), quoted_path(folder / layout.MANIFEST_NAME))
                checked_folders: set[str] = set()
                for file in manifest.files:
                    _check_file(folder, file, checked_folders)
            except PackageError:
                if inode_id(folder) == before:
                    raise
            if before is not None and inode_id(folder) == before:
                return Package(folder, manifest, before)


@contextmanager
def held_inode(folder: Path) -> Iterator[tuple[int, int] | None]:
    """Yield the device and inode of a folder, or None if it does not exist; within the block no other folder has them."""
    with ExitStack() as resources:
        held: Path | int = folder
        # Not possible for a folder that is missing or whose entries must not be listed, and on Windows.
        with suppress(OSError):
            held = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
            resources.callback(os.close, held)
        yield inode_id(held)


def inode_id(folder: Path | int) -> tuple[int, int] | None:
    """Return the device and inode of a folder, or of the one that a descriptor refers to; None if it does not exist."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def read_manifest(folder: Path) -> bytes:
    """Return the bytes of the manifest in `folder`; raises PackageError if it is missing, unreadable or too large."""
    if not folder.is_dir():
        name, create = quoted_path(folder), "create a package with `ryzen-compile build` or `ryzen-compile unpack`"
        raise PackageError(
            f"{name} is not a package: it is not a folder" if os.path.lexists(folder) else f"there is no package {name}",
            hint=missing_path_hint(folder, create) if not os.path.lexists(folder) else create,
        )
    path = folder / layout.MANIFEST_NAME
    try:
        _check_regular(os.lstat(path), path)
        with open(path, "rb", opener=_open_nofollow) as stream:
            _check_regular(os.fstat(stream.fileno()), path)
            data = stream.read(layout.MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise PackageError(
            f"{quoted_path(folder)} is not a package: it has no {layout.MANIFEST_NAME}",
            hint=folder_content_hint(
                folder, "give the path of a folder that `ryzen-compile build` or `ryzen-compile unpack` wrote"
            ),
        ) from None
    except OSError as error:
        raise PackageError(
            f"{quoted_path(path)} cannot be read: {error.strerror}", hint="check the permissions of the folder and the file"
        ) from error
    if len(data) > layout.MAX_MANIFEST_BYTES:
        raise PackageError(
            f"{quoted_path(path)} is not a valid manifest: it has more than {layout.MAX_MANIFEST_BYTES} bytes",
            hint=_RESTORE_HINT,
        )
    return data


def list_files(folder: Path) -> set[str]:
    """Return the relative paths, with `/`, of all files and symbolic links below `folder`; links are not followed."""
    paths: set[str] = set()
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        paths.update((Path(parent) / name).relative_to(folder).as_posix() for name in (*names, *links))
    return paths


def _check_file(folder: Path, file: FileRecord, checked_folders: set[str]) -> None:
    """Raise PackageError if a listed file is missing, not a regular file, of another size, or behind a symbolic link."""
    path = folder / file.path
    for parent in reversed(path.relative_to(folder).parents[:-1]):
        if str(parent) not in checked_folders:
            if (folder / parent).is_symlink():
                raise PackageError(f"{quoted_path(folder / parent)} is a symbolic link", hint=_REGULAR_FILES_HINT)
            checked_folders.add(str(parent))
    try:
        status = os.lstat(path)
    except OSError as error:
        raise PackageError(
            f"{quoted_path(folder)} is damaged: {quoted_path(file.path)} cannot be read: {error.strerror}",
            hint=_RESTORE_HINT,
        ) from error
    _check_regular(status, path)
    _check_size(folder, file, status.st_size)


def _check_regular(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
        raise PackageError(f"{quoted_path(path)} is {kind}", hint=_REGULAR_FILES_HINT)


def _check_size(folder: Path, file: FileRecord, size: int) -> None:
    if size != file.size_bytes:
        raise PackageError(
            f"{quoted_path(folder)} is damaged: {quoted_path(file.path)} has {size} bytes, "
            f"the manifest lists {file.size_bytes} bytes",
            hint=_RESTORE_HINT,
        )


def _check_digest(folder: Path, file: FileRecord, digest: str) -> None:
    if digest != file.sha256:
        raise PackageError(
            f"{quoted_path(folder)} is damaged: {quoted_path(file.path)} has sha256 {digest}, the manifest lists {file.sha256}",
            hint=f"do not load this package; {_RESTORE_HINT}",
        )


@contextmanager
def _open_checked(folder: Path, file: FileRecord) -> Iterator[io.FileIO]:
    try:
        descriptor = _open_nofollow(str(folder / file.path), os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise PackageError(
            f"{quoted_path(folder)} is damaged: {quoted_path(file.path)} cannot be read: {error.strerror}",
            hint=_RESTORE_HINT,
        ) from error
    with io.FileIO(descriptor) as stream:
        status = os.fstat(descriptor)
        _check_regular(status, folder / file.path)
        _check_size(folder, file, status.st_size)
        yield stream


def _open_nofollow(path: str, flags: int) -> int:
    # Do not follow symbolic links, and do not block on the other end of a pipe.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _stat_signature(status: os.stat_result) -> _StatSignature:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
