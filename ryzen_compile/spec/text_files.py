"""`TextFiles`: where the tokenizer of an ONNX model is, as recorded in the model's metadata."""

from __future__ import annotations

from ryzen_compile.utils.record import Record

METADATA_KEY = "ryzen_compile.text_files"
"""The key of the model metadata that holds the record as JSON."""
SCHEMA_VERSION = 1
"""The schema version of the record in the metadata."""


class TextFiles(Record, frozen=True):
    """The files of a model's tokenizer, in a folder next to the ONNX file."""

    folder: str
    """The name of the folder."""
    files: dict[str, str]
    """{file name: sha256}."""
