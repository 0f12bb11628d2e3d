"""Scratch folders below the cache folder, which is on a disk; the system's temporary folder may be in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ryzen_compile.errors import RyzenError
from ryzen_compile.utils import file_lock
from ryzen_compile.utils.files import quoted_path

_FOLDER = "scratch"
_LOCK = "lock"
"""The file of a scratch folder that is locked while the process that made it is alive."""


@contextmanager
def scratch_folder(cache_folder: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in `cache_folder` whose name begins with `prefix`; it is removed at the end of the block.

    `remove_stale_scratch` removes the folders of processes that were killed. Raises RyzenError if the cache folder cannot be
    written or locked.
    """
    parent = cache_folder / _FOLDER
    try:
        cache_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        parent.mkdir(exist_ok=True, mode=0o700)
        folder, lock = _create_locked(parent, prefix)
    except OSError as error:
        raise RyzenError(
            f"the cache folder {quoted_path(cache_folder)} cannot be written: {error.strerror}",
            hint="set RYZEN_COMPILE_CACHE to another folder",
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_stale_scratch(cache_folder: Path) -> None:
    """Remove the scratch folders in `cache_folder` that no process holds."""
    parent = cache_folder / _FOLDER
    with suppress(OSError):
        for folder in list(parent.iterdir()):
            _remove_if_unlocked(folder)


def _create_locked(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        # Before the lock is taken, another process may remove the folder as that of a killed process: try another name.
        with suppress(FileNotFoundError):
            lock = file_lock.try_acquire(folder / _LOCK)
            if lock is not None:
                return folder, lock


def _remove_if_unlocked(folder: Path) -> None:
    with suppress(OSError):
        lock = file_lock.try_acquire(folder / _LOCK)
        if lock is not None:
            try:
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
