"""Recipes: one module per model, with its PyTorch module, export options and data."""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the members of the registry group `recipes`: every public module of this package."""
    from ryzen_compile.registry import modules_of

    return modules_of(__name__)
