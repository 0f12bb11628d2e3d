"""Numbers of things in messages."""

from __future__ import annotations


def amount(count: int, noun: str) -> str:
    """Return a count with its noun, which forms its plural with an s: `1 document`, `2,048 documents`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
