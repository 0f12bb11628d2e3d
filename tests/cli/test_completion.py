"""Tests of the completion of values in a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = str(Path(sys.executable).with_name("ryzen-compile"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["build", "--gpu", "rtx40"], "rtx4090"),
        (["build", "--gpu", "cpu,sm8"], "cpu,sm89"),
        (["build", "--passes", "fold,atten"], "fold,attention"),
        (["export", "mini"], "minilm"),
        (["export", "minilm", "dec/", "--passes", "fold,atten"], "fold,attention"),
        (["rewrite", "--passes", "fold,atten"], "fold,attention"),
    ],
)
def test_values_are_completed(words: list[str], expected: str) -> None:
    environment = {
        **os.environ,
        "_RYZEN_COMPILE_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["ryzen-compile", *words]),
        "COMP_CWORD": str(len(words)),
    }
    result = subprocess.run([PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert f"plain,{expected}" in result.stdout.splitlines(), result.stdout + result.stderr
