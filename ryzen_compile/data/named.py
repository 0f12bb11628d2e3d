"""Samples by name, as `--data` takes them: FILE.npz, a folder of them, FILE.py[:FUNCTION] or recipe:NAME."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.errors import UsageError
from ryzen_compile.script import names_script, split

if TYPE_CHECKING:
    from ryzen_compile.data.sources import Samples
    from ryzen_compile.interface import Interface


def named(text: str, interface: Interface, *, seed: int) -> Samples:
    """Return the samples that `text` names, held to `interface`; raises UsageError for what names none."""
    from ryzen_compile.data.sources import from_npz, from_recipe, from_script

    if text.startswith("recipe:"):
        return from_recipe(registry.find_recipe(text.removeprefix("recipe:")), seed=seed)
    if names_script(text):
        return from_script(text, interface)
    if Path(text).suffix == ".npz" or Path(text).is_dir():
        return from_npz(text, interface)
    raise UsageError(f"`{text}` names no samples", hint="give FILE.npz, a folder of them, FILE.py[:FUNCTION] or recipe:NAME")


def digest(text: str | None, *, seed: int) -> str:
    """Return in short what decides the samples that `text` names: its bytes, or the seed; for keys, not for eyes."""
    if text is None or text.startswith("recipe:"):
        return f"{text or 'seeded'}, seed {seed}"
    import blake3

    digest = blake3.blake3()
    for file in _files(text):
        digest.update(file.read_bytes())
    return f"{Path(text).name} {digest.hexdigest()[:16]}, seed {seed}"


def _files(text: str) -> Iterable[Path]:
    path = Path(split(text)[0])
    return sorted(path.glob("*.npz")) if path.is_dir() else [path] if path.is_file() else []
