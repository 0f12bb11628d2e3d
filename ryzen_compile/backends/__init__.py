"""Backends: the runtimes that build engines and run graphs, one package per backend."""

from __future__ import annotations

from pathlib import Path


def members() -> dict[str, str]:
    """Return {backend name: module name}: every package here that has a `backend.py`."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/backend.py"))
    return {name.replace("_", "-"): f"{__name__}.{name}.backend" for name in folders}
