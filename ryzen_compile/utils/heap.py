"""The heap of this process."""

from __future__ import annotations

import ctypes
import gc


def return_freed_memory() -> None:
    """Return the memory that this process has freed to the system, and that of unreachable objects."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return the memory that this process has freed to the system, where the C library can: with glibc.

    It keeps freed blocks of less than 32 MB otherwise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
