"""Where a verb may write: never over its own source, nor over what is no ONNX file."""

from __future__ import annotations

import os

from ryzen_compile.errors import RyzenError, printable


def check_output(output: str, *, source: str | None = None) -> None:
    """Raise RyzenError where an ONNX file written to `output` would replace `source`, or a file that is none."""
    if not os.path.isfile(output):
        return  # a folder, or a folder that is not there, is for the one who writes to name
    if source is not None and os.path.exists(source) and os.path.samefile(output, source):
        raise RyzenError(f"`{printable(output)}` is the model itself, which would be replaced", hint="name another output")
    if os.path.getsize(output) and not _is_onnx(output):
        raise RyzenError(
            f"`{printable(output)}` is there and is not an ONNX file",
            hint="name another output, or remove it if nobody needs it",
        )


def _is_onnx(path: str) -> bool:
    from ryzen_compile.errors import ModelError
    from ryzen_compile.ir import protobuf_scan
    from ryzen_compile.ir.weight_files import resolve_model_file

    try:
        protobuf_scan.read_skeleton(resolve_model_file(path))
    except ModelError:
        return False
    return True
