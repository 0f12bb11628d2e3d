"""Calls that run in child processes, run in this process instead, where a test can replace what they use."""

from __future__ import annotations

import importlib
from typing import Any

from ryzen_compile.progress import Progress, SilentProgress


def call_here(function: str, argument: bytes, *, progress: Progress | None = None, **_: Any) -> bytes:
    """Do as `call_in_child`, in this process and without limits."""
    module, _, name = function.partition(":")
    result: bytes = getattr(importlib.import_module(module), name)(argument, progress or SilentProgress())
    return result
