"""The benchmarks of decoders run from end to end; their quick mode uses tiny sizes and checks no bound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(("name", "last_line"), [("decode", "the last tenth takes"), ("frontier", "kvzap")])
def test_a_benchmark_runs_in_quick_mode(name: str, last_line: str) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert last_line in result.stdout
