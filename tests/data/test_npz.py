"""Tests of hostile .npz archives: refused with one message, and before memory is allocated."""

from __future__ import annotations

import io
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ryzen_compile.data.sources import from_npz
from ryzen_compile.errors import RyzenError
from ryzen_compile.spec.interface import InputSpec, Interface

ROWS = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=("N", 20)),), outputs=())


def npy(shape: str = "(4, 20)", dtype: str = "<f4", data: bytes = bytes(320), version: bytes = b"\x01\x00") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little") + header + data


def archive(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in members:
            file.writestr(name, content)
    return stream.getvalue()


def edited(content: bytes, offset_in_local_header: int, offset_in_directory: int, value: bytes) -> bytes:
    """Return an archive of one member with a field replaced in both of its headers."""
    directory = content.index(b"PK\x01\x02")
    edited_content = bytearray(content)
    edited_content[offset_in_local_header : offset_in_local_header + len(value)] = value
    edited_content[directory + offset_in_directory : directory + offset_in_directory + len(value)] = value
    return bytes(edited_content)


def long_header() -> bytes:
    """A header that claims 4 GB, of which the compressed member holds 8 MB."""
    return b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(8 << 20)


ARRAY = ("x.npy", npy())
HOSTILE = {
    "more elements than the file holds": (archive(("x.npy", npy("(1000000000000, 20)"))), "needs 80000000000000 bytes"),
    "elements that are missing": (archive(("x.npy", npy(data=bytes(319)))), "needs 320 bytes, and the file holds at most 319"),
    "encrypted": (edited(archive(ARRAY), 6, 8, b"\x01"), "the array `x` is encrypted"),
    "unknown compression": (edited(archive(ARRAY), 8, 10, b"c"), "the unknown compression 99"),
    "not an array": (archive(("x.npy", b"hello")), "cannot be read as .npz"),
    "a member without suffix": (archive(("x", b"hello")), "the member `x` is not an array"),
    "two of one name": (archive(ARRAY, ("y.npy", npy())).replace(b"y.npy", b"x.npy"), "the member `x.npy` occurs twice"),
    "negative shape": (archive(("x.npy", npy("(-4, 20)"))), "negative shape"),
    "not a shape": (archive(("x.npy", npy("print(1)"))), "cannot be read as .npz"),
    "a nested header": (archive(("x.npy", npy("(" * 4000))), "cannot be read as .npz"),
    "format version 3": (archive(("x.npy", npy(version=b"\x03\x00"))), "version (3, 0) is not supported"),
    "a long header": (
        archive(("x.npy", long_header()), compression=zipfile.ZIP_DEFLATED),
        "the header of an array has 4294967295",
    ),
    "another type": (archive(("x.npy", npy(dtype="<f8", data=bytes(640)))), "has element type float32, got float64"),
    "huge text": (archive(("x.npy", npy(dtype="<U90000000"))), "needs 28800000000 bytes"),
    "another rank": (archive(("x.npy", npy("(80,)"))), "has 2 dimensions, got 80"),
    "a million samples without elements": (
        archive(("x.npy", npy("(9000000000000, 0, 20)", data=b""))),
        "has 2 dimensions, got 9000000000000x0x20",
    ),
    "damaged elements": (archive(ARRAY).replace(bytes(320), b"\x01" + bytes(319)), "cannot be read as .npz: BadZipFile"),
    "an unknown name": (archive(ARRAY, ("\x1b[2J.npy", npy())), "has an unknown input `\\x1b[2J`"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive_is_refused_without_allocation(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    (tmp_path / "a.npz").write_bytes(content)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), limit[1]))
    try:
        with pytest.raises(RyzenError) as caught:
            list(from_npz(tmp_path / "a.npz", ROWS))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_saved_arrays_are_read(tmp_path: Path, save: Callable[..., None]) -> None:
    values = np.asfortranarray(np.arange(80, dtype=np.float32).reshape(4, 20))
    save(tmp_path / "a.npz", x=values)
    (sample,) = from_npz(tmp_path / "a.npz", ROWS)
    assert np.array_equal(sample["x"], values)
