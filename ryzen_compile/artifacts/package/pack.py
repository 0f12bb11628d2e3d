"""One file for transport: an uncompressed tar, the manifest first, equal bytes for equal packages.

Weights and engines hardly compress, and a tar can be looked into by anyone. Unpacking believes nothing: it takes plain files
that the manifest lists, in whatever order, each once and as large as listed, and writes each below the package's folder while
it checks its digest; everything else in the tar refuses the whole.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import FileRecord
from ryzen_compile.artifacts.package.read import Package
from ryzen_compile.artifacts.package.write import Staging
from ryzen_compile.errors import PackageError
from ryzen_compile.utils import atomic_file
from ryzen_compile.utils.files import copy_and_hash, is_disk_full, quoted_path

_BLOCK_BYTES = 512
_MAX_LONGNAME_BYTES = 4096


def pack(package: Package, file: str | os.PathLike[str]) -> Path:
    """Write the package into one file and return its path; each file's digest is checked on the way. Raises PackageError."""
    place = Path(file)
    _check_replaceable(place)
    try:
        with atomic_file.atomic_path(place) as hidden, open(hidden, "wb", buffering=0) as writing:
            data = layout.encode(package.manifest)
            _write_all(writing, _header(layout.MANIFEST_NAME, len(data)) + data + _padding(len(data)))
            for listed in sorted(package.manifest.files, key=lambda listed: listed.path):
                _write_all(writing, _header(listed.path, listed.size_bytes))
                package.copy(listed, writing)
                _write_all(writing, _padding(listed.size_bytes))
            _write_all(writing, bytes(2 * _BLOCK_BYTES))
    except OSError as error:
        hint = f"make room in {quoted_path(place.parent)}" if is_disk_full(error) else None
        raise PackageError(f"{quoted_path(place)} was not written: {error.strerror}", hint=hint) from error
    return place


def unpack(file: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Package:
    """Make a package of what `pack` wrote; it appears at `destination` whole or not at all. Raises PackageError."""
    source = Path(file)
    if not source.is_file():
        raise PackageError(f"there is no file {quoted_path(source)}")
    try:
        with open(source, "rb", buffering=0) as reading:
            return _unpack(_TarReader(reading, source), destination)
    except OSError as error:
        raise PackageError(f"{quoted_path(source)} was not unpacked: {error.strerror}") from error


def _unpack(tar: _TarReader, destination: str | os.PathLike[str]) -> Package:
    first = tar.next()
    if first is None or first.name != layout.MANIFEST_NAME or first.size > layout.MAX_MANIFEST_BYTES:
        raise tar.make_error("it does not begin with a manifest")
    manifest = layout.decode(tar.read(first.size), f"{quoted_path(tar.source)}: {layout.MANIFEST_NAME}")
    awaited = {listed.path: listed for listed in manifest.files}
    with Staging(destination) as staging:
        _check_free_space(tar, staging, sum(listed.size_bytes for listed in manifest.files))
        while (member := tar.next()) is not None:
            listed = awaited.pop(member.name, None)
            if listed is None:
                raise tar.make_error(f"it holds {quoted_path(member.name)}, which its manifest does not list, or lists once")
            if member.size != listed.size_bytes:
                raise tar.make_error(
                    f"{quoted_path(listed.path)} has {member.size} bytes, the manifest says {listed.size_bytes}"
                )
            with open(staging.path(listed.path), "xb", buffering=0) as writing:
                tar.extract(listed, writing)
            staging.add(listed.path, sha256=listed.sha256)
        if awaited:
            raise tar.make_error(f"{quoted_path(min(awaited))} is missing")
        return staging.commit(manifest)


class _TarReader:
    """A tar that is read front to back, header by header; each has one plain form, and every other is refused."""

    def __init__(self, stream: io.FileIO, source: Path) -> None:
        self.stream = stream
        self.source = source

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member; None at the end."""
        block = self._read_exactly(_BLOCK_BYTES)
        if block == bytes(_BLOCK_BYTES):
            return None
        member = self._parse_header(block)
        if member.type == tarfile.GNUTYPE_LONGNAME:
            if not 0 < member.size <= _MAX_LONGNAME_BYTES:
                raise self.make_error("it holds a name that is too long")
            name = self.read(member.size).rstrip(b"\0").decode("utf-8", "replace")
            member = self._parse_header(self._read_exactly(_BLOCK_BYTES))
            member.name = name
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise self.make_error(f"{quoted_path(member.name)} is not a plain file")
        return member

    def read(self, size: int) -> bytes:
        """Return the content of a member."""
        data = self._read_exactly(size)
        self._read_exactly(len(_padding(size)))
        return data

    def extract(self, file: FileRecord, output: io.FileIO) -> None:
        """Write the content of a member and check it against what is listed."""
        digest, size = copy_and_hash(self.stream, output, "sha256", max_bytes=file.size_bytes)
        if size != file.size_bytes:
            raise self.make_error(f"it ends within {quoted_path(file.path)}")
        if digest != file.sha256:
            raise self.make_error(f"{quoted_path(file.path)} has sha256 {digest}, the manifest says {file.sha256}")
        self._read_exactly(len(_padding(size)))

    def make_error(self, reason: str) -> PackageError:
        """Return the error that this is no packed package."""
        return PackageError(
            f"{quoted_path(self.source)} is not a whole packed package: {reason}", hint="pack or fetch it again"
        )

    def _parse_header(self, block: bytes) -> tarfile.TarInfo:
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
            raise self.make_error("it is no tar") from error
        if member.size < 0:
            raise self.make_error(f"{quoted_path(member.name)} has a negative size")
        return member

    def _read_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.stream.read(size - len(data))
            if not more:
                raise self.make_error("it is cut off")
            data += more
        return data


def _check_replaceable(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_file():
        with open(path, "rb") as reading:
            if reading.read(_BLOCK_BYTES).startswith(layout.MANIFEST_NAME.encode() + b"\0"):
                return
    raise PackageError(f"{quoted_path(path)} is there and is not a packed package", hint="give another name, or remove it")


def _check_free_space(tar: _TarReader, staging: Staging, size: int) -> None:
    if size > os.fstat(tar.stream.fileno()).st_size:
        raise tar.make_error("it is smaller than the files that its manifest lists")
    free = shutil.disk_usage(staging.folder).free
    if size > free:
        raise PackageError(
            f"{quoted_path(staging.destination)} takes {size} bytes, {free} are free",
            hint=f"make room in {quoted_path(staging.destination.parent)}",
        )


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK_BYTES)


def _write_all(output: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[output.write(view) :]
