"""Small files with a checksum: the first line is the BLAKE3 digest of the remaining bytes."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

import blake3


def read_checksummed(path: Path) -> bytes | None:
    """Return the data that `write_checksummed` wrote to `path`, or None if the file is missing, unreadable or damaged."""
    try:
        digest, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return data if digest == blake3.blake3(data).hexdigest().encode() else None


def write_checksummed(path: Path, data: bytes, *, tmp_dir: Path) -> None:
    """Write `data` to `path` atomically, by renaming a file in `tmp_dir`. Raises OSError."""
    temporary_path = tmp_dir / secrets.token_hex(16)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        temporary_path.write_bytes(blake3.blake3(data).hexdigest().encode() + b"\n" + data)
        os.replace(temporary_path, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary_path)
        raise
