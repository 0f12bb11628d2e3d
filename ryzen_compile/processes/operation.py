"""The current operation of a child process, which the parent reads if the child crashes or hangs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ryzen_compile.processes.crash_breadcrumb import CrashBreadcrumb

_breadcrumb: CrashBreadcrumb | None = None
_current = ""


def record_operations(breadcrumb: CrashBreadcrumb) -> None:
    """Record the operations of this process in `breadcrumb` from now on."""
    global _breadcrumb
    _breadcrumb = breadcrumb


@contextmanager
def performing(operation: str) -> Iterator[None]:
    """Record `operation`, such as `running model.onnx on ids 8x128`, for the duration of a `with` block.

    After an exception the operation remains recorded: it is the one that failed. In a process that is no child, nothing is
    recorded.
    """
    global _current
    previous, _current = _current, operation
    _write()
    yield
    _current = previous
    _write()


def _write() -> None:
    if _breadcrumb is not None:
        _breadcrumb.write(_current)
