"""Pages of mapped files are released, and modified ones are kept."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from ryzen_compile.utils.mapped_pages import release_mapped_pages

SIZE = 64 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def map_file(path: Path) -> np.ndarray:
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with open(path, "r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE), np.uint8)


def resident_bytes() -> int:
    return psutil.Process(os.getpid()).memory_info().rss


def test_unmodified_pages_are_released_and_read_again(tmp_path: Path) -> None:
    array = map_file(tmp_path / "weights")
    total = int(array.sum(dtype=np.int64))
    before = resident_bytes()
    assert release_mapped_pages([array.ctypes.data + SIZE // 2]) >= SIZE
    assert before - resident_bytes() > SIZE * 0.9
    assert int(array.sum(dtype=np.int64)) == total


def test_modified_pages_are_kept(tmp_path: Path) -> None:
    array = map_file(tmp_path / "weights")
    array[5] = 99
    assert release_mapped_pages([array.ctypes.data]) == 0
    assert array[5] == 99


def test_memory_of_no_file_and_other_mappings_are_left(tmp_path: Path) -> None:
    mapped, own = map_file(tmp_path / "weights"), np.ones(SIZE, np.uint8)
    assert mapped[0] == 0
    assert release_mapped_pages([own.ctypes.data, 0]) == 0
    assert own.all()
