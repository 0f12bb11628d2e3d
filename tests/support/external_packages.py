"""The package `tests/acme` outside of this tree, modified copies of it, and the program with such packages installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ACME = Path(__file__).parent.parent / "acme"


def run_program(
    *arguments: str | Path, cwd: Path, packages: tuple[Path, ...] = (ACME,), exit_code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `ryzen-compile` in the folder `cwd`, whose subfolder `cache` is its cache, with the distributions in `packages`."""
    command = [sys.executable, "-c", "from ryzen_compile.cli.main import main; main()", *map(str, arguments)]
    result = subprocess.run(
        command, env=environment(cwd, packages), cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert result.returncode == exit_code, result.stdout + result.stderr
    return result


def environment(cwd: Path, packages: tuple[Path, ...] = (ACME,)) -> dict[str, str]:
    """Return the environment of a process that finds `packages` and uses a cache in `cwd`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages)), "RYZEN_COMPILE_CACHE": str(cwd / "cache")}


def copy_acme(folder: Path, replacements: Mapping[str, tuple[str, str]]) -> Path:
    """Copy the package to `folder`, with the text `old` replaced by `new` in the files of {file name: (old, new)}."""
    for path in ACME.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            target = folder / path.relative_to(ACME)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8")
            old, new = replacements.get(path.name, ("", ""))
            assert old in text, f"{path} does not contain {old}"
            target.write_text(text.replace(old, new) if old else text, encoding="utf-8")
    return folder
