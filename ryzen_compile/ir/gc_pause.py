"""Pause of the cyclic garbage collector while a whole graph is built or read.

Each collection would traverse all nodes that were allocated so far, which makes the total cost quadratic.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable garbage collection within the block, and restore the previous setting at its end."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
