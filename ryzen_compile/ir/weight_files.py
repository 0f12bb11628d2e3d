"""Model and weight files: resolved, checked to be inside the model's folder, and read in chunks."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ryzen_compile.errors import ModelError, printable
from ryzen_compile.ir.file_hints import model_file_hint
from ryzen_compile.utils.files import CHUNK_BYTES


@dataclass(frozen=True)
class WeightFile:
    """A file and its stat values when the model was loaded."""

    path: str
    """Absolute."""
    device: int
    inode: int
    size: int
    """In bytes."""
    mtime_ns: int

    @contextmanager
    def open(self) -> Iterator[int]:
        """Open the file and yield its descriptor; raises ModelError if the file changed since the model was loaded."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(
                f"cannot read `{printable(self.path)}` after the model was loaded: {error.strerror}",
                hint="load the model again",
            ) from None
        try:
            if _from_stat(self.path, os.fstat(descriptor)) != self:
                raise ModelError(f"`{printable(self.path)}` changed since the model was loaded", hint="load the model again")
            yield descriptor
        finally:
            os.close(descriptor)

    def link(self, path: os.PathLike[str]) -> bool:
        """Create a hard link to the file at the new path `path`, and return whether the file system supports it.

        Raises ModelError if the file changed since the model was loaded.
        """
        try:
            os.link(os.path.realpath(self.path), path)
        except OSError:
            return False
        status = os.stat(path)
        if _from_stat(self.path, status) != self:
            os.unlink(path)
            raise ModelError(f"`{printable(self.path)}` changed since the model was loaded", hint="load the model again")
        return True

    def check_unchanged(self) -> None:
        """Raise ModelError if the file changed since the model was loaded."""
        with self.open():
            pass

    def chunks(self, offset: int, length: int) -> Iterator[memoryview]:
        """Yield the bytes [offset, offset + length); each chunk is valid until the next one is requested.

        The file is read, not memory-mapped: touched pages of a mapping stay resident.
        """
        if not length:
            return
        buffer = memoryview(bytearray(min(CHUNK_BYTES, length)))
        with self.open() as descriptor:
            end = offset + length
            while offset < end:
                read_bytes = os.preadv(descriptor, [buffer[: end - offset]], offset)
                if not read_bytes:
                    raise ModelError(f"`{printable(self.path)}` changed while it was read", hint="load the model again")
                yield buffer[:read_bytes]
                offset += read_bytes


def _from_stat(path: str, status: os.stat_result) -> WeightFile:
    return WeightFile(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def resolve_model_file(path: str | os.PathLike[str]) -> WeightFile:
    """Return the file at `path`; raises ModelError if it is missing, empty or not a regular file."""
    path = os.path.abspath(os.fspath(path))
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        hint = model_file_hint(path, "give the path of an ONNX file")
        raise ModelError(f"cannot read `{printable(path)}`: {reason}", hint=hint) from None
    if stat.S_ISDIR(status.st_mode) and os.path.exists(os.path.join(path, "manifest.json")):
        raise ModelError(f"`{printable(path)}` is a package, not a model", hint="give the ONNX file that it was built from")
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"`{printable(path)}` is a folder", hint="give the path of the ONNX file inside it")
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"`{printable(path)}` is not a regular file", hint="give the path of an ONNX file")
    if not status.st_size:
        raise ModelError(f"`{printable(path)}` is empty", hint="export the model again")
    return _from_stat(path, status)


def resolve_external_data_file(model: WeightFile, tensor: str, location: str) -> WeightFile:
    """Return the file at `location` that a tensor of `model` refers to.

    The file must be in the folder of the model's path or, if that path is a symbolic link, in the folder of the link's target:
    download caches store the model and its data in one folder behind links.

    Raises:
        ModelError: The file is missing, not a regular file, or outside the model's folder.
    """
    subject = f"tensor `{printable(tensor)}` of `{printable(model.path)}`"
    if not location or "\0" in location:
        raise ModelError(f"{subject} has external data without a valid file name", hint="export the model again")
    if os.path.isabs(location) or ".." in location.replace("\\", "/").split("/"):
        raise ModelError(
            f"{subject} refers to `{printable(location)}`, which is outside the model's folder",
            hint="put the data next to the model and export it with a plain file name",
        )
    path = os.path.join(os.path.dirname(model.path), location)
    try:
        real_path = os.path.realpath(path, strict=True)
        status = os.stat(real_path)
    except OSError as error:
        raise ModelError(
            f"{subject} needs the file `{printable(location)}`: {error.strerror}",
            hint=f"copy the file to `{printable(os.path.dirname(path))}`",
        ) from None
    folders = {os.path.realpath(os.path.dirname(model.path)), os.path.dirname(os.path.realpath(model.path))}
    if not any(os.path.commonpath([folder, real_path]) == folder for folder in folders):
        raise ModelError(
            f"{subject} refers to `{printable(location)}`, a link to a file outside the model's folder",
            hint="copy the data into the model's folder",
        )
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(
            f"{subject} refers to `{printable(location)}`, which is not a regular file", hint="export the model again"
        )
    return _from_stat(path, status)
