"""Save a model: the structure is serialised, the weights are streamed from where they lie."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from ryzen_compile.errors import ModelError, RyzenError, printable
from ryzen_compile.ir import protobuf_scan
from ryzen_compile.ir.gc_pause import gc_paused
from ryzen_compile.ir.load import root_cause
from ryzen_compile.ir.weights import FileTensor, TensorSlot, chunks, tensor_slots
from ryzen_compile.utils.atomic_file import atomic_path, temporary_name
from ryzen_compile.utils.files import hash_file, is_disk_full, parallel_map
from ryzen_compile.utils.record import Record

MAX_INLINE_BYTES = 1_500_000_000
"""Up to this many bytes of weights `auto` keeps in the file: protobuf ends at 2 GiB, and some tools before that."""
_ALIGNMENT = 64
"""Of weights in a data file, in bytes: any element type can then be used where it is mapped."""


class StoredWeight(Record, frozen=True):
    """A file of a weight store."""

    path: str
    """Relative to the graph's folder, with `/`."""
    sha256: str
    size_bytes: int


class StoredGraph(Record, frozen=True):
    """A graph file over a weight store."""

    sha256: str
    size_bytes: int
    weights: tuple[StoredWeight, ...]
    """Every file of the store that the graph reads, each once, sorted by path."""


def save(model: ir.Model, path: str | os.PathLike[str], *, weights: Literal["inline", "external", "auto"] = "auto") -> None:
    """Write `model` to `path`, whole or not at all; `model` stays as it is.

    `external` puts the weights into one file beside it, called as `path` with `.data` behind it; `auto` does so for more than
    1.5 GB of them. A model that is written over the file it was loaded from must be loaded again. Raises RyzenError where the
    disk refuses.
    """
    path = Path(path)
    with _convert_os_errors(path), _detached_tensors(model, protobuf_scan.LARGE_TENSOR_BYTES) as large:
        if weights == "auto":
            weights = "external" if sum(tensor.nbytes for tensor in large.tensors) > MAX_INLINE_BYTES else "inline"
        proto = _serialize(model)
        if weights == "inline":
            with atomic_path(path) as hidden:
                _write_graph(hidden, proto, large, {})
        else:
            _save_external(path, proto, large)


def _save_external(path: Path, proto: bytes, large: _LargeTensors) -> None:
    data = path.with_name(path.name + ".data")
    fields: dict[int, list[bytes | protobuf_scan.WeightSpan]] = {}
    with atomic_path(path) as hidden_graph:
        with atomic_path(data) as hidden_data, open(hidden_data, "r+b", buffering=0) as file:
            offset = 0
            for index in large.initializer_indices:
                tensor = large.tensors[index]
                offset += -offset % _ALIGNMENT
                file.seek(offset)
                _append_tensor(tensor, file)
                fields[index] = protobuf_scan.external_data_fields(data.name, offset, tensor.nbytes)
                offset += tensor.nbytes
            file.truncate(offset)
            _write_graph(hidden_graph, proto, large, fields)
            # Should the process die between the two renamings, no graph is better than one with another's weights.
            path.unlink(missing_ok=True)


def save_to_store(
    model: ir.Model, path: str | os.PathLike[str], store: str | os.PathLike[str], *, threshold_bytes: int
) -> StoredGraph:
    """Write `model` to `path` with every weight of at least `threshold_bytes` as a file of `store`, called by its sha256.

    A file that is in the store already is not written again. `store` lies in the folder of `path` or below: ONNX Runtime reads
    nothing from outside of it. Raises RyzenError where the disk refuses.
    """
    path, store = Path(path), Path(store)
    inside = Path(os.path.relpath(store, path.parent))
    if ".." in inside.parts:
        raise ValueError(f"the store {store} lies outside of the graph's folder {path.parent}")
    with _convert_os_errors(path), _detached_tensors(model, threshold_bytes) as large:
        store.mkdir(parents=True, exist_ok=True)
        in_files = [index for index in large.initializer_indices if isinstance(large.tensors[index], FileTensor)]
        digests = dict(
            zip(in_files, parallel_map(lambda index: _store_tensor(large.tensors[index], store), in_files), strict=True)
        )
        fields: dict[int, list[bytes | protobuf_scan.WeightSpan]] = {}
        stored: dict[str, StoredWeight] = {}
        for index in large.initializer_indices:
            tensor = large.tensors[index]
            digest = digests.get(index) or _store_tensor(tensor, store)
            weight = StoredWeight(path=(inside / digest).as_posix(), sha256=digest, size_bytes=tensor.nbytes)
            stored[weight.path] = weight
            fields[index] = protobuf_scan.external_data_fields(weight.path, 0, weight.size_bytes)
        proto = _serialize(model)
        with atomic_path(path) as hidden:
            _write_graph(hidden, proto, large, fields)
            sha256, size = hash_file(hidden, "sha256"), hidden.stat().st_size
    return StoredGraph(sha256=sha256, size_bytes=size, weights=tuple(stored[name] for name in sorted(stored)))


@dataclass
class _LargeTensors:
    """The tensors of a model that are streamed, each range of bytes once, by the numbers of their placeholders."""

    tensors: list[ir.TensorProtocol]
    initializer_indices: list[int]
    """Which of them initialisers use; the others are only in attributes, and stay in the graph's file."""


@contextmanager
def _detached_tensors(model: ir.Model, min_bytes: int) -> Iterator[_LargeTensors]:
    """Put placeholders where `model` has tensors of at least `least` bytes, and put the tensors back at the end."""
    large = _LargeTensors([], [])
    numbers: dict[tuple[object, ...], int] = {}
    taken: list[TensorSlot] = []
    try:
        with gc_paused():
            for slot in tensor_slots(model):
                tensor = slot.tensor
                if not _is_large(tensor, max(min_bytes, 1)):
                    continue
                if isinstance(tensor, FileTensor):
                    key: tuple[object, ...] = (tensor.source, tensor.offset, tensor.nbytes, slot.is_initializer)
                else:
                    key = (id(tensor), slot.is_initializer)
                if key not in numbers:
                    numbers[key] = len(large.tensors)
                    large.tensors.append(tensor)
                    if slot.is_initializer:
                        large.initializer_indices.append(numbers[key])
                taken.append(slot)
                slot.replace(_placeholder_tensor(tensor, numbers[key]))
            yield large
    finally:
        for slot in taken:
            slot.replace(slot.tensor)


def _is_large(tensor: ir.TensorProtocol, min_bytes: int) -> bool:
    # The message is at hand, the shape is not, and no element takes more than 8 times its part of the message.
    if isinstance(tensor, ir.TensorProtoTensor) and tensor.raw.ByteSize() * 8 < min_bytes:
        return False
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= min_bytes


def _placeholder_tensor(tensor: ir.TensorProtocol, index: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        protobuf_scan.placeholder(index),
        None,
        None,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _serialize(model: ir.Model) -> bytes:
    try:
        serialised: bytes = ir.serde.serialize_model(model).SerializeToString()
    except ir.serde.SerdeError as error:
        raise ModelError(f"the model cannot be written: {root_cause(error)}", hint="export the model again") from None
    return serialised


def _write_graph(
    path: Path, proto: bytes, large: _LargeTensors, fields: Mapping[int, list[bytes | protobuf_scan.WeightSpan]]
) -> None:
    """Write a graph's file, the tensors that have no `fields` inline."""
    pieces = protobuf_scan.assemble(
        proto, lambda index: fields.get(index) or protobuf_scan.raw_data_field(index, large.tensors[index].nbytes)
    )
    size = protobuf_scan.total_bytes(pieces)
    if size > protobuf_scan.MAX_PROTO_BYTES:
        raise ModelError(
            f"the model needs {size / 1e9:.1f} GB in one file, and an ONNX file holds at most 2.1 GB",
            hint="put its weights into a file of their own",
        )
    with open(path, "r+b", buffering=0) as file:
        for piece in pieces:
            if isinstance(piece, protobuf_scan.WeightSpan):
                _append_tensor(large.tensors[piece.weight_index], file)
            else:
                _write_all(file, piece)


def _store_tensor(tensor: ir.TensorProtocol, store: Path) -> str:
    """Put the bytes of `tensor` into `store`, if they are not there, and return their sha256."""
    if isinstance(tensor, FileTensor) and (known := tensor.digests.get("sha256")) and (store / known).exists():
        return known
    hidden = store / temporary_name(store / "weight")
    digest = hashlib.sha256()
    try:
        with open(hidden, "xb", buffering=0) as file:
            for chunk in _checked_chunks(tensor):
                digest.update(chunk)
                _write_all(file, chunk)
        name = digest.hexdigest()
        if isinstance(tensor, FileTensor):
            tensor.digests["sha256"] = name
        if not (store / name).exists():
            os.replace(hidden, store / name)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(hidden)
    return name


def _append_tensor(tensor: ir.TensorProtocol, file: io.FileIO) -> None:
    """Append the bytes of `tensor`."""
    rest = _checked_chunks(tensor)
    if isinstance(tensor, FileTensor):
        done = _append_with_copy_file_range(tensor, file)
        rest = tensor.source.chunks(tensor.offset + done, tensor.nbytes - done)
    for chunk in rest:
        _write_all(file, chunk)


def _append_with_copy_file_range(tensor: FileTensor, file: io.FileIO) -> int:
    """Append bytes of `tensor` without having them here, and return how many: some filesystems cannot."""
    done = 0
    if hasattr(os, "copy_file_range"):
        with tensor.source.open() as descriptor, suppress(OSError):
            while count := os.copy_file_range(descriptor, file.fileno(), tensor.nbytes - done, tensor.offset + done):
                done += count
    return done


def _checked_chunks(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    """Yield the bytes of `tensor`; raises ModelError where they are not as many as its type and shape say."""
    done = 0
    for chunk in chunks(tensor):
        done += len(chunk)
        yield chunk
    if done != tensor.nbytes:
        spelt = f"{tensor.dtype}{list(tensor.shape.numpy())}"
        raise ModelError(
            f"tensor `{printable(tensor.name)}` is {spelt}: that is {tensor.nbytes} bytes, it has {done}",
            hint="report the pass that made it",
        )


def _write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def _convert_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RyzenError(
            f"cannot write `{printable(path)}`: {error.strerror or error}",
            hint="free some space" if is_disk_full(error) else "choose a folder that exists and can be written to",
        ) from None
