"""Valid packages that the fuzzer mutates or reads data into; they are built once in a forked process."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from fuzzing.specimens import own_specimens

NAMES = ("linear", "decoder", "sequences")
"""The specimens of which packages are built."""


@functools.cache
def packages() -> Path:
    """Return a folder with a package NAME.ryzen and its tar NAME.tar of each specimen in `NAMES`."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-packages-"))
    atexit.register(_remove, folder, os.getpid())
    for name in NAMES:
        (folder / f"{name}.onnx").write_bytes(own_specimens()[name])
        _run_forked(["build", str(folder / f"{name}.onnx"), "--gpu", "cpu", "--no-cache", "-q"])
        _run_forked(["pack", str(folder / f"{name}.ryzen"), str(folder / f"{name}.tar"), "-q"])
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _run_forked(arguments: list[str]) -> None:
    """Run a command in a forked process: this one must start no threads."""
    child = os.fork()
    if not child:
        code = 99
        try:
            from ryzen_compile.cli.main import run

            code = run(arguments)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"ryzen-compile {' '.join(arguments)} failed with wait status {status}")
