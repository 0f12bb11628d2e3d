"""What a child leaves behind however it dies: the last thing it noted, and what its native libraries printed."""

from __future__ import annotations

import mmap
import os
import re
import tempfile

_PAGE = 4096
_TAIL = 1 << 14
_MOST_CHATTER = 1 << 20
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


class Recorder:
    """A page of shared memory that holds one line: noting costs no system call, and no crash loses it."""

    def __init__(self, fd: int) -> None:
        """Map the file `fd`, as `unlisted` makes it."""
        self._page = mmap.mmap(fd, _PAGE)

    def note(self, what: str) -> None:
        """Replace the line: `parsing node conv1 [Conv]`."""
        line = what.encode("utf-8", "replace")[: _PAGE - 1]
        self._page[: len(line) + 1] = line + b"\0"

    def read(self) -> str:
        """Return the line; empty when nothing was noted."""
        return self._page[:].partition(b"\0")[0].decode("utf-8", "replace")

    def close(self) -> None:
        """Unmap the page."""
        self._page.close()


def unlisted() -> int:
    """Return the descriptor of a new file of one zeroed page that is in no folder and goes with its last descriptor."""
    with tempfile.TemporaryFile() as file:
        file.truncate(_PAGE)
        return os.dup(file.fileno())


class Chatter:
    """What a process prints: a file that is its standard output and error, in no folder, with both ends able to read it."""

    def __init__(self, fd: int) -> None:
        """Read the file `fd`."""
        self._fd = fd

    def lines(self) -> list[str]:
        """Return the last lines that say anything, without colours."""
        size = os.fstat(self._fd).st_size
        text = os.pread(self._fd, _TAIL, max(0, size - _TAIL)).decode("utf-8", "replace")
        return [line.strip() for line in _COLOURS.sub("", text).splitlines() if line.strip()]

    def tail(self) -> str:
        """Return the very last of them, on one line; empty when nothing was printed."""
        return "; ".join(self.lines()[-4:])

    def forget(self) -> None:
        """Drop what was printed so far."""
        os.ftruncate(self._fd, 0)

    def bound(self) -> None:
        """Drop what was printed so far when it is much."""
        if os.fstat(self._fd).st_size > _MOST_CHATTER:
            self.forget()


def printed() -> int:
    """Return the descriptor of a new empty file for a process to print to, in no folder."""
    with tempfile.TemporaryFile(mode="a+b") as file:
        return os.dup(file.fileno())
