"""Weights that are stored twice: one of them is enough.

Contents are compared only among weights of one type and shape, first by where they lie, then by their first bytes, and by all
of them, a chunk at a time, only where these agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import onnx_ir as ir
from blake3 import blake3

from ryzen_compile.ir.weights import FileTensor, chunks
from ryzen_passes.fold.value_info import SMALL_CONSTANT_BYTES

PREFIX_BYTES = 4096
"""Bytes that are read of each weight that has another one's type and shape."""


def find_duplicates(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield (an initializer of `graph`, an earlier one that holds the same) for those of more than `SMALL` bytes."""
    alike: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if (
            tensor is None
            or value.is_graph_input()
            or tensor.dtype == ir.DataType.STRING
            or tensor.nbytes <= SMALL_CONSTANT_BYTES
        ):
            continue
        alike[tensor.dtype, tuple(tensor.shape)].append(value)
    for values in alike.values():
        yield from _duplicates_among(values)


def _duplicates_among(values: Sequence[ir.Value]) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield the duplicates among values of one type and shape."""
    keepers: dict[Hashable, ir.Value] = {}
    begun: dict[bytes, list[ir.Value]] = defaultdict(list)
    for value in values if len(values) > 1 else ():
        place = _storage_location(value.const_value)
        if keepers.setdefault(place, value) is value:
            begun[_prefix(value.const_value)].append(value)
        elif not value.is_graph_output():
            yield value, keepers[place]
    for suspects in begun.values():
        by_digest: dict[bytes, ir.Value] = {}
        for value in suspects if len(suspects) > 1 else ():
            keeper = by_digest.setdefault(_digest(value.const_value), value)
            if keeper is not value and not value.is_graph_output():
                yield value, keeper


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
