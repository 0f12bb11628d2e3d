"""A test that the first steps of the README run in order in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SET_UP = ("make env", ". .venv/bin/activate")
"""The first lines, which create the environment that runs this test."""


@pytest.mark.slow
def test_the_first_steps_run_in_order_in_an_empty_folder(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## First steps")[2].partition("\n## ")[0]
    lines = [line.strip() for line in re.findall(r"^    (\S.*)$", section, flags=re.MULTILINE)]
    commands = [line.partition("#")[0].strip() for line in lines]
    assert commands[: len(SET_UP)] == list(SET_UP)
    assert all("#" in line for line in lines if not line.startswith(". "))
    environment = {**os.environ, "RYZEN_COMPILE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    for command in commands[len(SET_UP) :]:
        result = subprocess.run(
            shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert result.returncode == 0, f"{command}:\n{result.stderr}"
    assert {path.name for path in folder.iterdir()} == {"examples", "vision.onnx", "vision.ryzen", "both.ryzen"}
