"""Output paths: a file that is written replaces neither its own source nor a file of another kind.

Graphs are written to a folder only if its path is not that of a file.
"""

from __future__ import annotations

import os

from ryzen_compile.errors import ModelError, RyzenError, UsageError, printable
from ryzen_compile.utils.statistics_file import is_statistics_file


def check_output(output: str | os.PathLike[str], *, source: str | os.PathLike[str] | None = None) -> None:
    """Raise RyzenError if a graph written to `output` would replace `source` or an existing file that is not an ONNX file."""
    if _replaces_file(output, source) and not _is_onnx(output):
        raise RyzenError(
            f"`{printable(output)}` exists and is not an ONNX file",
            hint="give another output path, or remove the file",
        )


def check_statistics_output(output: str | os.PathLike[str], *, source: str | os.PathLike[str]) -> None:
    """Raise RyzenError if statistics written to `output` would replace `source` or an existing file without statistics."""
    if _replaces_file(output, source) and not is_statistics_file(output):
        raise RyzenError(
            f"`{printable(output)}` exists and holds no statistics", hint="give another output path, or remove the file"
        )


def _replaces_file(output: str | os.PathLike[str], source: str | os.PathLike[str] | None) -> bool:
    """Return whether `output` is a file with content. Raises RyzenError if it is `source`."""
    if not os.path.isfile(output):
        return False  # the code that writes the file reports an existing or a missing folder
    if source is not None and os.path.exists(source) and os.path.samefile(output, source):
        raise RyzenError(f"`{printable(output)}` is the model itself and would be overwritten", hint="give another output path")
    return os.path.getsize(output) > 0


def check_output_folder(folder: str | os.PathLike[str]) -> None:
    """Raise UsageError if `folder` exists and is not a folder."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UsageError(f"`{printable(folder)}` exists and is not a folder", hint="name a folder to write the graphs to")


def _is_onnx(path: str | os.PathLike[str]) -> bool:
    from ryzen_compile.ir import protobuf_scan
    from ryzen_compile.ir.weight_files import resolve_model_file

    try:
        protobuf_scan.read_skeleton(resolve_model_file(path))
    except ModelError:
        return False
    return True
