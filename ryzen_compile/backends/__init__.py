"""Backends: the runtimes that build engines and run graphs, one package per backend."""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the backends of this package as {backend name: module name}."""
    return {name.replace("_", "-"): f"{__name__}.{name}.backend" for name in ("onnxruntime", "tensorrt", "tensorrt_rtx")}
