"""ONNX files as bytes: tell the structure from the weights without reading the weights.

A walk over the protobuf wire format that knows just enough of onnx.proto to find every tensor. `read` makes a skeleton: the
file without the bytes of its large tensors and without its references to other files; `assemble` is the way back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ryzen_compile.errors import ModelError, printable
from ryzen_compile.ir.weight_files import WeightFile

LARGE_TENSOR_BYTES = 1024
"""Raw data from this many bytes on stays in the file."""
_MAX_NESTING = 100
"""How deep messages may lie in each other: protobuf's own bound."""
MAX_PROTO_BYTES = 2**31 - 1
"""The largest protobuf message."""
_WINDOW_BYTES = 1 << 16

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5

# For each kind of message the fields that lead to a tensor: {field number: kind of message}.
_TENSOR_MESSAGE = "TensorProto"
_CHILD_MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR_MESSAGE},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {5: _TENSOR_MESSAGE, 6: "GraphProto", 10: _TENSOR_MESSAGE, 11: "GraphProto"},
}
_MIN_SCAN_BYTES = {_TENSOR_MESSAGE: LARGE_TENSOR_BYTES, "NodeProto": 16384, "AttributeProto": 16384}
"""Below this size a message is taken as it is, unless it refers to another file: most nodes need no look inside."""
_MODEL_WIRE_TYPES = {1: _VARINT, 5: _VARINT} | dict.fromkeys((2, 3, 4, 6, 7, 8, 14, 20, 25, 26), _LENGTH_DELIMITED)
_GRAPH_FIELD, _OPSET_IMPORT_FIELD = 7, 8
_NAME_FIELD, _RAW_DATA_FIELD, _EXTERNAL_DATA_FIELD, _DATA_LOCATION_FIELD = 8, 9, 13, 14

_LOCATION_KEY = b"location"
_PLACEHOLDER_PREFIX = "\0weight "
"""How the location of a placeholder begins: no file can be called so."""


class TensorLocation(NamedTuple):
    """Where the bytes of a tensor lie."""

    tensor_name: str
    location: str | None
    """The other file as the tensor names it; None: the file itself."""
    offset: int
    length: int | None
    """In bytes; None where the file does not say."""


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights."""

    proto: bytes
    """A ModelProto whose large and external tensors are placeholders: see `placeholder`."""
    tensor_locations: tuple[TensorLocation, ...]
    """What each placeholder stands for."""


class WeightSpan(NamedTuple):
    """A stretch of an assembled file that the bytes of a tensor fill."""

    weight_index: int
    length: int


def placeholder(index: int) -> str:
    """Return the location of an external tensor that stands for the weight number `index`."""
    return f"{_PLACEHOLDER_PREFIX}{index}"


def placeholder_index(location: str) -> int | None:
    """Return which weight `location` stands for, or None where it is a real one."""
    return int(location.removeprefix(_PLACEHOLDER_PREFIX)) if location.startswith(_PLACEHOLDER_PREFIX) else None


class _MalformedModel(Exception):
    """The bytes are not those of a whole ONNX model; its text says why."""


class _ProtoReader(Protocol):
    """Bytes that are looked at through a window."""

    window: bytes
    window_offset: int

    def move_window(self, offset: int) -> None:
        """Move the window so that it holds at least the 20 bytes from `at` on, as far as there are so many."""
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
        low = start - self.window_offset
        if low >= 0 and end - self.window_offset <= len(self.window):
            return self.window[low : end - self.window_offset]
        found = bytearray()
        while start + len(found) < end:
            chunk = os.pread(self.descriptor, end - start - len(found), start + len(found))
            if not chunk:
                raise _MalformedModel("it became shorter while it was read")
            found += chunk
        return bytes(found)


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
    """Of a varint."""
    start: int
    """Where its tag begins."""
    payload_start: int
    end: int


def _iter_fields(reader: _ProtoReader, start: int, end: int) -> Iterator[_Field]:
    """Yield the fields of the message in [start, end)."""
    at = start
    while at < end:
        if at < reader.window_offset or at + 20 > reader.window_offset + len(reader.window):
            reader.move_window(at)
        window, index = reader.window, at - reader.window_offset
        try:
            tag, index = _decode_varint(window, index)
            number, wire, value = tag >> 3, tag & 7, 0
            if wire in (_VARINT, _LENGTH_DELIMITED):
                value, index = _decode_varint(window, index)
        except IndexError:
            raise _MalformedModel("it ends within a field") from None
        body = reader.window_offset + index
        after = body + (value if wire == _LENGTH_DELIMITED else 8 if wire == _FIXED64 else 4 if wire == _FIXED32 else 0)
        if wire not in (_VARINT, _LENGTH_DELIMITED, _FIXED64, _FIXED32) or not 0 < number < 1 << 29:
            raise _MalformedModel(f"byte {at} begins no field of a protobuf message")
        if after > end:
            raise _MalformedModel(f"the field at byte {at} reaches to byte {after}, its message ends at {end}")
        yield _Field(number, wire, value, at, body, after)
        at = after


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
    raise _MalformedModel("a number has more than ten bytes")


def _encode_varint(value: int) -> bytes:
    spelt = bytearray()
    while value >= 0x80:
        spelt.append(value & 0x7F | 0x80)
        value >>= 7
    spelt.append(value)
    return bytes(spelt)


def _encode_bytes_field(number: int, payload: bytes) -> bytes:
    return _encode_varint(number << 3 | _LENGTH_DELIMITED) + _encode_varint(len(payload)) + payload


_Segments = list[bytes | WeightSpan]


def total_bytes(segments: Sequence[bytes | WeightSpan]) -> int:
    """Return how many bytes the pieces are."""
    return sum(piece.length if isinstance(piece, WeightSpan) else len(piece) for piece in segments)


class _MessageRewriter:
    """Copies a message while it replaces tensors in it."""

    def __init__(
        self,
        reader: _ProtoReader,
        should_descend: Callable[[str, int, int], bool],
        replace_tensor: Callable[[int, int], _Segments | None],
    ) -> None:
        self.reader = reader
        self.should_descend = should_descend
        """Whether to look into the message of a kind that lies at [start, end)."""
        self.replace_tensor = replace_tensor
        """Make what shall stand for the tensor at [start, end), or None to leave it."""

    def rewrite(self, message_type: str, start: int, end: int, depth: int = 0) -> _Segments:
        if depth > _MAX_NESTING:
            raise _MalformedModel(f"its messages lie in each other more than {_MAX_NESTING} deep")
        leads, pieces, copied = _CHILD_MESSAGES[message_type], _Segments(), start
        for field in _iter_fields(self.reader, start, end):
            child = leads.get(field.number)
            if (
                child is None
                or field.wire_type != _LENGTH_DELIMITED
                or not self.should_descend(child, field.payload_start, field.end)
            ):
                continue
            made: _Segments | None
            if child == _TENSOR_MESSAGE:
                made = self.replace_tensor(field.payload_start, field.end)
            else:
                made = self.rewrite(child, field.payload_start, field.end, depth + 1)
            if made is not None:
                pieces.append(self.reader.read(copied, field.start))
                pieces.append(_encode_varint(field.number << 3 | _LENGTH_DELIMITED) + _encode_varint(total_bytes(made)))
                pieces.extend(made)
                copied = field.end
        pieces.append(self.reader.read(copied, end))
        return pieces


def read_skeleton(file: WeightFile) -> Skeleton:
    """Read the skeleton of an ONNX file; raises ModelError where it is none, not whole, or a tensor contradicts itself."""
    with file.open() as descriptor:
        try:
            return _read_skeleton(descriptor)
        except _MalformedModel as error:
            path = printable(file.path)
            if os.pread(descriptor, 64, 0).startswith(b"version https://git-lfs"):
                raise ModelError(f"`{path}` is a Git LFS pointer, not the model", hint="run `git lfs pull`") from None
            raise ModelError(
                f"`{path}` is not an ONNX file, or not all of it: {error}",
                hint="export the model to ONNX again, or copy the whole file",
            ) from None


def _read_skeleton(descriptor: int) -> Skeleton:
    size = os.fstat(descriptor).st_size
    view = _FileReader(descriptor)
    _check_is_model(view, size)
    places: list[TensorLocation] = []

    def worth(kind: str, start: int, end: int) -> bool:
        return end - start >= _MIN_SCAN_BYTES.get(kind, 0) or _LOCATION_KEY in view.read(start, end)

    def replace(start: int, end: int) -> _Segments | None:
        place, rest = _extract_location(view, start, end)
        if place is None:
            return None
        places.append(place)
        return [rest, *external_data_fields(placeholder(len(places) - 1), 0, None)]

    pieces = _MessageRewriter(view, worth, replace).rewrite("ModelProto", 0, size)
    if (total := total_bytes(pieces)) > MAX_PROTO_BYTES:
        raise _MalformedModel(f"without its weights it still has {total} bytes, more than protobuf's {MAX_PROTO_BYTES}")
    return Skeleton(b"".join(piece for piece in pieces if isinstance(piece, bytes)), tuple(places))


def _check_is_model(reader: _ProtoReader, size: int) -> None:
    seen = set()
    for field in _iter_fields(reader, 0, size):
        if _MODEL_WIRE_TYPES.get(field.number, field.wire_type) != field.wire_type:
            raise _MalformedModel(f"byte {field.start} begins no field of a model")
        seen.add(field.number)
    if _GRAPH_FIELD not in seen:
        raise _MalformedModel("it holds no graph")
    if _OPSET_IMPORT_FIELD not in seen:
        raise _MalformedModel("it does not say which version of the operators it uses")


def _extract_location(reader: _ProtoReader, start: int, end: int) -> tuple[TensorLocation | None, bytes]:
    """Return where the bytes of a tensor lie, if not in the skeleton, and the tensor without them."""
    name, raw, external, entries, rest = "", None, False, dict[str, str](), bytearray()
    for field in _iter_fields(reader, start, end):
        if field.number == _RAW_DATA_FIELD and field.wire_type == _LENGTH_DELIMITED:
            raw = field
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
        rest += reader.read(field.start, field.end)
    if external and raw is not None:
        raise ModelError(f"tensor `{printable(name)}` holds data and refers to another file too", hint="export the model again")
    if external:
        return _external_location(name, entries), bytes(rest)
    if raw is not None and raw.end - raw.payload_start >= LARGE_TENSOR_BYTES:
        return TensorLocation(name, None, raw.payload_start, raw.end - raw.payload_start), bytes(rest)
    return None, b""


def _external_location(name: str, entries: dict[str, str]) -> TensorLocation:
    numbers: dict[str, int | None] = {"offset": 0, "length": None}
    for key in numbers:
        if (text := entries.get(key)) is not None:
            if not (text.isascii() and text.isdigit() and len(text) < 20):
                raise ModelError(
                    f"tensor `{printable(name)}`: the {key} of its external data, `{printable(text)}`, is no number of bytes",
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
    """Return the field that holds a tensor's bytes, which are weight number `index`."""
    return [_encode_varint(_RAW_DATA_FIELD << 3 | _LENGTH_DELIMITED) + _encode_varint(length), WeightSpan(index, length)]


def external_data_fields(location: str, offset: int, length: int | None) -> list[bytes | WeightSpan]:
    """Return the fields that refer a tensor to another file."""
    entries = {"location": location, "offset": str(offset)} | ({} if length is None else {"length": str(length)})
    spelt = b"".join(
        _encode_bytes_field(_EXTERNAL_DATA_FIELD, _encode_bytes_field(1, key.encode()) + _encode_bytes_field(2, value.encode()))
        for key, value in entries.items()
    )
    return [spelt + _encode_varint(_DATA_LOCATION_FIELD << 3) + b"\x01"]


def assemble(proto: bytes, tensor_fields: Callable[[int], list[bytes | WeightSpan]]) -> list[bytes | WeightSpan]:
    """Return a ModelProto in pieces, with the fields `fill(index)` where the tensor was a placeholder."""
    mark = _PLACEHOLDER_PREFIX.encode()
    view = _BytesReader(proto)

    def worth(kind: str, start: int, end: int) -> bool:
        return proto.find(mark, start, end) >= 0

    def replace(start: int, end: int) -> _Segments | None:
        place, rest = _extract_location(view, start, end)
        index = placeholder_index(place.location) if place is not None and place.location is not None else None
        return None if index is None else [rest, *tensor_fields(index)]

    return _MessageRewriter(view, worth, replace).rewrite("ModelProto", 0, len(proto))
