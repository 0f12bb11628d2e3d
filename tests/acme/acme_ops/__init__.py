"""The ops of another house: what a package of its own must bring, and no more."""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the ops of this package."""
    from ryzen_compile.registry import modules_of

    return modules_of(__name__)
