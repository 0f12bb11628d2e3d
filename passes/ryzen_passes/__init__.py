"""Graph rewrites: one pass a file, and the facts they speak of."""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the passes of this room: every module but `facts`."""
    from ryzen_compile.registry import modules_of

    return modules_of(__name__, besides=("facts",))
