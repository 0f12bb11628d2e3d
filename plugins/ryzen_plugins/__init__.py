"""Custom ops: one folder each, with its declaration, its meaning and its page."""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the ops of this room: every folder."""
    from ryzen_compile.registry import modules_of

    return modules_of(__name__)
