"""Small builds to store in a cache, and a progress object that records its messages."""

from __future__ import annotations

from pathlib import Path

from ryzen_compile.artifacts.cache.key import CacheKey
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.progress import SilentProgress
from ryzen_compile.utils.files import hash_file


class RecordingProgress(SilentProgress):
    """Records all diagnostics, also as text without severity and code."""

    def __init__(self) -> None:
        self.diagnostics: list[Diagnostic] = []
        self.lines: list[str] = []

    def report(self, diagnostic: Diagnostic) -> None:
        """Record `diagnostic`."""
        self.diagnostics.append(diagnostic)
        self.lines.append(str(diagnostic))


def cache_key(name: str, **more: str) -> CacheKey:
    """Return the cache key of a build of the graph `name`, with additional parts `more`."""
    return CacheKey("package", {"graph model": name, "targets": "sm86", **more})


def write_files(folder: Path, contents: dict[str, bytes]) -> dict[str, str]:
    """Write new files to `folder`, as a build does, and return their sha256 by path."""
    for path, data in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).unlink(missing_ok=True)
        (folder / path).write_bytes(data)
    return {path: hash_file(folder / path, "sha256") for path in contents}


def put_build(store: Store, folder: Path, name: str, size: int = 3000) -> dict[str, bytes]:
    """Store a build of `name`: an engine of `size` bytes that depends on `name`, and weights that all builds share."""
    contents = {"engines/m.plan": name.encode() * (size // len(name)), "graphs/weights/w": b"weights" * 100}
    assert store.put(cache_key(name), folder, write_files(folder, contents), b'{"name": "toy"}')
    return contents


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below `folder` by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
