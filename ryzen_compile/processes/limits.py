"""Limits of a child process on time and memory, and what a process and this machine use of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ResourceLimits:
    """Limits for one execution or compilation of a model in a child process."""

    memory_bytes: int | None = None
    """The maximum memory of the process, in bytes, at least 1; None: no limit."""
    seconds: float | None = None
    """The maximum duration, in seconds; None: no limit."""


class LimitMonitor:
    """Checks a process against limits, whose time begins with this object."""

    def __init__(self, limits: ResourceLimits) -> None:
        self._limits = limits
        self._started = time.monotonic()

    def violation(self, pid: int) -> tuple[str, str] | None:
        """Return the limit that the process exceeded and a hint, or None."""
        seconds, memory_bytes = self._limits.seconds, self._limits.memory_bytes
        if seconds is not None and time.monotonic() - self._started > seconds:
            return f"exceeded its time limit of {seconds:g} s", "increase --time-limit"
        if memory_bytes is not None and (used := unreclaimable_bytes(pid)) > memory_bytes:
            return (
                f"used {used / 1e9:.2f} GB of memory and exceeded its limit of {memory_bytes / 1e9:.2f} GB",
                "increase --memory-limit, or give smaller --max-shapes",
            )
        return None


def unreclaimable_bytes(pid: int) -> int:
    """Return the anonymous and shared memory of a process in bytes, which the kernel cannot reclaim; 0 if it has exited.

    Mapped files, such as libraries and weights, do not count: the kernel drops their pages when memory is short.
    """
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            fields = [line.split() for line in file if line.startswith(("RssAnon:", "RssShmem:"))]
    except OSError:
        return 0
    return sum(int(field[1]) * 1024 for field in fields)


def available_memory_bytes() -> int | None:
    """Return the memory that a new process can use without swapping: of the machine, or of the container if that is less.

    None if the operating system does not report it. Containers are those of cgroup v2 and v1.
    """
    available = _meminfo_bytes("MemAvailable")
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, usage = _read_bytes(limit_file), _read_bytes(usage_file)
        if limit is not None and usage is not None:
            free = max(0, limit - usage)
            available = free if available is None else min(available, free)
    return available


def _meminfo_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _read_bytes(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # `max`: no limit
