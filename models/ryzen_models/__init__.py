"""Recipes: one model a file, with its module, its export and its data."""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the recipes of this room: every module."""
    from ryzen_compile.registry import modules_of

    return modules_of(__name__)
