"""Packing of a package into one file: an uncompressed tar with the manifest first; equal packages give equal bytes.

The tar is not compressed because weights and engines hardly shrink, and standard tools can list it. Unpacking does not trust
the tar: it accepts only regular files that the manifest lists, in any order, each once and with the listed size, and checks
each digest while it writes the file into the package's folder. Any other member makes unpacking fail.
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
    """Write the package to one tar file and return its path; the digest of each file is checked while it is copied.

    Raises:
        PackageError: A file is damaged, the tar cannot be written, or `file` exists and is not a packed package.
    """
    path = Path(file)
    _check_replaceable(path)
    try:
        with atomic_file.atomic_path(path) as temporary_path, open(temporary_path, "wb", buffering=0) as output:
            data = layout.encode(package.manifest)
            _write_all(output, _header(layout.MANIFEST_NAME, len(data)) + data + _padding(len(data)))
            for record in sorted(package.manifest.files, key=lambda record: record.path):
                _write_all(output, _header(record.path, record.size_bytes))
                package.copy(record, output)
                _write_all(output, _padding(record.size_bytes))
            _write_all(output, bytes(2 * _BLOCK_BYTES))
    except OSError as error:
        hint = f"free disk space in {quoted_path(path.parent)}" if is_disk_full(error) else None
        raise PackageError(f"{quoted_path(path)} was not written: {error.strerror}", hint=hint) from error
    return path


def unpack(file: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Package:
    """Unpack a file that `pack` wrote to a package at `destination`, atomically.

    Raises:
        PackageError: The file is not a complete packed package, or `destination` cannot be written or replaced.
    """
    source = Path(file)
    if not source.is_file():
        raise PackageError(f"there is no file {quoted_path(source)}")
    try:
        with open(source, "rb", buffering=0) as stream:
            return _unpack(_TarReader(stream, source), destination)
    except OSError as error:
        raise PackageError(f"{quoted_path(source)} was not unpacked: {error.strerror}") from error


def _unpack(tar: _TarReader, destination: str | os.PathLike[str]) -> Package:
    first = tar.next()
    if first is None or first.name != layout.MANIFEST_NAME or first.size > layout.MAX_MANIFEST_BYTES:
        raise tar.make_error(f"its first member is not a {layout.MANIFEST_NAME} of at most {layout.MAX_MANIFEST_BYTES} bytes")
    manifest = layout.decode(tar.read(first.size), f"{quoted_path(tar.source)}: {layout.MANIFEST_NAME}")
    missing = {record.path: record for record in manifest.files}
    with Staging(destination) as staging:
        _check_free_space(tar, staging, sum(record.size_bytes for record in manifest.files))
        while (member := tar.next()) is not None:
            record = missing.pop(member.name, None)
            if record is None:
                raise tar.make_error(f"member {quoted_path(member.name)} is not listed in the manifest, or is a duplicate")
            if member.size != record.size_bytes:
                raise tar.make_error(
                    f"{quoted_path(record.path)} has {member.size} bytes, the manifest lists {record.size_bytes} bytes"
                )
            with open(staging.path(record.path), "xb", buffering=0) as output:
                tar.extract(record, output)
            staging.add(record.path, sha256=record.sha256)
        if missing:
            raise tar.make_error(f"{quoted_path(min(missing))} is missing")
        return staging.commit(manifest)


class _TarReader:
    """Reads a tar sequentially; only headers of regular files and GNU long names are accepted."""

    def __init__(self, stream: io.FileIO, source: Path) -> None:
        self.stream = stream
        self.source = source

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member, or None at the end."""
        block = self._read_exactly(_BLOCK_BYTES)
        if block == bytes(_BLOCK_BYTES):
            return None
        member = self._parse_header(block)
        if member.type == tarfile.GNUTYPE_LONGNAME:
            if not 0 < member.size <= _MAX_LONGNAME_BYTES:
                raise self.make_error(f"a member's name has more than {_MAX_LONGNAME_BYTES} bytes")
            name = self.read(member.size).rstrip(b"\0").decode("utf-8", "replace")
            member = self._parse_header(self._read_exactly(_BLOCK_BYTES))
            member.name = name
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise self.make_error(f"member {quoted_path(member.name)} is not a regular file")
        return member

    def read(self, size: int) -> bytes:
        """Return the content of the current member, `size` bytes."""
        data = self._read_exactly(size)
        self._read_exactly(len(_padding(size)))
        return data

    def extract(self, file: FileRecord, output: io.FileIO) -> None:
        """Write the content of the current member to `output` and check it against its record in the manifest."""
        digest, size = copy_and_hash(self.stream, output, "sha256", max_bytes=file.size_bytes)
        if size != file.size_bytes:
            raise self.make_error(f"the tar ends within {quoted_path(file.path)}")
        if digest != file.sha256:
            raise self.make_error(f"{quoted_path(file.path)} has sha256 {digest}, the manifest lists {file.sha256}")
        self._read_exactly(len(_padding(size)))

    def make_error(self, reason: str) -> PackageError:
        """Return the error that the tar is not a complete packed package."""
        return PackageError(
            f"{quoted_path(self.source)} is not a complete packed package: {reason}", hint="pack or download it again"
        )

    def _parse_header(self, block: bytes) -> tarfile.TarInfo:
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
            raise self.make_error("it is not a tar file") from error
        if member.size < 0:
            raise self.make_error(f"{quoted_path(member.name)} has a negative size")
        return member

    def _read_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self.stream.read(size - len(data))
            if not chunk:
                raise self.make_error("the tar is truncated")
            data += chunk
        return data


def _check_replaceable(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_file():
        with open(path, "rb") as stream:
            if stream.read(_BLOCK_BYTES).startswith(layout.MANIFEST_NAME.encode() + b"\0"):
                return
    raise PackageError(
        f"{quoted_path(path)} exists and is not a packed package", hint="give another output name, or remove the file"
    )


def _check_free_space(tar: _TarReader, staging: Staging, size: int) -> None:
    if size > os.fstat(tar.stream.fileno()).st_size:
        raise tar.make_error(f"the tar is smaller than the {size} bytes of files that its manifest lists")
    free = shutil.disk_usage(staging.folder).free
    if size > free:
        raise PackageError(
            f"{quoted_path(staging.destination)} needs {size} bytes, but only {free} bytes are free",
            hint=f"free disk space in {quoted_path(staging.destination.parent)}",
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
