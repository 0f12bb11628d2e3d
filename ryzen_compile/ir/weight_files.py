"""The files that weights lie in: found, checked to be inside of the model's folder, and read by chunks."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ryzen_compile.errors import ModelError, printable
from ryzen_compile.utils.files import CHUNK_BYTES


@dataclass(frozen=True)
class WeightFile:
    """A file as it was when the model was loaded."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    """In ns."""

    @contextmanager
    def open(self) -> Iterator[int]:
        """Open the file and yield its descriptor; raises ModelError where it is no longer the same file."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(
                f"`{printable(self.path)}` cannot be read any more: {error.strerror}", hint="load the model again"
            ) from None
        try:
            if _from_stat(self.path, os.fstat(descriptor)) != self:
                raise ModelError(f"`{printable(self.path)}` changed since the model was loaded", hint="load the model again")
            yield descriptor
        finally:
            os.close(descriptor)

    def check_unchanged(self) -> None:
        """Raise ModelError where it is no longer the same file."""
        with self.open():
            pass

    def chunks(self, offset: int, length: int) -> Iterator[memoryview]:
        """Yield the bytes [offset, offset + length), each chunk valid until the next is asked for.

        They are read, not mapped: a map keeps what it touches resident.
        """
        if not length:
            return
        buffer = memoryview(bytearray(min(CHUNK_BYTES, length)))
        with self.open() as descriptor:
            end = offset + length
            while offset < end:
                count = os.preadv(descriptor, [buffer[: end - offset]], offset)
                if not count:
                    raise ModelError(f"`{printable(self.path)}` changed while it was read", hint="load the model again")
                yield buffer[:count]
                offset += count


def _from_stat(path: str, status: os.stat_result) -> WeightFile:
    return WeightFile(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def resolve_model_file(path: str | os.PathLike[str]) -> WeightFile:
    """Return the file at `path`; raises ModelError where there is none."""
    path = os.path.abspath(os.fspath(path))
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"cannot read `{printable(path)}`: {reason}", hint="give the path of an ONNX file") from None
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"`{printable(path)}` is a folder", hint="give the path of the ONNX file inside of it")
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"`{printable(path)}` is not a regular file", hint="give the path of an ONNX file")
    if not status.st_size:
        raise ModelError(f"`{printable(path)}` is empty", hint="export the model again")
    return _from_stat(path, status)


def resolve_external_data_file(model: WeightFile, tensor: str, location: str) -> WeightFile:
    """Return the file that a tensor of `model` names; raises ModelError where it is missing or outside of its folder.

    The folder is that of the model's path and, where the path is a link, also that of the file it leads to: download caches
    keep the model and its data beside each other behind links.
    """
    who = f"tensor `{printable(tensor)}` of `{printable(model.path)}`"
    if not location or "\0" in location:
        raise ModelError(f"{who} does not say which file its data is in", hint="export the model again")
    if os.path.isabs(location) or ".." in location.replace("\\", "/").split("/"):
        raise ModelError(
            f"{who} refers to `{printable(location)}`, outside of the model's folder",
            hint="put the data beside the model and export it with a plain file name",
        )
    path = os.path.join(os.path.dirname(model.path), location)
    try:
        real = os.path.realpath(path, strict=True)
        status = os.stat(real)
    except OSError as error:
        raise ModelError(
            f"{who} needs the file `{printable(location)}`: {error.strerror}",
            hint=f"put it into `{printable(os.path.dirname(path))}`",
        ) from None
    folders = {os.path.realpath(os.path.dirname(model.path)), os.path.dirname(os.path.realpath(model.path))}
    if not any(os.path.commonpath([folder, real]) == folder for folder in folders):
        raise ModelError(
            f"{who} refers to `{printable(location)}`, a link that leaves the model's folder",
            hint="copy the data into the folder",
        )
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{who} refers to `{printable(location)}`, which is not a regular file", hint="export the model again")
    return _from_stat(path, status)
