"""Limits of a child process on time and memory, and what a process and this machine use of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

_CGROUP_FILES = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""For cgroup v2 and v1: the folder, the files of the limit and of the usage, and the field of cached files in memory.stat."""


@dataclass(frozen=True, kw_only=True)
class ResourceLimits:
    """Limits for one execution or compilation of a model in a child process."""

    memory_bytes: int | None = None
    """The maximum memory of the process, in bytes, at least 1; None: no limit."""
    seconds: float | None = None
    """The maximum duration, in seconds; None: no limit."""


_inherited = ResourceLimits()


def inherited_limits() -> ResourceLimits:
    """Return the limits of this process, which is a child with limits, or no limits."""
    return _inherited


def inherit_limits(limits: ResourceLimits) -> None:
    """Make `limits` those of this process."""
    global _inherited
    _inherited = limits


class LimitMonitor:
    """Checks a process against limits, whose time begins with this object.

    Without a limit on memory, the limit is the memory that is available now.
    """

    def __init__(self, limits: ResourceLimits) -> None:
        self._limits = limits
        self._memory_bytes = limits.memory_bytes if limits.memory_bytes is not None else available_memory_bytes()
        self._started = time.monotonic()

    def violation(self, pid: int) -> tuple[str, str] | None:
        """Return the limit that the process exceeded and a hint, or None."""
        seconds = self._limits.seconds
        if seconds is not None and time.monotonic() - self._started > seconds:
            return f"exceeded its time limit of {seconds:g} s", "increase --time-limit"
        if self._memory_bytes is None or (used := unreclaimable_bytes(pid)) <= self._memory_bytes:
            return None
        used_text, limit_text = f"used {used / 1e9:.2f} GB of memory", f"{self._memory_bytes / 1e9:.2f} GB"
        if self._limits.memory_bytes is None:
            return f"{used_text}, more than the {limit_text} that were available", "free memory, or use smaller shapes"
        return f"{used_text} and exceeded its limit of {limit_text}", "increase --memory-limit, or use smaller shapes"


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


def raise_oom_score() -> None:
    """Make the kernel kill this process before its parent when the machine runs out of memory."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:
        return


def available_memory_bytes() -> int | None:
    """Return the memory that a new process can use without swapping: of the machine, or of the container if that is less.

    None if the operating system does not report it. Containers are those of cgroup v2 and v1.
    """
    available = _field_bytes("/proc/meminfo", "MemAvailable:", unit=1024)
    for folder, limit_name, usage_name, cache_name in _CGROUP_FILES:
        limit, usage = _read_bytes(f"{folder}/{limit_name}"), _read_bytes(f"{folder}/{usage_name}")
        if limit is None or usage is None:
            continue
        # The kernel drops cached files before a process runs out of memory.
        cache = _field_bytes(f"{folder}/memory.stat", cache_name) or 0
        free = max(0, limit - max(0, usage - cache))
        available = free if available is None else min(available, free)
    return available


def _field_bytes(path: str, field: str, *, unit: int = 1) -> int | None:
    """Return the number after `field` in a file of one field a line, times `unit`; None if there is none."""
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    return next((int(words[1]) * unit for words in lines if words[0] == field), None)


def _read_bytes(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # `max`: no limit
