"""The ops of Acme: every folder of this package is one."""

from __future__ import annotations

from ryzen_compile.registry import modules_of


def members() -> dict[str, str]:
    """Return {folder name: module name}."""
    return modules_of(__name__)
