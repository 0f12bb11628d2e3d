"""Files: hashed and copied in one pass per byte, on two threads."""

from __future__ import annotations

import errno
import hashlib
import io
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol, TypeVar

CHUNK_BYTES = 1 << 20
"""What is read at once: small enough to stay in a core's cache between reading, hashing and writing."""

DIRECT_IO_MIN_BYTES = 8 << 20
"""From this size on a copy goes straight to disk: it need not push out of memory what others will read before it is."""

Algorithm = Literal["blake3", "sha256"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Hasher(Protocol):
    """A digest in the making."""

    def update(self, data: memoryview, /) -> object:
        """Take more bytes; lets other threads run meanwhile."""
        ...

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far, in lower-case hex."""
        ...


def hasher(algorithm: Algorithm) -> Hasher:
    """Return an empty digest."""
    if algorithm == "sha256":
        return hashlib.sha256()
    import blake3

    return blake3.blake3()


def hash_file(path: Path, algorithm: Algorithm) -> str:
    """Return the digest of a file, read in chunks: nothing is mapped, so nothing stays resident. Raises OSError."""
    with open(path, "rb", buffering=0) as reading:
        return copy_and_hash(reading, None, algorithm)[0]


def copy_hashed(source: Path, destination: Path, algorithm: Algorithm) -> str:
    """Copy a file to a new one, and return the digest of what was written.

    Where the filesystem can share blocks the copy takes no room until one of the two is written to. Raises OSError.
    """
    with open(source, "rb", buffering=0) as reading, open(destination, "xb+", buffering=0) as writing:
        if _reflink(reading, writing):
            return copy_and_hash(writing, None, algorithm)[0]
        if os.fstat(reading.fileno()).st_size >= DIRECT_IO_MIN_BYTES:
            _set_direct_io(writing, True)
        return copy_and_hash(reading, writing, algorithm)[0]


def link_hashed(source: Path, destination: Path, algorithm: Algorithm) -> str:
    """Give a file that is finished a second place without a copy of its bytes, and return the digest of what lies there.

    Where the filesystem can share blocks the two are apart; where it can only link, whoever writes to one writes to both;
    where it can do neither, this is a copy. Raises OSError.
    """
    with open(source, "rb", buffering=0) as reading, open(destination, "xb+", buffering=0) as writing:
        if _reflink(reading, writing):
            return copy_and_hash(writing, None, algorithm)[0]
    os.unlink(destination)
    try:
        os.link(source, destination)
    except OSError:
        return copy_hashed(source, destination, algorithm)
    return hash_file(destination, algorithm)


def copy_and_hash(
    source: io.FileIO, destination: io.FileIO | None, algorithm: Algorithm, *, max_bytes: int | None = None
) -> tuple[str, int]:
    """Read to the end, or at most `limit` bytes, and write what was read; return its digest and its size in bytes.

    Raises OSError.
    """
    digest, size = hasher(algorithm), 0
    buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES))  # aligned, as writing straight to disk demands
    while count := source.readinto(buffer if max_bytes is None else buffer[: max_bytes - size]):
        data = buffer[:count]
        digest.update(data)
        while destination is not None and data:
            data = data[_write_direct(destination, data) :]
        size += count
    return digest.hexdigest(), size


def escape_unprintable(text: str) -> str:
    """Return text of unknown origin on one line, with what cannot be printed escaped: newlines, terminal control codes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def quoted_path(path: Path | str) -> str:
    """Return a path as a message shows it: printable, between backticks."""
    return f"`{escape_unprintable(str(path))}`"


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed because there is no room: the disk, a quota or a limit on the size of files."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _write_direct(file: io.FileIO, data: memoryview) -> int:
    try:
        return file.write(data)
    except OSError as error:
        if error.errno != errno.EINVAL or not _set_direct_io(file, False):
            raise
        return file.write(data)  # the rest of a file is no multiple of the disk's blocks


def _set_direct_io(file: io.FileIO, enabled: bool) -> bool:
    """Write past the page cache or through it, and tell whether that is another way than before."""
    if sys.platform != "linux":
        return False
    import fcntl

    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    if bool(flags & os.O_DIRECT) == enabled:
        return False
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags ^ os.O_DIRECT)
    except OSError:  # a filesystem that only lives in the cache
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
    """Call `function` for each item on two threads, and return the results in order.

    Two read, hash and write faster than one, and more gain nothing on a disk. The first error ends it, once the calls that
    run have returned.
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
