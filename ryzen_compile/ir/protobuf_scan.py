"""A scanner of the protobuf wire format of ONNX files that separates the structure from the weights without reading weights.

It knows only the fields of onnx.proto that lead to tensors. `read_skeleton` returns the file without the bytes of its large
tensors and without its references to external data files; `assemble` is the inverse.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ryzen_compile.errors import ModelError, printable
from ryzen_compile.ir.file_hints import model_file_hint
from ryzen_compile.ir.weight_files import WeightFile

LARGE_TENSOR_BYTES = 1024
"""Raw data of at least this size stays in the file."""
_MAX_NESTING = 100
"""The maximum nesting depth of messages, equal to protobuf's own limit."""
MAX_PROTO_BYTES = 2**31 - 1
"""The maximum size of a protobuf message."""
_WINDOW_BYTES = 1 << 16

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5

# For each message type the fields that lead to a tensor: {field number: message type}.
_TENSOR_MESSAGE = "TensorProto"
_CHILD_MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR_MESSAGE},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {5: _TENSOR_MESSAGE, 6: "GraphProto", 10: _TENSOR_MESSAGE, 11: "GraphProto"},
}
_MIN_SCAN_BYTES = {_TENSOR_MESSAGE: LARGE_TENSOR_BYTES, "NodeProto": 16384, "AttributeProto": 16384}
"""Messages below this size are copied unscanned unless they refer to an external data file: most nodes hold no weights."""
_MODEL_WIRE_TYPES = {1: _VARINT, 5: _VARINT} | dict.fromkeys((2, 3, 4, 6, 7, 8, 14, 20, 25, 26), _LENGTH_DELIMITED)
_GRAPH_FIELD, _OPSET_IMPORT_FIELD = 7, 8
_NAME_FIELD, _RAW_DATA_FIELD, _EXTERNAL_DATA_FIELD, _DATA_LOCATION_FIELD = 8, 9, 13, 14

_LOCATION_KEY = b"location"
_PLACEHOLDER_PREFIX = "\0weight "
"""The prefix of the location of a placeholder; no file name can contain a null byte."""


class TensorLocation(NamedTuple):
    """The storage location of a tensor's bytes."""

    tensor_name: str
    location: str | None
    """The external data file as the tensor names it; None for the ONNX file itself."""
    offset: int
    """In bytes."""
    length: int | None
    """In bytes; None if the file does not specify it."""


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights."""

    proto: bytes
    """A ModelProto whose large and external tensors are placeholders: see `placeholder`."""
    tensor_locations: tuple[TensorLocation, ...]
    """The location of the tensor that each placeholder represents, by placeholder index."""


class WeightSpan(NamedTuple):
    """A range of an assembled file that holds the bytes of a tensor."""

    weight_index: int
    length: int
    """In bytes."""


def placeholder(index: int) -> str:
    """Return the location of the external tensor that represents weight `index`."""
    return f"{_PLACEHOLDER_PREFIX}{index}"


def placeholder_index(location: str) -> int | None:
    """Return the index of the weight that `location` represents, or None if `location` is a file name."""
    return int(location.removeprefix(_PLACEHOLDER_PREFIX)) if location.startswith(_PLACEHOLDER_PREFIX) else None


class _MalformedModel(Exception):
    """The bytes are not a complete ONNX model; the text is the reason."""


class _ProtoReader(Protocol):
    """Random access to the bytes of a message through a window."""

    window: bytes
    window_offset: int

    def move_window(self, offset: int) -> None:
        """Move the window so that it holds at least the 20 bytes from `offset`, or all bytes up to the end if fewer."""
        ...

    def read(self, start: int, end: int) -> bytes: ...


class _FileReader:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.window = b""
        self.window_offset = 0

    def move_window(self, offset: int) -> None:
        self.window, self.window_offset = os.pread(self.descriptor, _WINDOW_BYTES, offset), offset

    def read(self, start: int, end: int) -> bytes:
        begin = start - self.window_offset
        if begin >= 0 and end - self.window_offset <= len(self.window):
            return self.window[begin : end - self.window_offset]
        content = bytearray()
        while start + len(content) < end:
            chunk = os.pread(self.descriptor, end - start - len(content), start + len(content))
            if not chunk:
                raise _MalformedModel("the file was truncated while it was read")
            content += chunk
        return bytes(content)


class _BytesReader:
    def __init__(self, content: bytes) -> None:
        self.window = content
        self.window_offset = 0

    def move_window(self, offset: int) -> None:
        pass

    def read(self, start: int, end: int) -> bytes:
        return self.window[start:end]


class _Field(NamedTuple):
    number: int
    wire_type: int
    value: int
    """The value of a varint field; the payload length of a length-delimited field."""
    start: int
    """The offset of the field's tag."""
    payload_start: int
    end: int


def _iter_fields(reader: _ProtoReader, start: int, end: int) -> Iterator[_Field]:
    """Yield the fields of the message at [start, end)."""
    offset = start
    while offset < end:
        if offset < reader.window_offset or offset + 20 > reader.window_offset + len(reader.window):
            reader.move_window(offset)
        window, index = reader.window, offset - reader.window_offset
        try:
            tag, index = _decode_varint(window, index)
            number, wire_type, value = tag >> 3, tag & 7, 0
            if wire_type in (_VARINT, _LENGTH_DELIMITED):
                value, index = _decode_varint(window, index)
        except IndexError:
            raise _MalformedModel("the file ends within a field") from None
        payload_start = reader.window_offset + index
        field_end = payload_start + (
            value if wire_type == _LENGTH_DELIMITED else 8 if wire_type == _FIXED64 else 4 if wire_type == _FIXED32 else 0
        )
        if wire_type not in (_VARINT, _LENGTH_DELIMITED, _FIXED64, _FIXED32) or not 0 < number < 1 << 29:
            raise _MalformedModel(f"byte {offset} does not begin a field of a protobuf message")
        if field_end > end:
            raise _MalformedModel(f"the field at byte {offset} ends at byte {field_end}, but its message ends at byte {end}")
        yield _Field(number, wire_type, value, offset, payload_start, field_end)
        offset = field_end


def _decode_varint(window: bytes, index: int) -> tuple[int, int]:
    value = window[index]
    index += 1
    if value < 0x80:
        return value, index
    value &= 0x7F
    for shift in range(7, 70, 7):
        byte = window[index]
        index += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, index
    raise _MalformedModel("a varint has more than 10 bytes")


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _encode_bytes_field(number: int, payload: bytes) -> bytes:
    return _encode_varint(number << 3 | _LENGTH_DELIMITED) + _encode_varint(len(payload)) + payload


_Segments = list[bytes | WeightSpan]


def total_bytes(segments: Sequence[bytes | WeightSpan]) -> int:
    """Return the total size of `segments` in bytes."""
    return sum(segment.length if isinstance(segment, WeightSpan) else len(segment) for segment in segments)


class _MessageRewriter:
    """Copies a message and replaces tensors in it."""

    def __init__(
        self,
        reader: _ProtoReader,
        should_descend: Callable[[str, int, int], bool],
        replace_tensor: Callable[[int, int], _Segments | None],
    ) -> None:
        self.reader = reader
        self.should_descend = should_descend
        """Tells whether to scan the message of a type at [start, end)."""
        self.replace_tensor = replace_tensor
        """Returns the replacement of the tensor at [start, end), or None to keep it."""

    def rewrite(self, message_type: str, start: int, end: int, depth: int = 0) -> _Segments:
        if depth > _MAX_NESTING:
            raise _MalformedModel(f"its messages are nested more than {_MAX_NESTING} levels deep")
        child_types, segments, copied_until = _CHILD_MESSAGES[message_type], _Segments(), start
        for field in _iter_fields(self.reader, start, end):
            child_type = child_types.get(field.number)
            if (
                child_type is None
                or field.wire_type != _LENGTH_DELIMITED
                or not self.should_descend(child_type, field.payload_start, field.end)
            ):
                continue
            replacement: _Segments | None
            if child_type == _TENSOR_MESSAGE:
                replacement = self.replace_tensor(field.payload_start, field.end)
            else:
                replacement = self.rewrite(child_type, field.payload_start, field.end, depth + 1)
            if replacement is not None:
                segments.append(self.reader.read(copied_until, field.start))
                segments.append(
                    _encode_varint(field.number << 3 | _LENGTH_DELIMITED) + _encode_varint(total_bytes(replacement))
                )
                segments.extend(replacement)
                copied_until = field.end
        segments.append(self.reader.read(copied_until, end))
        return segments


def read_skeleton(file: WeightFile) -> Skeleton:
    """Read the skeleton of an ONNX file.

    Raises:
        ModelError: The file is not an ONNX file, is incomplete, or has a tensor with contradictory fields.
    """
    with file.open() as descriptor:
        try:
            return _read_skeleton(descriptor)
        except _MalformedModel as error:
            path = printable(file.path)
            if os.pread(descriptor, 64, 0).startswith(b"version https://git-lfs"):
                raise ModelError(f"`{path}` is a Git LFS pointer, not the model", hint="run `git lfs pull`") from None
            raise ModelError(
                f"`{path}` is not an ONNX file, or is incomplete: {error}",
                hint=model_file_hint(file.path, "export the model to ONNX again, or copy the whole file"),
            ) from None


def _read_skeleton(descriptor: int) -> Skeleton:
    size = os.fstat(descriptor).st_size
    reader = _FileReader(descriptor)
    _check_is_model(reader, size)
    locations: list[TensorLocation] = []

    def should_descend(message_type: str, start: int, end: int) -> bool:
        return end - start >= _MIN_SCAN_BYTES.get(message_type, 0) or _LOCATION_KEY in reader.read(start, end)

    def replace_tensor(start: int, end: int) -> _Segments | None:
        location, remaining_fields = _extract_location(reader, start, end)
        if location is None:
            return None
        locations.append(location)
        return [remaining_fields, *external_data_fields(placeholder(len(locations) - 1), 0, None)]

    segments = _MessageRewriter(reader, should_descend, replace_tensor).rewrite("ModelProto", 0, size)
    if (total := total_bytes(segments)) > MAX_PROTO_BYTES:
        raise _MalformedModel(f"without weights it has {total} bytes, more than protobuf's maximum of {MAX_PROTO_BYTES}")
    return Skeleton(b"".join(segment for segment in segments if isinstance(segment, bytes)), tuple(locations))


def _check_is_model(reader: _ProtoReader, size: int) -> None:
    field_numbers = set()
    for field in _iter_fields(reader, 0, size):
        if _MODEL_WIRE_TYPES.get(field.number, field.wire_type) != field.wire_type:
            raise _MalformedModel(f"byte {field.start} does not begin a field of a model")
        field_numbers.add(field.number)
    if _GRAPH_FIELD not in field_numbers:
        raise _MalformedModel("it has no graph")
    if _OPSET_IMPORT_FIELD not in field_numbers:
        raise _MalformedModel("it has no opset import")


def _extract_location(reader: _ProtoReader, start: int, end: int) -> tuple[TensorLocation | None, bytes]:
    """Return the location of a tensor's bytes and the tensor without them; (None, b"") if the bytes stay in the skeleton."""
    name, raw_data, external, entries, remaining_fields = "", None, False, dict[str, str](), bytearray()
    for field in _iter_fields(reader, start, end):
        if field.number == _RAW_DATA_FIELD and field.wire_type == _LENGTH_DELIMITED:
            raw_data = field
            continue
        if field.number == _EXTERNAL_DATA_FIELD and field.wire_type == _LENGTH_DELIMITED:
            key, value = _read_entry(reader, field.payload_start, field.end)
            entries[key] = value
            continue
        if field.number == _DATA_LOCATION_FIELD and field.wire_type == _VARINT:
            external = field.value == 1
            continue
        if field.number == _NAME_FIELD and field.wire_type == _LENGTH_DELIMITED:
            name = _read_text(reader, field.payload_start, field.end)
        remaining_fields += reader.read(field.start, field.end)
    if external and raw_data is not None:
        raise ModelError(
            f"tensor `{printable(name)}` has both raw data and external data: exactly one is allowed",
            hint="export the model again",
        )
    if external:
        return _external_location(name, entries), bytes(remaining_fields)
    if raw_data is not None and raw_data.end - raw_data.payload_start >= LARGE_TENSOR_BYTES:
        return TensorLocation(name, None, raw_data.payload_start, raw_data.end - raw_data.payload_start), bytes(
            remaining_fields
        )
    return None, b""


def _external_location(name: str, entries: dict[str, str]) -> TensorLocation:
    numbers: dict[str, int | None] = {"offset": 0, "length": None}
    for key in numbers:
        if (text := entries.get(key)) is not None:
            if not (text.isascii() and text.isdigit() and len(text) < 20):
                raise ModelError(
                    f"tensor `{printable(name)}`: the {key} of its external data, `{printable(text)}`, is not a byte count",
                    hint="export the model again",
                )
            numbers[key] = int(text)
    return TensorLocation(name, entries.get("location", ""), numbers["offset"] or 0, numbers["length"])


def _read_entry(reader: _ProtoReader, start: int, end: int) -> tuple[str, str]:
    texts = {1: "", 2: ""}
    for field in _iter_fields(reader, start, end):
        if field.number in texts and field.wire_type == _LENGTH_DELIMITED:
            texts[field.number] = _read_text(reader, field.payload_start, field.end)
    return texts[1], texts[2]


def _read_text(reader: _ProtoReader, start: int, end: int) -> str:
    try:
        return reader.read(start, end).decode()
    except UnicodeDecodeError:
        raise _MalformedModel(f"the text at byte {start} is not UTF-8") from None


def raw_data_field(index: int, length: int) -> list[bytes | WeightSpan]:
    """Return the raw data field of a tensor whose `length` bytes are weight `index`."""
    return [_encode_varint(_RAW_DATA_FIELD << 3 | _LENGTH_DELIMITED) + _encode_varint(length), WeightSpan(index, length)]


def external_data_fields(location: str, offset: int, length: int | None) -> list[bytes | WeightSpan]:
    """Return the fields that make a tensor refer to [offset, offset + length) of the file at `location`."""
    entries = {"location": location, "offset": str(offset)} | ({} if length is None else {"length": str(length)})
    encoded = b"".join(
        _encode_bytes_field(_EXTERNAL_DATA_FIELD, _encode_bytes_field(1, key.encode()) + _encode_bytes_field(2, value.encode()))
        for key, value in entries.items()
    )
    return [encoded + _encode_varint(_DATA_LOCATION_FIELD << 3) + b"\x01"]


def assemble(proto: bytes, tensor_fields: Callable[[int], list[bytes | WeightSpan]]) -> list[bytes | WeightSpan]:
    """Return a ModelProto as segments in which each placeholder has the fields `tensor_fields(index)` instead."""
    marker = _PLACEHOLDER_PREFIX.encode()
    reader = _BytesReader(proto)

    def should_descend(message_type: str, start: int, end: int) -> bool:
        return proto.find(marker, start, end) >= 0

    def replace_tensor(start: int, end: int) -> _Segments | None:
        location, remaining_fields = _extract_location(reader, start, end)
        index = placeholder_index(location.location) if location is not None and location.location is not None else None
        return None if index is None else [remaining_fields, *tensor_fields(index)]

    return _MessageRewriter(reader, should_descend, replace_tensor).rewrite("ModelProto", 0, len(proto))
