"""Locks between processes: a file that the kernel unlocks when its holder dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def acquire(path: Path, *, shared: bool = False, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` for the block, waiting for it as long as it takes.

    Many may hold it `shared`, one alone otherwise. `waiting` is told once who is waited for, "process 4711". Raises OSError
    where the file cannot be made or the filesystem knows no locks.
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
    """Lock the file `path` without waiting and return its descriptor, which the caller closes; None where another holds it.

    Raises OSError; FileNotFoundError where there is no such file and `create` is false.
    """
    try:
        return _lock(path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, create=create)
    except BlockingIOError:
        return None


def _lock(path: Path, operation: int, *, create: bool = True) -> int | None:
    """Lock the file called `path`; None where its last holder removed it meanwhile, so that the lock guards no name."""
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
            # Who may only read can lock all the same.
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise error from None


def _refers_to(descriptor: int, path: Path) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _describe_holder(path: Path) -> str:
    try:
        return f"process {int(path.read_text(encoding='ascii'))}"
    except (OSError, ValueError):
        return "another process"
