"""A minimal third-party package of ops, for tests."""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the members of the registry group `ops`: every folder of this package."""
    from ryzen_compile.registry import modules_of

    return modules_of(__name__)
