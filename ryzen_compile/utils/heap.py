"""The heap of this process."""

from __future__ import annotations

import ctypes
import gc


def return_freed_memory() -> None:
    """Return the memory that this process has freed to the system, where the C library can: with glibc."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
