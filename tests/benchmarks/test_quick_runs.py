"""The benchmarks of decoders run from end to end; their quick mode uses tiny sizes and checks no bound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(("name", "result"), [("decode", "the last tenth takes"), ("frontier", "'perplexity-ratio': ")])
def test_a_benchmark_runs_in_quick_mode(name: str, result: str) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert result in completed.stdout
