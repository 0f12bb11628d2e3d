"""Hashing and copying of files in a single pass over the data, and helpers to display paths."""

from __future__ import annotations

import errno
import hashlib
import io
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

CHUNK_BYTES = 1 << 20
"""Bytes per read: small enough to stay in a core's cache between reading, hashing and writing."""

DIRECT_IO_MIN_BYTES = 8 << 20
"""Copies of at least this size use direct I/O, so that they do not evict other files from the page cache."""

StrPath: TypeAlias = str | os.PathLike[str]

Algorithm = Literal["blake3", "sha256"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Hasher(Protocol):
    """An incremental hash."""

    def update(self, data: memoryview, /) -> object:
        """Hash more bytes; releases the GIL."""
        ...

    def hexdigest(self) -> str:
        """Return the digest of all bytes hashed so far, in lower-case hex."""
        ...


def is_onnx_file(path: StrPath) -> bool:
    """Return whether `path` is an existing file that is named as an ONNX file, `.onnx`."""
    return Path(path).suffix == ".onnx" and Path(path).is_file()


def hasher(algorithm: Algorithm) -> Hasher:
    """Return a new hash object."""
    if algorithm == "sha256":
        return hashlib.sha256()
    import blake3

    return blake3.blake3()


def hash_file(path: Path, algorithm: Algorithm) -> str:
    """Return the digest of a file. The file is read in chunks and not memory-mapped. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return copy_and_hash(file, None, algorithm)[0]


def copy_hashed(source: Path, destination: Path, algorithm: Algorithm) -> str:
    """Copy a file to the new path `destination` and return the digest of the written bytes.

    On filesystems with block sharing the copy takes no space until one of the files is modified. Raises OSError;
    FileExistsError if `destination` exists.
    """
    with open(source, "rb", buffering=0) as source_file, open(destination, "xb+", buffering=0) as destination_file:
        if _reflink(source_file, destination_file):
            return copy_and_hash(destination_file, None, algorithm)[0]
        if os.fstat(source_file.fileno()).st_size >= DIRECT_IO_MIN_BYTES:
            _set_direct_io(destination_file, True)
        return copy_and_hash(source_file, destination_file, algorithm)[0]


def link_hashed(source: Path, destination: Path, algorithm: Algorithm) -> str:
    """Make a finished file available at the new path `destination`, without copying if possible, and return its digest.

    The files share blocks if the filesystem supports it and are then independent. Otherwise `destination` is a hard link, and a
    write to one path modifies both. If links are not supported either, the file is copied. Raises OSError; FileExistsError if
    `destination` exists.
    """
    with open(source, "rb", buffering=0) as source_file, open(destination, "xb+", buffering=0) as destination_file:
        if _reflink(source_file, destination_file):
            return copy_and_hash(destination_file, None, algorithm)[0]
    os.unlink(destination)
    try:
        os.link(source, destination)
    except OSError:
        return copy_hashed(source, destination, algorithm)
    return hash_file(destination, algorithm)


def copy_and_hash(
    source: io.FileIO, destination: io.FileIO | None, algorithm: Algorithm, *, max_bytes: int | None = None
) -> tuple[str, int]:
    """Copy `source` to its end, or at most `max_bytes` bytes, and return the digest and the number of bytes copied.

    Without a `destination` the bytes are only hashed. Raises OSError.
    """
    digest, size = hasher(algorithm), 0
    buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES))  # page-aligned, as direct I/O requires
    while count := source.readinto(buffer if max_bytes is None else buffer[: max_bytes - size]):
        data = buffer[:count]
        digest.update(data)
        while destination is not None and data:
            data = data[_write_direct(destination, data) :]
        size += count
    return digest.hexdigest(), size


def escape_unprintable(text: str) -> str:
    """Return untrusted text on one line, with unprintable characters such as newlines and terminal control codes escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def quoted_path(path: Path | str) -> str:
    """Return a path for display in messages: printable, in backticks."""
    return f"`{escape_unprintable(str(path))}`"


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed for lack of space: a full disk, an exceeded quota or a file size limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _write_direct(file: io.FileIO, data: memoryview) -> int:
    try:
        return file.write(data)
    except OSError as error:
        if error.errno != errno.EINVAL or not _set_direct_io(file, False):
            raise
        return file.write(data)  # the end of the file is not a multiple of the disk's block size


def _set_direct_io(file: io.FileIO, enabled: bool) -> bool:
    """Enable or disable direct I/O, and return whether that changed the mode of the file."""
    if sys.platform != "linux":
        return False
    import fcntl

    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    if bool(flags & os.O_DIRECT) == enabled:
        return False
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags ^ os.O_DIRECT)
    except OSError:  # the filesystem does not support direct I/O, e.g. tmpfs
        return False
    return True


def _reflink(source: io.FileIO, destination: io.FileIO) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(destination, 0x40049409, source.fileno())  # FICLONE: Btrfs, XFS, bcachefs, OCFS2
    except OSError:
        return False
    return True


def parallel_map(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Call `function` for each item on two threads and return the results in order.

    Two threads read, hash and write faster than one; more threads are not faster on a disk. After the first error, no further
    calls start; the error is raised when the running calls have returned.
    """
    work = list(items)
    if len(work) < 2:
        return [function(item) for item in work]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(function, item) for item in work]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def file_label(reference: str) -> str:
    """Return a reference without folders, for records that are shipped: `/home/me/model.py:make` -> `model.py:make`.

    A reference that names no file, such as `recipe:NAME`, is returned unchanged.
    """
    return Path(reference).name
