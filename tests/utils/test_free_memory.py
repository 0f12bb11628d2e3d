"""Freed memory is returned to the operating system."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, psutil
from ryzen_compile.utils.free_memory import trim_heap

blocks = [bytearray(100_000) for _ in range(2000)]
del blocks[:-1]  # the last block is at the end of the heap, so that the free ones before it stay
before = psutil.Process(os.getpid()).memory_info().rss
trim_heap()
print(before - psutil.Process(os.getpid()).memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_free_blocks_of_the_heap_are_returned() -> None:
    completed = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(completed.stdout) > 100e6
