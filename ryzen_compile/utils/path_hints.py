"""Hints for paths that are not what was expected: what is there instead, or the path that was probably meant."""

from __future__ import annotations

import difflib
import itertools
import os
from pathlib import Path

from ryzen_compile.errors import printable

_MAX_ENTRIES = 2000
"""The maximum number of entries of a folder that are considered."""
_MIN_SIMILARITY = 0.75
"""The smallest similarity of two names, between 0 and 1, at which one is suggested for the other."""


def is_hugging_face_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder with a configuration and weights, or a GGUF file, that `hf:` reads."""
    names = set(_names(Path(path)))
    suffixes = {os.path.splitext(name)[1] for name in names}
    return ("config.json" in names and ".safetensors" in suffixes) or ".gguf" in suffixes


def similar_path(path: str | os.PathLike[str]) -> str | None:
    """Return a path in the folder of `path`, which does not exist, with a similar name; None: there is none."""
    wanted = Path(path)
    matches = difflib.get_close_matches(wanted.name, _names(wanted.parent), n=1, cutoff=_MIN_SIMILARITY)
    return str(wanted.parent / matches[0]) if matches else None


def missing_path_hint(path: str | os.PathLike[str], otherwise: str) -> str:
    """Return the hint for a path that does not exist: a path like it, or `otherwise`."""
    found = similar_path(path)
    return f"did you mean `{printable(found)}`?" if found is not None else otherwise


def folder_content_hint(folder: str | os.PathLike[str], otherwise: str) -> str:
    """Return how to refer to a folder that is not a package: one of Hugging Face, or one of ONNX files; else `otherwise`."""
    path = printable(folder)
    if is_hugging_face_folder(folder):
        return f"it is a Hugging Face folder: hf:{path} as a baseline; for a package, ryzen-compile export hf:{path} first"
    if any(name.endswith(".onnx") for name in _names(Path(folder))):
        return f"it holds ONNX files: make a package of them with ryzen-compile build {path}"
    return otherwise


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in itertools.islice(entries, _MAX_ENTRIES)]
    except (OSError, ValueError):
        return []
