"""Reading of .npz archives from untrusted sources: sizes and types are known before memory is allocated."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ryzen_compile.errors import RyzenError, ShapeError, UsageError, printable
from ryzen_compile.utils.machine import physical_memory_bytes
from ryzen_compile.utils.user_script import error_text

Array = np.ndarray[Any, Any]

_ZIP_MAGIC = b"PK"
"""The first bytes of every .npz file; numpy reads any other file as a pickle."""
_SUFFIX = ".npy"
_MAX_HEADER_BYTES = 10_000
"""The maximum size of an array's header, equal to numpy's default."""
_MAX_DEFLATE_RATIO = 1032
"""The maximum factor by which deflate expands its input."""
_ENCRYPTED_FLAG = 1


@dataclass(frozen=True)
class ArrayHeader:
    """The element type and the shape of an array in an archive."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of the elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class NpzArchive:
    """An open archive whose array headers were read and checked against the size of the file."""

    def __init__(self, file: Path, archive: zipfile.ZipFile) -> None:
        self._file, self._archive = file, archive
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(_SUFFIX)
            if name == member.filename or name in self._members:
                problem = "is not an array" if name == member.filename else "occurs twice"
                raise UsageError(
                    f"`{file}`: the member `{printable(member.filename)}` {problem}",
                    hint="write the file with numpy.savez(path, input_name=array)",
                )
            self._members[name] = member
        self.headers: Mapping[str, ArrayHeader] = {name: self._read_header(name) for name in self._members}
        """The header of each array, by name."""

    def read(self) -> dict[str, Array]:
        """Return all arrays. Raises ShapeError if they do not fit into memory, and UsageError if the file is damaged."""
        size, memory = sum(header.nbytes for header in self.headers.values()), physical_memory_bytes()
        if size > memory:
            raise ShapeError(
                f"`{self._file}` contains {size / 1e9:.3g} GB of arrays, and this machine has {memory / 1e9:.0f} GB of memory",
                hint="split the file, and give the folder of the parts",
            )
        arrays = {}
        for name, member in self._members.items():
            with _convert_errors(self._file), self._archive.open(member) as stream:
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
        return arrays

    def _read_header(self, name: str) -> ArrayHeader:
        member = self._members[name]
        label = f"`{self._file}`: the array `{printable(name)}`"
        if member.flag_bits & _ENCRYPTED_FLAG:
            raise UsageError(f"{label} is encrypted", hint="save it without a password")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UsageError(f"{label} has the unknown compression {member.compress_type}", hint="use numpy.savez_compressed")
        with self._archive.open(member) as stream:
            header, header_bytes = _parse_header(stream)
        if header.dtype.hasobject:
            raise UsageError(
                f"`{self._file}` contains pickled objects, which are rejected because unpickling can execute code",
                hint="save arrays of numbers or strings",
            )
        stored = member.compress_size * (1 if member.compress_type == zipfile.ZIP_STORED else _MAX_DEFLATE_RATIO)
        available = min(member.file_size, stored) - header_bytes
        if header.nbytes > available or member.compress_size > self._file.stat().st_size:
            raise UsageError(
                f"{label} of type {header.dtype}{list(header.shape)} needs {header.nbytes} bytes, and the file holds "
                f"at most {max(available, 0)}",
                hint="copy the whole file again",
            )
        return header


def _parse_header(stream: IO[bytes]) -> tuple[ArrayHeader, int]:
    """Return the header of an array, and its size in bytes. Raises ValueError if the bytes are not one."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format version {version} is not supported")
    length_bytes = 2 if version == (1, 0) else 4
    encoded_length = stream.read(length_bytes)
    length = int.from_bytes(encoded_length, "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"the header of an array has {length} bytes")
    encoded = io.BytesIO(encoded_length + stream.read(length))
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(encoded)
    if any(size < 0 for size in shape):
        raise ValueError(f"an array has the negative shape {shape}")
    return ArrayHeader(dtype, shape), len(np.lib.format.magic(*version)) + length_bytes + length


@contextmanager
def open_npz(file: Path) -> Iterator[NpzArchive]:
    """Open an archive and read the headers of its arrays.

    Raises:
        UsageError: The file is not an archive of arrays, is damaged, or holds pickled objects.
    """
    with open(file, "rb") as stream:
        if stream.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            raise UsageError(f"`{file}` is not an .npz archive", hint="write it with numpy.savez(path, input_name=array)")
        with _convert_errors(file):
            archive = zipfile.ZipFile(stream)
        with archive:
            with _convert_errors(file):
                opened = NpzArchive(file, archive)
            yield opened


@contextmanager
def _convert_errors(file: Path) -> Iterator[None]:
    """Convert errors of zipfile and numpy within the block to UsageErrors.

    Damaged archives raise errors of many types, such as NotImplementedError, struct.error and tokenize.TokenError.
    """
    try:
        yield
    except RyzenError:
        raise
    except Exception as error:
        raise UsageError(f"`{file}` cannot be read as .npz: {error_text(error)}", hint="write it again") from error
