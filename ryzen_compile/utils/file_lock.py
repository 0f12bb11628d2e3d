"""Inter-process file locks, which the operating system releases when the holding process ends for any reason."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def acquire(path: Path, *, shared: bool = False, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock on the file `path` for the duration of the block; blocks without a timeout until the lock is free.

    A `shared` lock may have many holders, an exclusive lock has one. If the lock is not free, `on_wait` is called once with
    its holder: "process 4711". Raises OSError if the file cannot be created or the filesystem does not support locks.
    """
    descriptor = try_acquire(path, shared=shared)
    if descriptor is None and on_wait:
        on_wait(_describe_holder(path))
    while descriptor is None:
        descriptor = _lock(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        if not shared:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        if not shared:
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def try_acquire(path: Path, *, shared: bool = False, create: bool = True) -> int | None:
    """Lock the file `path` without blocking and return its descriptor, which the caller must close; None if it is locked.

    Raises OSError; FileNotFoundError if the file does not exist and `create` is false.
    """
    try:
        return _lock(path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, create=create)
    except BlockingIOError:
        return None


def _lock(path: Path, operation: int, *, create: bool = True) -> int | None:
    """Lock the file `path`; return None if another process removed or replaced the file before it was locked."""
    descriptor = _open(path, os.O_CREAT if create else 0)
    try:
        fcntl.flock(descriptor, operation)
        if not _refers_to(descriptor, path):
            os.close(descriptor)
            return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open(path: Path, create_flag: int) -> int:
    try:
        return os.open(path, os.O_RDWR | create_flag | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        try:
            # A read-only descriptor is sufficient for a lock.
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise error from None


def _refers_to(descriptor: int, path: Path) -> bool:
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), status)


def _describe_holder(path: Path) -> str:
    try:
        return f"process {int(path.read_text(encoding='ascii'))}"
    except (OSError, ValueError):
        return "another process"
