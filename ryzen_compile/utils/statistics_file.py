"""Statistics files: safetensors files with metadata that identify them, which `calibrate` writes and passes read."""

from __future__ import annotations

import os

import msgspec

METADATA_KEY = "ryzen_compile.statistics"
"""The key of the metadata of a statistics file."""
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the header in the safetensors format."""


def is_statistics_file(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a statistics file; only its header is read. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if 0 < size <= _MAX_HEADER_BYTES else b""
    try:
        fields = msgspec.json.decode(header, type=dict[str, dict[str, object]])
    except (msgspec.DecodeError, RecursionError):
        return False
    return METADATA_KEY in fields.get("__metadata__", {})
