"""Records in the metadata of an ONNX model: JSON objects with the key `schema_version` and the fields of a `Record`."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, TypeVar

import msgspec

from ryzen_compile.errors import ModelError, printable
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

_R = TypeVar("_R", bound=Record)

_VERSION_FIELD = "schema_version"


def write_metadata(model: ir.Model, key: str, record: Record, *, schema_version: int) -> None:
    """Write `record` with its schema version to the metadata of `model` under `key`."""
    metadata: MutableMapping[str, str] = model.metadata_props
    metadata[key] = encode_metadata(record, schema_version=schema_version)


def read_metadata(model: ir.Model, key: str, type_: type[_R], *, schema_version: int) -> _R | None:
    """Return the record in the metadata of `model` under `key`, or None if the metadata has no such key.

    Raises:
        ModelError: The metadata has another schema version, or cannot be decoded.
    """
    metadata: Mapping[str, str] = model.metadata_props
    return decode_metadata(metadata[key], key, type_, schema_version=schema_version) if key in metadata else None


def encode_metadata(record: Record, *, schema_version: int) -> str:
    """Return the JSON of `record` and its schema version."""
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    return msgspec.json.encode({_VERSION_FIELD: schema_version, **fields}).decode()


def decode_metadata(text: str, key: str, type_: type[_R], *, schema_version: int) -> _R:
    """Return the record that `encode_metadata` wrote; raises ModelError, which names `key`, if `text` is not such a record."""
    hint = "export or rewrite the model again with this version of ryzen-compile"
    try:
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        version = msgspec.json.decode(fields.pop(_VERSION_FIELD), type=int) if _VERSION_FIELD in fields else None
        if version == schema_version:
            return msgspec.json.decode(msgspec.json.encode(fields), type=type_)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ModelError(f"the model's metadata `{key}` cannot be decoded: {printable(error)}", hint=hint) from error
    found = "no schema version" if version is None else f"schema version {version}"
    if version is not None and version > schema_version:
        hint = f"upgrade ryzen-compile, or {hint}"
    raise ModelError(
        f"the model's metadata `{key}` has {found}, but this ryzen-compile supports only version {schema_version}", hint=hint
    )
