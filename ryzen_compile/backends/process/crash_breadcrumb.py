"""What a child leaves behind however it dies: the last thing it noted, and what its native libraries printed."""

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
    """A page of shared memory that holds one line: noting costs no system call, and no crash loses it."""

    def __init__(self, fd: int) -> None:
        """Map the file `fd`, as `unlisted` makes it."""
        self._page = mmap.mmap(fd, _PAGE_BYTES)

    def write(self, message: str) -> None:
        """Replace the line: `parsing node conv1 [Conv]`."""
        line = message.encode("utf-8", "replace")[: _PAGE_BYTES - 1]
        self._page[: len(line) + 1] = line + b"\0"

    def read(self) -> str:
        """Return the line; empty when nothing was noted."""
        return self._page[:].partition(b"\0")[0].decode("utf-8", "replace")

    def close(self) -> None:
        """Unmap the page."""
        self._page.close()


def make_breadcrumb_file() -> int:
    """Return the descriptor of a new file of one zeroed page that is in no folder and goes with its last descriptor."""
    with tempfile.TemporaryFile() as file:
        file.truncate(_PAGE_BYTES)
        return os.dup(file.fileno())


class ChildOutput:
    """What a process prints: a file that is its standard output and error, in no folder, with both ends able to read it."""

    def __init__(self, fd: int) -> None:
        """Read the file `fd`."""
        self._fd = fd

    def lines(self) -> list[str]:
        """Return the last lines that say anything, without colours."""
        size = os.fstat(self._fd).st_size
        text = os.pread(self._fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode("utf-8", "replace")
        return [line.strip() for line in _ANSI_COLORS.sub("", text).splitlines() if line.strip()]

    def tail(self) -> str:
        """Return the very last of them, on one line; empty when nothing was printed."""
        return "; ".join(self.lines()[-4:])

    def clear(self) -> None:
        """Drop what was printed so far."""
        os.ftruncate(self._fd, 0)

    def clear_if_large(self) -> None:
        """Drop what was printed so far when it is much."""
        if os.fstat(self._fd).st_size > _MAX_OUTPUT_BYTES:
            self.clear()


def make_output_file() -> int:
    """Return the descriptor of a new empty file for a process to print to, in no folder."""
    with tempfile.TemporaryFile(mode="a+b") as file:
        return os.dup(file.fileno())
