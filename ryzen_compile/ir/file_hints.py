"""Hints for paths that are not ONNX files: how to make an ONNX file of what is there."""

from __future__ import annotations

import os
from pathlib import Path

from ryzen_compile.utils.path_hints import missing_path_hint

_EXPORT = "ryzen-compile export FILE.py:FUNCTION model.onnx"
_HINT_BY_SUFFIX = {
    **dict.fromkeys(
        (".pt", ".pth", ".bin", ".ckpt"),
        f"load it in a function that returns (module, inputs), and export that: {_EXPORT}",
    ),
    **dict.fromkeys(
        (".safetensors", ".gguf"),
        f"it holds weights without a graph: load them in a function that returns (module, inputs), and export that: {_EXPORT}",
    ),
    **dict.fromkeys((".engine", ".plan"), "an engine cannot be converted: give the ONNX file that it was built from"),
    **dict.fromkeys((".pb", ".h5", ".keras", ".tflite"), "convert it to ONNX first, with tf2onnx"),
}


def model_file_hint(path: str, default: str) -> str:
    """Return the hint for a path that was given as an ONNX file and is none; `default` if nothing is known about it."""
    from ryzen_compile import registry

    file = Path(path)
    reference = os.path.relpath(file)
    if file.suffix == ".py":
        return f"export its module first: ryzen-compile export {reference}:FUNCTION model.onnx"
    if registry.is_module_reference(reference):
        return f"export it first: ryzen-compile export {reference} model.onnx"
    if file.suffix in _HINT_BY_SUFFIX:
        return _HINT_BY_SUFFIX[file.suffix]
    if not file.exists() and not file.suffix and file.name in registry.names("recipes"):
        return f"export the recipe first: ryzen-compile export {file.name} {file.name}.onnx"
    return default if file.exists() else missing_path_hint(reference, default)
