"""The tokenizer of an ONNX model: files in a folder next to the model, listed with their digests in its metadata."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.errors import ModelError, RyzenError, printable
from ryzen_compile.spec.model_metadata import read_metadata, write_metadata
from ryzen_compile.spec.text_files import METADATA_KEY, SCHEMA_VERSION, TextFiles
from ryzen_compile.text.tokenizer import TEXT_FILES
from ryzen_compile.utils.atomic_file import write_atomic

if TYPE_CHECKING:
    import onnx_ir as ir

_MAX_FILE_BYTES = 1 << 30
"""The largest accepted file of a tokenizer."""


def text_folder_name(path: str | os.PathLike[str]) -> str:
    """Return the name of the folder for the tokenizer of the ONNX file at `path`: `model.text` for `model.onnx`."""
    return f"{Path(path).stem}.text"


def write_text_files(model: ir.Model, path: str | os.PathLike[str], files: Mapping[str, bytes], *, folder: str) -> None:
    """Write `files`, {name: content}, to `folder` next to `path`, where `model` will be saved, and record them in `model`.

    Raises RyzenError if a file cannot be written.
    """
    target = Path(path).parent / folder
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(target / name, content)
    except OSError as error:
        raise RyzenError(
            f"cannot write `{printable(target)}`: {error.strerror}", hint="choose a folder with write permission"
        ) from error
    record = TextFiles(folder=folder, files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    write_metadata(model, METADATA_KEY, record, schema_version=SCHEMA_VERSION)


def recorded_text_files(model: ir.Model) -> TextFiles | None:
    """Return where the tokenizer of `model` is; None if it has none. Raises ModelError if the record cannot be decoded."""
    return read_metadata(model, METADATA_KEY, TextFiles, schema_version=SCHEMA_VERSION)


def read_text_files(model: ir.Model, path: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return the files of the tokenizer of `model`, which was loaded from `path`, {name: content}; empty if it has none.

    Raises ModelError if the record is invalid, or if a file is missing or differs from it.
    """
    return read_recorded_files(recorded_text_files(model), path)


def read_recorded_files(record: TextFiles | None, path: str | os.PathLike[str]) -> dict[str, bytes]:
    """As `read_text_files`, of the model at `path` that contains `record`; empty for None."""
    if record is None:
        return {}
    if (
        Path(record.folder).name != record.folder
        or record.folder in ("", ".", "..")
        or not set(record.files) <= set(TEXT_FILES)
    ):
        raise ModelError(
            f"`{printable(path)}` lists tokenizer files with other names than {', '.join(TEXT_FILES)}",
            hint=f"export the model again, or delete the metadata property `{METADATA_KEY}`",
        )
    folder = Path(path).parent / record.folder
    return {name: _read_checked(folder / name, sha256, path) for name, sha256 in record.files.items()}


def _read_checked(file: Path, sha256: str, model: str | os.PathLike[str]) -> bytes:
    try:
        with open(file, "rb") as stream:
            content = stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ModelError(
            f"`{printable(model)}` needs its tokenizer file `{printable(file)}`: {error.strerror}",
            hint=f"copy the folder `{printable(file.parent.name)}` next to the model, or export the model again",
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ModelError(
            f"`{printable(file)}` is not the tokenizer file that `{printable(model)}` was exported with",
            hint="export the model again",
        )
    return content
