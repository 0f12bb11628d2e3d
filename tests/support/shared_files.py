"""Files that tests create once for all test processes, and keep for later sessions with the same sources."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ryzen_compile.utils import file_lock

FOLDER = Path(__file__).parents[2] / ".pytest_cache" / "shared-files"


def shared_file(kind: str, digest: str, name: str, create: Callable[[Path], None]) -> Path:
    """Return the path of the file `name` of a `kind`, which `create` writes to the path it receives.

    `digest` stands for everything that determines the content of the files of this kind; files of other digests are removed.
    Errors of `create` are propagated, and the next call creates the file again.
    """
    folder = FOLDER / kind / digest
    path = folder / name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock.acquire(FOLDER / f"{kind}.lock"):
        for outdated in (other for other in folder.parent.iterdir() if other != folder):
            shutil.rmtree(outdated, ignore_errors=True)
    with file_lock.acquire(folder / f"{name}.lock"):
        if not path.exists():
            partial = folder / f"partial.{os.getpid()}.{name}"
            try:
                create(partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    return path
