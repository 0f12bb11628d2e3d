"""The passes of this example: every module of this package is one."""

from __future__ import annotations

from ryzen_compile.registry import modules_of


def members() -> dict[str, str]:
    """Return {pass name: module name}."""
    return modules_of(__name__)
