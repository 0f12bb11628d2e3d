"""Custom ops: one folder per op or op family, with its declaration, reference, kernel and README."""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the members of the registry group `ops`: every folder of this package."""
    from ryzen_compile.registry import modules_of

    return modules_of(__name__)
