"""The commands of the program: one module each, which defines `command` and the `SECTION` of `--help` that lists it."""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the commands of this package as {command name: module name}."""
    from ryzen_compile.registry import modules_of

    return modules_of(__name__)
