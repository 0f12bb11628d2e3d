"""Release of memory that holds pages of mapped files: they are read again from the file when they are used."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

_MADV_DONTNEED = 4
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) [0-9a-f]+ \S+ (\d+)")


class _Mapping(NamedTuple):
    start: int
    end: int
    is_clean_file: bool
    """Whether all its pages are those of a file, unmodified."""


def release_mapped_pages(addresses: Iterable[int]) -> int:
    """Release the pages of the file mappings of this process that contain `addresses`; return the bytes of the mappings.

    Mappings with modified pages are left as they are: releasing them would lose the modifications. No other thread may modify
    them meanwhile. Does nothing on systems other than Linux.
    """
    if not sys.platform.startswith("linux"):
        return 0
    wanted = sorted(addresses)
    released = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for mapping in _mappings():
        if mapping.is_clean_file and any(mapping.start <= address < mapping.end for address in wanted):
            size = mapping.end - mapping.start
            if libc.madvise(ctypes.c_void_p(mapping.start), ctypes.c_size_t(size), _MADV_DONTNEED) == 0:
                released += size
    return released


def _mappings() -> list[_Mapping]:
    mappings: list[_Mapping] = []
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            if header := _HEADER.match(line):
                start, end, _, inode = header.groups()
                mappings.append(_Mapping(int(start, 16), int(end, 16), is_clean_file=inode != "0"))
            elif line.startswith("Anonymous:") and line.split()[1] != "0":
                mappings[-1] = mappings[-1]._replace(is_clean_file=False)
    return mappings
