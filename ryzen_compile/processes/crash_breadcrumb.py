"""Crash diagnostics of a child process: its current operation and its output, which the parent can read after a crash."""

from __future__ import annotations

import mmap
import os
import re
import tempfile

_PAGE_BYTES = 4096
_TAIL_BYTES = 1 << 14
_MAX_OUTPUT_BYTES = 1 << 20
_ANSI_COLORS = re.compile("\x1b\\[[0-9;]*m")


class CrashBreadcrumb:
    """The current operation of a child process, as one line in a page of memory that it shares with its parent.

    The line is written without a system call and remains readable after the child process has crashed.
    """

    def __init__(self, fd: int) -> None:
        """Map the file `fd`, created by `make_breadcrumb_file`."""
        self._page = mmap.mmap(fd, _PAGE_BYTES)

    def write(self, message: str) -> None:
        """Replace the line, such as `parsing node conv1 [Conv]`; at most 4095 bytes are kept."""
        line = message.encode("utf-8", "replace")[: _PAGE_BYTES - 1]
        self._page[: len(line) + 1] = line + b"\0"

    def read(self) -> str:
        """Return the line; the empty string if none was written."""
        return self._page[:].partition(b"\0")[0].decode("utf-8", "replace")

    def close(self) -> None:
        """Unmap the page."""
        self._page.close()


def make_breadcrumb_file() -> int:
    """Return the descriptor of a new unlinked file of one zeroed page, freed with its last descriptor."""
    with tempfile.TemporaryFile() as file:
        file.truncate(_PAGE_BYTES)
        return os.dup(file.fileno())


class ChildOutput:
    """The standard output and error of a child process: an unlinked file that parent and child can both read."""

    def __init__(self, fd: int) -> None:
        """Use the file `fd`, created by `make_output_file`."""
        self._fd = fd

    def lines(self) -> list[str]:
        """Return the non-empty lines of the last 16 KiB, without ANSI colors."""
        size = os.fstat(self._fd).st_size
        text = os.pread(self._fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode("utf-8", "replace")
        return [line.strip() for line in _ANSI_COLORS.sub("", text).splitlines() if line.strip()]

    def tail(self) -> str:
        """Return the last four lines joined into one; the empty string if nothing was printed."""
        return "; ".join(self.lines()[-4:])

    def clear(self) -> None:
        """Discard the output so far."""
        os.ftruncate(self._fd, 0)

    def clear_if_large(self) -> None:
        """Discard the output so far if it exceeds 1 MiB."""
        if os.fstat(self._fd).st_size > _MAX_OUTPUT_BYTES:
            self.clear()


def make_output_file() -> int:
    """Return the descriptor of a new, empty, unlinked file for the output of a process."""
    with tempfile.TemporaryFile(mode="a+b") as file:
        return os.dup(file.fileno())
