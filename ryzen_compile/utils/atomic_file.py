"""What appears whole or not at all: written under a hidden name beside its place, then put there in one step."""

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
    """Offer a hidden path beside `path` to write to; when the block ends, that file takes the place of `path`, on disk.

    The file exists already and is locked: open it for writing, do not replace it. When the block fails nothing is left, and
    what a killed process left is removed by the next one that writes the same file. Raises OSError.
    """
    remove_stale(path, _remove_if_unlocked)
    descriptor, hidden = _create_temporary(path)
    try:
        yield hidden
        os.fsync(descriptor)
        os.replace(hidden, path)
        fsync(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(hidden)
        raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`. Raises OSError."""
    with atomic_path(path) as hidden:
        hidden.write_bytes(data)


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> str:
    """Return a fresh name for what will become `path`: `.model.ryzen.3f9a51c07be2d846.part`."""
    return f"{_temporary_prefix(path)}{secrets.token_hex(8)}.part"


def remove_stale(path: Path, remove: Callable[[Path], None]) -> None:
    """Call `discard` for everything that stands beside `path` under a name of `hidden_name`."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return
    for name in names:
        if is_temporary_name(name, path):
            remove(path.parent / name)


def is_temporary_name(name: str, path: Path) -> bool:
    """Whether `name` is one of `hidden_name` for `path`."""
    return re.fullmatch(re.escape(_temporary_prefix(path)) + r"[0-9a-f]{16}\.part", name) is not None


def _temporary_prefix(path: Path) -> str:
    # A name may have 255 bytes. A cut may fall within a character, which is then left out.
    return f".{os.fsencode(path.name)[:200].decode('utf-8', 'ignore')}."


def _create_temporary(path: Path) -> tuple[int, Path]:
    while True:
        hidden = path.parent / temporary_name(path)
        os.close(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        # Another process may take it for a dead one's before it is locked: then it is gone, and another name is tried.
        with suppress(FileNotFoundError):
            descriptor = file_lock.try_acquire(hidden, create=False)
            if descriptor is not None:
                return descriptor, hidden


def _remove_if_unlocked(temporary: Path) -> None:
    """Remove a dead process's file; a living one holds its lock."""
    with suppress(OSError):
        descriptor = file_lock.try_acquire(temporary, create=False)
        if descriptor is not None:
            try:
                os.unlink(temporary)
            finally:
                os.close(descriptor)
