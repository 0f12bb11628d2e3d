"""Small files that tell when they are damaged: a line with the BLAKE3 of the rest, then the rest."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

import blake3


def read_checksummed(path: Path) -> bytes | None:
    """Return what was written to `path`; None where there is nothing or where it is damaged."""
    try:
        digest, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return data if digest == blake3.blake3(data).hexdigest().encode() else None


def write_checksummed(path: Path, data: bytes, *, tmp_dir: Path) -> None:
    """Put `data` at `path`, whole or not at all, by way of the folder `parts`. Raises OSError."""
    part = tmp_dir / secrets.token_hex(16)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        part.write_bytes(blake3.blake3(data).hexdigest().encode() + b"\n" + data)
        os.replace(part, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(part)
        raise
