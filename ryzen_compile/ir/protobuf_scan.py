"""ONNX files as bytes: tell the structure from the weights without reading the weights.

A walk over the protobuf wire format that knows just enough of onnx.proto to find every tensor. `read` makes a skeleton: the
file without the bytes of its large tensors and without its references to other files; `assemble` is the way back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ryzen_compile.errors import ModelError, shown
from ryzen_compile.ir.weight_files import Source

LARGE_TENSOR = 1024
"""Raw data from this many bytes on stays in the file."""
_MOST_NESTED = 100
"""How deep messages may lie in each other: protobuf's own bound."""
MOST_BYTES = 2**31 - 1
"""The largest protobuf message."""
_WINDOW = 1 << 16

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# For each kind of message the fields that lead to a tensor: {field number: kind of message}.
_TENSOR = "TensorProto"
_LEADS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {5: _TENSOR, 6: "GraphProto", 10: _TENSOR, 11: "GraphProto"},
}
_WORTH = {_TENSOR: LARGE_TENSOR, "NodeProto": 16384, "AttributeProto": 16384}
"""Below this size a message is taken as it is, unless it refers to another file: most nodes need no look inside."""
_MODEL_WIRES = {1: _VARINT, 5: _VARINT} | dict.fromkeys((2, 3, 4, 6, 7, 8, 14, 20, 25, 26), _BYTES)
_GRAPH, _OPSETS = 7, 8
_NAME, _RAW, _EXTERNAL, _LOCATION_KIND = 8, 9, 13, 14

_REFERENCE = b"location"
_PLACEHOLDER = "\0weight "
"""How the location of a placeholder begins: no file can be called so."""


class Place(NamedTuple):
    """Where the bytes of a tensor lie."""

    tensor: str
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
    places: tuple[Place, ...]
    """What each placeholder stands for."""


class Hole(NamedTuple):
    """A stretch of an assembled file that the bytes of a tensor fill."""

    weight: int
    length: int


def placeholder(index: int) -> str:
    """Return the location of an external tensor that stands for the weight number `index`."""
    return f"{_PLACEHOLDER}{index}"


def placeholder_index(location: str) -> int | None:
    """Return which weight `location` stands for, or None where it is a real one."""
    return int(location.removeprefix(_PLACEHOLDER)) if location.startswith(_PLACEHOLDER) else None


class _Malformed(Exception):
    """The bytes are not those of a whole ONNX model; its text says why."""


class _View(Protocol):
    """Bytes that are looked at through a window."""

    window: bytes
    base: int

    def show(self, at: int) -> None:
        """Move the window so that it holds at least the 20 bytes from `at` on, as far as there are so many."""
        ...

    def take(self, start: int, end: int) -> bytes: ...


class _FileView:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.window = b""
        self.base = 0

    def show(self, at: int) -> None:
        self.window, self.base = os.pread(self.descriptor, _WINDOW, at), at

    def take(self, start: int, end: int) -> bytes:
        low = start - self.base
        if low >= 0 and end - self.base <= len(self.window):
            return self.window[low : end - self.base]
        found = bytearray()
        while start + len(found) < end:
            chunk = os.pread(self.descriptor, end - start - len(found), start + len(found))
            if not chunk:
                raise _Malformed("it became shorter while it was read")
            found += chunk
        return bytes(found)


class _BytesView:
    def __init__(self, content: bytes) -> None:
        self.window = content
        self.base = 0

    def show(self, at: int) -> None:
        pass

    def take(self, start: int, end: int) -> bytes:
        return self.window[start:end]


class _Field(NamedTuple):
    number: int
    wire: int
    value: int
    """Of a varint."""
    at: int
    """Where its tag begins."""
    body: int
    after: int


def _fields(view: _View, start: int, end: int) -> Iterator[_Field]:
    """Yield the fields of the message in [start, end)."""
    at = start
    while at < end:
        if at < view.base or at + 20 > view.base + len(view.window):
            view.show(at)
        window, index = view.window, at - view.base
        try:
            tag, index = _varint(window, index)
            number, wire, value = tag >> 3, tag & 7, 0
            if wire in (_VARINT, _BYTES):
                value, index = _varint(window, index)
        except IndexError:
            raise _Malformed("it ends within a field") from None
        body = view.base + index
        after = body + (value if wire == _BYTES else 8 if wire == _FIXED64 else 4 if wire == _FIXED32 else 0)
        if wire not in (_VARINT, _BYTES, _FIXED64, _FIXED32) or not 0 < number < 1 << 29:
            raise _Malformed(f"byte {at} begins no field of a protobuf message")
        if after > end:
            raise _Malformed(f"the field at byte {at} reaches to byte {after}, its message ends at {end}")
        yield _Field(number, wire, value, at, body, after)
        at = after


def _varint(window: bytes, index: int) -> tuple[int, int]:
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
    raise _Malformed("a number has more than ten bytes")


def _spell_varint(value: int) -> bytes:
    spelt = bytearray()
    while value >= 0x80:
        spelt.append(value & 0x7F | 0x80)
        value >>= 7
    spelt.append(value)
    return bytes(spelt)


def _spell_bytes(number: int, body: bytes) -> bytes:
    return _spell_varint(number << 3 | _BYTES) + _spell_varint(len(body)) + body


_Pieces = list[bytes | Hole]


def length_of(pieces: Sequence[bytes | Hole]) -> int:
    """Return how many bytes the pieces are."""
    return sum(piece.length if isinstance(piece, Hole) else len(piece) for piece in pieces)


class _Walk:
    """Copies a message while it replaces tensors in it."""

    def __init__(
        self, view: _View, worth: Callable[[str, int, int], bool], replace: Callable[[int, int], _Pieces | None]
    ) -> None:
        self.view = view
        self.worth = worth
        """Whether to look into the message of a kind that lies at [start, end)."""
        self.replace = replace
        """Make what shall stand for the tensor at [start, end), or None to leave it."""

    def message(self, kind: str, start: int, end: int, depth: int = 0) -> _Pieces:
        if depth > _MOST_NESTED:
            raise _Malformed(f"its messages lie in each other more than {_MOST_NESTED} deep")
        leads, pieces, copied = _LEADS[kind], _Pieces(), start
        for field in _fields(self.view, start, end):
            child = leads.get(field.number)
            if child is None or field.wire != _BYTES or not self.worth(child, field.body, field.after):
                continue
            made: _Pieces | None
            if child == _TENSOR:
                made = self.replace(field.body, field.after)
            else:
                made = self.message(child, field.body, field.after, depth + 1)
            if made is not None:
                pieces.append(self.view.take(copied, field.at))
                pieces.append(_spell_varint(field.number << 3 | _BYTES) + _spell_varint(length_of(made)))
                pieces.extend(made)
                copied = field.after
        pieces.append(self.view.take(copied, end))
        return pieces


def read(file: Source) -> Skeleton:
    """Read the skeleton of an ONNX file; raises ModelError where it is none, not whole, or a tensor contradicts itself."""
    with file.open() as descriptor:
        try:
            return _read(descriptor)
        except _Malformed as error:
            path = shown(file.path)
            if os.pread(descriptor, 64, 0).startswith(b"version https://git-lfs"):
                raise ModelError(f"`{path}` is a Git LFS pointer, not the model", hint="run `git lfs pull`") from None
            raise ModelError(
                f"`{path}` is not an ONNX file, or not all of it: {error}",
                hint="export the model to ONNX again, or copy the whole file",
            ) from None


def _read(descriptor: int) -> Skeleton:
    size = os.fstat(descriptor).st_size
    view = _FileView(descriptor)
    _check_is_model(view, size)
    places: list[Place] = []

    def worth(kind: str, start: int, end: int) -> bool:
        return end - start >= _WORTH.get(kind, 0) or _REFERENCE in view.take(start, end)

    def replace(start: int, end: int) -> _Pieces | None:
        place, rest = _locate(view, start, end)
        if place is None:
            return None
        places.append(place)
        return [rest, *external_data(placeholder(len(places) - 1), 0, None)]

    pieces = _Walk(view, worth, replace).message("ModelProto", 0, size)
    if (total := length_of(pieces)) > MOST_BYTES:
        raise _Malformed(f"without its weights it still has {total} bytes, more than protobuf's {MOST_BYTES}")
    return Skeleton(b"".join(piece for piece in pieces if isinstance(piece, bytes)), tuple(places))


def _check_is_model(view: _View, size: int) -> None:
    seen = set()
    for field in _fields(view, 0, size):
        if _MODEL_WIRES.get(field.number, field.wire) != field.wire:
            raise _Malformed(f"byte {field.at} begins no field of a model")
        seen.add(field.number)
    if _GRAPH not in seen:
        raise _Malformed("it holds no graph")
    if _OPSETS not in seen:
        raise _Malformed("it does not say which version of the operators it uses")


def _locate(view: _View, start: int, end: int) -> tuple[Place | None, bytes]:
    """Return where the bytes of a tensor lie, if not in the skeleton, and the tensor without them."""
    name, raw, external, entries, rest = "", None, False, dict[str, str](), bytearray()
    for field in _fields(view, start, end):
        if field.number == _RAW and field.wire == _BYTES:
            raw = field
            continue
        if field.number == _EXTERNAL and field.wire == _BYTES:
            key, value = _entry(view, field.body, field.after)
            entries[key] = value
            continue
        if field.number == _LOCATION_KIND and field.wire == _VARINT:
            external = field.value == 1
            continue
        if field.number == _NAME and field.wire == _BYTES:
            name = _text(view, field.body, field.after)
        rest += view.take(field.at, field.after)
    if external and raw is not None:
        raise ModelError(f"tensor `{shown(name)}` holds data and refers to another file too", hint="export the model again")
    if external:
        return _external_place(name, entries), bytes(rest)
    if raw is not None and raw.after - raw.body >= LARGE_TENSOR:
        return Place(name, None, raw.body, raw.after - raw.body), bytes(rest)
    return None, b""


def _external_place(name: str, entries: dict[str, str]) -> Place:
    numbers: dict[str, int | None] = {"offset": 0, "length": None}
    for key in numbers:
        if (text := entries.get(key)) is not None:
            if not (text.isascii() and text.isdigit() and len(text) < 20):
                raise ModelError(
                    f"tensor `{shown(name)}`: the {key} of its external data, `{shown(text)}`, is no number of bytes",
                    hint="export the model again",
                )
            numbers[key] = int(text)
    return Place(name, entries.get("location", ""), numbers["offset"] or 0, numbers["length"])


def _entry(view: _View, start: int, end: int) -> tuple[str, str]:
    texts = {1: "", 2: ""}
    for field in _fields(view, start, end):
        if field.number in texts and field.wire == _BYTES:
            texts[field.number] = _text(view, field.body, field.after)
    return texts[1], texts[2]


def _text(view: _View, start: int, end: int) -> str:
    try:
        return view.take(start, end).decode()
    except UnicodeDecodeError:
        raise _Malformed(f"the text at byte {start} is not UTF-8") from None


def raw_data(index: int, length: int) -> list[bytes | Hole]:
    """Return the field that holds a tensor's bytes, which are weight number `index`."""
    return [_spell_varint(_RAW << 3 | _BYTES) + _spell_varint(length), Hole(index, length)]


def external_data(location: str, offset: int, length: int | None) -> list[bytes | Hole]:
    """Return the fields that refer a tensor to another file."""
    entries = {"location": location, "offset": str(offset)} | ({} if length is None else {"length": str(length)})
    spelt = b"".join(
        _spell_bytes(_EXTERNAL, _spell_bytes(1, key.encode()) + _spell_bytes(2, value.encode()))
        for key, value in entries.items()
    )
    return [spelt + _spell_varint(_LOCATION_KIND << 3) + b"\x01"]


def assemble(proto: bytes, fill: Callable[[int], list[bytes | Hole]]) -> list[bytes | Hole]:
    """Return a ModelProto in pieces, with the fields `fill(index)` where the tensor was a placeholder."""
    mark = _PLACEHOLDER.encode()
    view = _BytesView(proto)

    def worth(kind: str, start: int, end: int) -> bool:
        return proto.find(mark, start, end) >= 0

    def replace(start: int, end: int) -> _Pieces | None:
        place, rest = _locate(view, start, end)
        index = placeholder_index(place.location) if place is not None and place.location is not None else None
        return None if index is None else [rest, *fill(index)]

    return _Walk(view, worth, replace).message("ModelProto", 0, len(proto))
