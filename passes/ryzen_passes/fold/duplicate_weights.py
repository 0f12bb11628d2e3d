"""Find weights that are stored more than once.

Only weights of equal type and shape are compared: first by storage location, then by their first bytes, and only if these are
equal by a digest of all bytes, which are read in chunks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import onnx_ir as ir
from blake3 import blake3

from ryzen_compile.ir.analysis.value_info import SMALL_CONSTANT_BYTES
from ryzen_compile.ir.weights import FileTensor, chunks

PREFIX_BYTES = 4096
"""The number of bytes to read from each weight that shares its type and shape with another one."""


def find_duplicates(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield (initializer, equal earlier initializer) for the initializers of `graph` above SMALL_CONSTANT_BYTES bytes."""
    by_type_and_shape: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if (
            tensor is None
            or value.is_graph_input()
            or tensor.dtype == ir.DataType.STRING
            or tensor.nbytes <= SMALL_CONSTANT_BYTES
        ):
            continue
        by_type_and_shape[tensor.dtype, tuple(tensor.shape)].append(value)
    for values in by_type_and_shape.values():
        yield from _duplicates_among(values)


def _duplicates_among(values: Sequence[ir.Value]) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield the duplicates among values of equal type and shape."""
    by_location: dict[Hashable, ir.Value] = {}
    by_prefix: dict[bytes, list[ir.Value]] = defaultdict(list)
    for value in values if len(values) > 1 else ():
        location = _storage_location(value.const_value)
        if by_location.setdefault(location, value) is value:
            by_prefix[_prefix(value.const_value)].append(value)
        elif not value.is_graph_output():
            yield value, by_location[location]
    for candidates in by_prefix.values():
        by_digest: dict[bytes, ir.Value] = {}
        for value in candidates if len(candidates) > 1 else ():
            first = by_digest.setdefault(_digest(value.const_value), value)
            if first is not value and not value.is_graph_output():
                yield value, first


def _storage_location(tensor: ir.TensorProtocol | None) -> Hashable:
    if isinstance(tensor, FileTensor):
        return (tensor.source, tensor.offset)
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.path, tensor.offset)
    return id(tensor)


def _prefix(tensor: ir.TensorProtocol | None) -> bytes:
    if isinstance(tensor, FileTensor):
        return b"".join(map(bytes, tensor.source.chunks(tensor.offset, PREFIX_BYTES)))
    assert tensor is not None
    return bytes(next(chunks(tensor))[:PREFIX_BYTES])


def _digest(tensor: ir.TensorProtocol | None) -> bytes:
    assert tensor is not None
    if isinstance(tensor, FileTensor) and "blake3" in tensor.digests:
        return bytes.fromhex(tensor.digests["blake3"])
    digest = blake3()
    for chunk in chunks(tensor):
        digest.update(chunk)
    if isinstance(tensor, FileTensor):
        tensor.digests["blake3"] = digest.hexdigest()
    return bytes(digest.digest())
