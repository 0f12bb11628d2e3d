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
    sweep(path, _discard)
    descriptor, hidden = _hidden_file(path)
    try:
        yield hidden
        os.fsync(descriptor)
        os.replace(hidden, path)
        sync(path.parent)
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


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hidden_name(path: Path) -> str:
    """Return a fresh name for what will become `path`: `.model.ryzen.3f9a51c07be2d846.part`."""
    return f"{_hidden_prefix(path)}{secrets.token_hex(8)}.part"


def sweep(path: Path, discard: Callable[[Path], None]) -> None:
    """Call `discard` for everything that stands beside `path` under a name of `hidden_name`."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return
    for name in names:
        if is_hidden(name, path):
            discard(path.parent / name)


def is_hidden(name: str, path: Path) -> bool:
    """Whether `name` is one of `hidden_name` for `path`."""
    return re.fullmatch(re.escape(_hidden_prefix(path)) + r"[0-9a-f]{16}\.part", name) is not None


def _hidden_prefix(path: Path) -> str:
    # A name may have 255 bytes. A cut may fall within a character, which is then left out.
    return f".{os.fsencode(path.name)[:200].decode('utf-8', 'ignore')}."


def _hidden_file(path: Path) -> tuple[int, Path]:
    while True:
        hidden = path.parent / hidden_name(path)
        os.close(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        # Another process may take it for a dead one's before it is locked: then it is gone, and another name is tried.
        with suppress(FileNotFoundError):
            descriptor = file_lock.attempt(hidden, create=False)
            if descriptor is not None:
                return descriptor, hidden


def _discard(hidden: Path) -> None:
    """Remove a dead process's file; a living one holds its lock."""
    with suppress(OSError):
        descriptor = file_lock.attempt(hidden, create=False)
        if descriptor is not None:
            try:
                os.unlink(hidden)
            finally:
                os.close(descriptor)
