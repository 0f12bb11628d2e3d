"""A sample of the fuzzer's cases finds no failure, and the fuzzer detects every kind of failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

FAULTY_COMMAND = """
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import ryzen_compile.cli.main as program
from fuzzing import runner

def main(arguments):
    exec(arguments[0])

program.main = main
runner.become_subreaper()
runner._ORPHAN_SECONDS = 0.5
verdict = runner.run_case(runner.FuzzCase((sys.argv[2],), outputs=("allowed",)), Path(sys.argv[3]), seconds=2)
print(verdict.kind, "|", verdict.signature)
"""


@pytest.mark.parametrize(
    ("body", "kind", "cause"),
    [
        ("sys.exit(0)", "ok", ""),
        ("Path('allowed').mkdir(); Path('allowed/file').touch(); sys.exit(0)", "ok", ""),
        ("print('error: no', file=sys.stderr); sys.exit(1)", "refused", ""),
        ("print('error: no', file=sys.stderr); sys.exit(2)", "usage", ""),
        ("1 / 0", "traceback", "ZeroDivisionError"),
        ("print('error: internal error in x [internal-error]'); sys.exit(70)", "defect", "internal error"),
        ("print('error: failed [pass-failed]'); sys.exit(1)", "defect", "failed"),
        ("os.abort()", "abort", "SIGABRT"),
        ("bytearray(64 << 30)", "traceback", "MemoryError"),
        ("import time; time.sleep(60)", "hang", ""),
        ("sys.exit(3)", "exit", "exit code 3"),
        ("sys.exit(1)", "exit", "without a message"),
        ("Path('x').touch(); sys.exit(0)", "leftover", "x"),
        ("Path(os.environ['TMPDIR'], 'y').touch(); sys.exit(0)", "leftover", "tmp/y"),
        ("subprocess.Popen(['sleep', '60'], start_new_session=True); sys.exit(0)", "process", "sleep"),
    ],
)
def test_every_kind_of_failure_is_detected(tmp_path: Path, body: str, kind: str, cause: str) -> None:
    command = [sys.executable, "-c", FAULTY_COMMAND, str(BENCHMARKS), body, str(tmp_path)]
    completed = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=True)
    actual_kind, _, signature = completed.stdout.partition(" | ")
    assert actual_kind == kind
    assert cause in signature


@pytest.mark.slow
def test_a_sample_of_hostile_inputs_causes_no_failure(tmp_path: Path) -> None:
    counts = ["--models", "30", "--packages", "12", "--samples", "12", "--commands", "12"]
    command = [sys.executable, str(BENCHMARKS / "fuzz.py"), str(tmp_path), *counts, "--own-specimens"]
    completed = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600, check=False)
    assert completed.returncode == 0, completed.stdout[-4000:] + completed.stderr[-4000:]
    assert "models: 30 cases" in completed.stdout
    again = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=True)
    assert completed.stdout.endswith(again.stdout)
