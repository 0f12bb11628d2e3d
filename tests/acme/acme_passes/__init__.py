"""Passes of a third-party package, found through the entry point group `ryzen_compile.passes`."""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the passes of this package by name."""
    return {"acme-round-weights": f"{__name__}.round_weights", "acme-scale-weights": f"{__name__}.scale_weights"}
