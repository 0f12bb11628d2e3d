"""Atomic file writes: data is written to a hidden temporary file in the same folder, which is then renamed."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ryzen_compile.utils import file_lock


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces `path`, synced to disk, when the block exits without an error.

    The temporary file already exists and is locked: open it for writing, do not replace it. It is removed if the block fails.
    The files of killed processes are removed by the next process that writes the same path. Raises OSError.
    """
    remove_stale_files(path)
    descriptor, temporary = _create_temporary(path)
    try:
        yield temporary
        os.fsync(descriptor)
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to the file `path` atomically. Raises OSError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def fsync(path: Path) -> None:
    """Sync a file's contents, or a folder's entries, to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> str:
    """Return a unique name for a temporary file of `path`: `.model.ryzen.3f9a51c07be2d846.part`."""
    return f"{_temporary_prefix(path)}{secrets.token_hex(8)}.part"


def remove_stale(path: Path, remove: Callable[[Path], None]) -> None:
    """Call `remove` for every temporary file of `path`, as named by `temporary_name`, in its folder."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return
    for name in names:
        if is_temporary_name(name, path):
            remove(path.parent / name)


def remove_stale_files(path: Path) -> None:
    """Remove the temporary files of `path` that processes which have ended left behind."""
    remove_stale(path, _remove_if_unlocked)


def is_temporary_name(name: str, path: Path) -> bool:
    """Whether `name` is a name that `temporary_name` may return for `path`."""
    return re.fullmatch(re.escape(_temporary_prefix(path)) + r"[0-9a-f]{16}\.part", name) is not None


def _temporary_prefix(path: Path) -> str:
    # File names are limited to 255 bytes. If the cut splits a character, that character is dropped.
    return f".{os.fsencode(path.name)[:200].decode('utf-8', 'ignore')}."


def _create_temporary(path: Path) -> tuple[int, Path]:
    while True:
        temporary = path.parent / temporary_name(path)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        # Before it is locked, another process may treat the file as stale and remove it; retry with another name.
        with suppress(FileNotFoundError):
            descriptor = file_lock.try_acquire(temporary, create=False)
            if descriptor is not None:
                return descriptor, temporary


def _remove_if_unlocked(temporary: Path) -> None:
    """Remove the temporary file of a process that has ended; a running process holds its lock."""
    with suppress(OSError):
        descriptor = file_lock.try_acquire(temporary, create=False)
        if descriptor is not None:
            try:
                os.unlink(temporary)
            finally:
                os.close(descriptor)
