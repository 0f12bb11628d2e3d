"""Freed memory is returned to the system."""

import subprocess
import sys

import pytest

SCRIPT = """
import os
from ryzen_compile.utils.heap import return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

blocks = [bytes(60_000) for _ in range(2_000)]
kept = blocks[::50]
del blocks
before = resident()
return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc returns freed memory on request")
def test_memory_between_allocations_is_returned() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 50_000_000
