"""Saving of models: the structure is serialized, the weights are streamed from their source."""

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

from ryzen_compile.errors import InvalidGraphError, ModelError, RyzenError, printable
from ryzen_compile.ir import protobuf_scan
from ryzen_compile.ir.gc_pause import gc_paused
from ryzen_compile.ir.load import UNNAMED_GRAPH, root_cause
from ryzen_compile.ir.validity import find_invalidity, find_repeated_node_name
from ryzen_compile.ir.weight_files import WeightFile
from ryzen_compile.ir.weights import FileTensor, TensorSlot, chunks, tensor_slots
from ryzen_compile.utils.atomic_file import atomic_path, temporary_name
from ryzen_compile.utils.files import hash_file, is_disk_full, parallel_map
from ryzen_compile.utils.record import Record

MAX_INLINE_BYTES = 1_500_000_000
"""The maximum size of weights that `auto` keeps inline: protobuf is limited to 2 GiB, and some tools to less."""
_ALIGNMENT = 64
"""The alignment of weights in a data file in bytes, so that a mapping can be read as any element type."""


class StoredWeight(Record, frozen=True):
    """A file of a weight store."""

    path: str
    """Relative to the graph's folder, with `/` as separator."""
    sha256: str
    size_bytes: int


class StoredGraph(Record, frozen=True):
    """A graph file whose weights are in a weight store."""

    sha256: str
    size_bytes: int
    weights: tuple[StoredWeight, ...]
    """The files of the store that the graph reads, without duplicates, sorted by path."""


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    weights: Literal["inline", "external", "linked", "auto"] = "auto",
    check: bool = True,
) -> None:
    """Write `model` to `path` atomically; `model` is not changed.

    `inline` stores the weights in the ONNX file. `external` stores them in one file next to it, named `path` with `.data`
    appended. `auto` is `external` for more than 1.5 GB of weights, else `inline`. A model that overwrites the file from which
    it was loaded must be loaded again. With `check`, the graph must pass `onnx.checker`.

    `linked` is for temporary graphs: it is `external`, but weights that are in files are not copied. The graph refers to hard
    links to these files next to it, where the file system supports that.

    Raises:
        InvalidGraphError: `onnx.checker` refuses the graph.
        ModelError: The model cannot be serialized, or is too large for one file.
        RyzenError: The file cannot be written.
    """
    path = Path(path)
    with _convert_os_errors(path), _detached_tensors(model, protobuf_scan.LARGE_TENSOR_BYTES) as large:
        if weights == "auto":
            weights = "external" if sum(tensor.nbytes for tensor in large.tensors) > MAX_INLINE_BYTES else "inline"
        proto = _serialize(model, check=check)
        if weights == "inline":
            with atomic_path(path) as temporary_path:
                _write_graph(temporary_path, proto, large, {})
        else:
            _save_external(path, proto, large, _linked_weights(path, large) if weights == "linked" else {})


def _save_external(
    path: Path, proto: bytes, large: _LargeTensors, linked: dict[int, list[bytes | protobuf_scan.WeightSpan]]
) -> None:
    """Write a graph and its data file; `linked` has the external data fields of weights that other files hold."""
    data = path.with_name(path.name + ".data")
    fields = dict(linked)
    with atomic_path(path) as temporary_graph:
        with atomic_path(data) as temporary_data, open(temporary_data, "r+b", buffering=0) as file:
            offset = 0
            for index in large.initializer_indices:
                if index in linked:
                    continue
                tensor = large.tensors[index]
                offset += -offset % _ALIGNMENT
                file.seek(offset)
                _append_tensor(tensor, file)
                fields[index] = protobuf_scan.external_data_fields(data.name, offset, tensor.nbytes)
                offset += tensor.nbytes
            file.truncate(offset)
            _write_graph(temporary_graph, proto, large, fields)
            # If the process dies between the two renames, a missing graph is better than a graph with the wrong weights.
            path.unlink(missing_ok=True)


def _linked_weights(path: Path, large: _LargeTensors) -> dict[int, list[bytes | protobuf_scan.WeightSpan]]:
    """Link the files of weights next to `path`, and return the external data fields of the weights whose files were linked."""
    names: dict[WeightFile, str | None] = {}
    fields = {}
    for index in large.initializer_indices:
        tensor = large.tensors[index]
        if not isinstance(tensor, FileTensor):
            continue
        source = tensor.source
        if source not in names:
            name = f"{path.name}.{len(names)}.data"
            names[source] = name if source.link(path.with_name(name)) else None
        if (linked_name := names[source]) is not None:
            fields[index] = protobuf_scan.external_data_fields(linked_name, tensor.offset, tensor.nbytes)
    return fields


def save_to_store(
    model: ir.Model,
    path: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    threshold_bytes: int,
    check: bool = True,
) -> StoredGraph:
    """Write `model` to `path`, and each weight of at least `threshold_bytes` to a file in `store` that is named by its sha256.

    Files that exist in the store are not written again. `store` must be in the folder of `path` or below: ONNX Runtime does not
    read external data from outside the graph's folder. With `check`, the graph must pass `onnx.checker`.

    Raises:
        ValueError: `store` is outside the graph's folder.
        InvalidGraphError: `onnx.checker` refuses the graph.
        ModelError: The model cannot be serialized, or is too large for one file.
        RyzenError: A file cannot be written.
    """
    path, store = Path(path), Path(store)
    relative_store = Path(os.path.relpath(store, path.parent))
    if ".." in relative_store.parts:
        raise ValueError(f"the store {store} is outside the graph's folder {path.parent}")
    with _convert_os_errors(path), _detached_tensors(model, threshold_bytes) as large:
        proto = _serialize(model, check=check)
        store.mkdir(parents=True, exist_ok=True)
        file_tensor_indices = [index for index in large.initializer_indices if isinstance(large.tensors[index], FileTensor)]
        digests = dict(
            zip(
                file_tensor_indices,
                parallel_map(lambda index: _store_tensor(large.tensors[index], store), file_tensor_indices),
                strict=True,
            )
        )
        fields: dict[int, list[bytes | protobuf_scan.WeightSpan]] = {}
        stored: dict[str, StoredWeight] = {}
        for index in large.initializer_indices:
            tensor = large.tensors[index]
            digest = digests.get(index) or _store_tensor(tensor, store)
            weight = StoredWeight(path=(relative_store / digest).as_posix(), sha256=digest, size_bytes=tensor.nbytes)
            stored[weight.path] = weight
            fields[index] = protobuf_scan.external_data_fields(weight.path, 0, weight.size_bytes)
        with atomic_path(path) as temporary_path:
            _write_graph(temporary_path, proto, large, fields)
            sha256, size = hash_file(temporary_path, "sha256"), temporary_path.stat().st_size
    return StoredGraph(sha256=sha256, size_bytes=size, weights=tuple(stored[name] for name in sorted(stored)))


@dataclass
class _LargeTensors:
    """The tensors of a model that are streamed, each byte range once, by placeholder index."""

    tensors: list[ir.TensorProtocol]
    initializer_indices: list[int]
    """The indices of the tensors of initializers; the others are tensors of attributes, which stay in the graph's file."""


@contextmanager
def _detached_tensors(model: ir.Model, min_bytes: int) -> Iterator[_LargeTensors]:
    """Replace tensors of at least `min_bytes` in `model` with placeholders, and restore them at the end of the block."""
    large = _LargeTensors([], [])
    indices: dict[tuple[object, ...], int] = {}
    replaced_slots: list[TensorSlot] = []
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
                if key not in indices:
                    indices[key] = len(large.tensors)
                    large.tensors.append(tensor)
                    if slot.is_initializer:
                        large.initializer_indices.append(indices[key])
                replaced_slots.append(slot)
                slot.replace(_placeholder_tensor(tensor, indices[key]))
            yield large
    finally:
        for slot in replaced_slots:
            slot.replace(slot.tensor)


def _is_large(tensor: ir.TensorProtocol, min_bytes: int) -> bool:
    # Reading the message size is faster than the shape, and no element is more than 8 times larger than its encoding.
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


def check_graph(model: ir.Model) -> None:
    """Raise InvalidGraphError if `onnx.checker` refuses the graph; `model` is not changed."""
    with _detached_tensors(model, protobuf_scan.LARGE_TENSOR_BYTES):
        _serialize(model, check=True)


def _serialize(model: ir.Model, *, check: bool) -> bytes:
    try:
        proto = ir.serde.serialize_model(model)
    except ir.serde.SerdeError as error:
        raise ModelError(f"the model cannot be serialized: {root_cause(error)}", hint="export the model again") from None
    if not proto.graph.name:
        proto.graph.name = UNNAMED_GRAPH
    if check and (problem := find_invalidity(proto)) is not None:
        raise InvalidGraphError(
            f"the graph that was to be written is not valid ONNX: {problem}",
            hint="report this defect",
            is_contradiction="InferenceError]" in problem,
        )
    if check and (name := find_repeated_node_name(proto)) is not None:
        raise InvalidGraphError(f"two nodes of the graph that was to be written are named `{name}`", hint="report this defect")
    serialized: bytes = proto.SerializeToString()
    return serialized


def _write_graph(
    path: Path, proto: bytes, large: _LargeTensors, fields: Mapping[int, list[bytes | protobuf_scan.WeightSpan]]
) -> None:
    """Write a graph's file; tensors without `fields` are written inline."""
    segments = protobuf_scan.assemble(
        proto, lambda index: fields.get(index) or protobuf_scan.raw_data_field(index, large.tensors[index].nbytes)
    )
    size = protobuf_scan.total_bytes(segments)
    if size > protobuf_scan.MAX_PROTO_BYTES:
        raise ModelError(
            f"the model needs {size / 1e9:.1f} GB in one file, but an ONNX file is limited to 2.1 GB",
            hint="save the weights as external data",
        )
    with open(path, "r+b", buffering=0) as file:
        for segment in segments:
            if isinstance(segment, protobuf_scan.WeightSpan):
                _append_tensor(large.tensors[segment.weight_index], file)
            else:
                _write_all(file, segment)


def _store_tensor(tensor: ir.TensorProtocol, store: Path) -> str:
    """Write the bytes of `tensor` to `store` unless the store has them, and return their sha256."""
    if isinstance(tensor, FileTensor) and (cached_digest := tensor.digests.get("sha256")) and (store / cached_digest).exists():
        return cached_digest
    temporary_path = store / temporary_name(store / "weight")
    digest = hashlib.sha256()
    try:
        with open(temporary_path, "xb", buffering=0) as file:
            for chunk in _checked_chunks(tensor):
                digest.update(chunk)
                _write_all(file, chunk)
        name = digest.hexdigest()
        if isinstance(tensor, FileTensor):
            tensor.digests["sha256"] = name
        if not (store / name).exists():
            os.replace(temporary_path, store / name)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary_path)
    return name


def _append_tensor(tensor: ir.TensorProtocol, file: io.FileIO) -> None:
    """Append the bytes of `tensor` to `file`."""
    remaining = _checked_chunks(tensor)
    if isinstance(tensor, FileTensor):
        copied = _append_with_copy_file_range(tensor, file)
        remaining = tensor.source.chunks(tensor.offset + copied, tensor.nbytes - copied)
    for chunk in remaining:
        _write_all(file, chunk)


def _append_with_copy_file_range(tensor: FileTensor, file: io.FileIO) -> int:
    """Append bytes of `tensor` by an in-kernel copy and return their number, which may be 0: not all filesystems support it."""
    copied = 0
    if hasattr(os, "copy_file_range"):
        with tensor.source.open() as descriptor, suppress(OSError):
            while count := os.copy_file_range(descriptor, file.fileno(), tensor.nbytes - copied, tensor.offset + copied):
                copied += count
    return copied


def _checked_chunks(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    """Yield the bytes of `tensor`; raises ModelError if their number does not match its type and shape."""
    actual = 0
    for chunk in chunks(tensor):
        actual += len(chunk)
        yield chunk
    if actual != tensor.nbytes:
        declared = f"{tensor.dtype}{list(tensor.shape.numpy())}"
        raise ModelError(
            f"tensor `{printable(tensor.name)}` of type {declared} must have {tensor.nbytes} bytes (got {actual})",
            hint="report a bug of the pass that created the tensor",
        )


def _write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[file.write(remaining) :]


@contextmanager
def _convert_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RyzenError(
            f"cannot write `{printable(path)}`: {error.strerror or error}",
            hint="free some disk space" if is_disk_full(error) else "choose an existing folder with write permission",
        ) from None
