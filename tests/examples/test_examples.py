"""Tests that every example runs in an empty folder, and the notebook cell by cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_python(arguments: list[str], folder: Path) -> str:
    """Run Python in `folder` with a cache of its own, and return what it prints."""
    environment = {**os.environ, "RYZEN_COMPILE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


SCRIPTS = {
    "encoder.py": "'seq': '1..64'",
    "vision.py": "MET: ",
    "audio.py": "'time': '400..16000'",
    "llm.py": "b'",
    "own_pass/run.py": "square-by-mul: squares computed by Mul: 1",
}
"""Script -> a part of what it prints."""
NOTEBOOK = "first_package.ipynb"
DEMO = "demo.py"
"""What `make demo` runs: it needs the weights of MiniLM, and `tests/models` runs the same steps on them."""


@pytest.mark.slow
@pytest.mark.parametrize(("script", "expected"), SCRIPTS.items())
def test_a_script_runs_in_an_empty_folder(script: str, expected: str, tmp_path: Path) -> None:
    assert expected in run_python([str(EXAMPLES / script)], tmp_path)


@pytest.mark.slow
def test_the_notebook_runs_cell_by_cell(tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / NOTEBOOK).read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    run_python(["-c", "\n".join([*cells, "assert tuple(outputs.shape) == (8, 4)"])], tmp_path)


def test_every_example_is_run() -> None:
    found = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*/run.py"), *EXAMPLES.glob("*.ipynb")]
    assert {str(path.relative_to(EXAMPLES)) for path in found} == {*SCRIPTS, NOTEBOOK, DEMO}
