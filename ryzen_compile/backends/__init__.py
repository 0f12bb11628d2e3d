"""Backends: the runtimes that build and run graphs, one package each."""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the backends of this package by name."""
    return {name.replace("_", "-"): f"{__name__}.{name}.backend" for name in ("onnxruntime", "tensorrt", "tensorrt_rtx")}
