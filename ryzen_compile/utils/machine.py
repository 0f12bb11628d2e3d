"""This machine: the name of its processor."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """Return the name of this machine's processor as the operating system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine() or "unknown processor"
