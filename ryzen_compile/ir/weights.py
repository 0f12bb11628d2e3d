"""Weights that stay in their file until their values are read."""

from __future__ import annotations

import functools
import math
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.traversal import GRAPH_ATTRIBUTE_TYPES, attribute_graphs, top_level_graphs
from ryzen_compile.ir.weight_files import WeightFile
from ryzen_compile.utils.files import CHUNK_BYTES

_MMAP_MIN_BYTES = 1 << 20
"""Arrays of at least this size are memory-mapped; smaller ones are read."""


class StreamedTensor(ir.LazyTensor):
    """A tensor whose bytes, in the layout of ONNX raw data, are made in chunks each time they are needed."""

    __slots__ = ()

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes; each chunk is valid until the next one is requested."""
        raise NotImplementedError

    def tobytes(self) -> bytes:
        """Return the bytes."""
        return b"".join(map(bytes, self.chunks()))

    def tofile(self, file: Any) -> None:
        """Write the bytes to `file`."""
        for chunk in self.chunks():
            file.write(chunk)


class FileTensor(StreamedTensor):
    """A tensor whose bytes are in a file, in the layout of ONNX raw data: packed and little-endian.

    Nothing is cached: each call reads the file. The array of a large tensor is a read-only mapping, released with the array.
    """

    __slots__ = ("digests", "offset", "source")

    def __init__(self, source: WeightFile, offset: int, dtype: ir.DataType, shape: ir.Shape, **labels: Any) -> None:
        super().__init__(functools.partial(_read_tensor, source, offset, dtype, shape), dtype, shape, **labels)
        self.source = source
        self.offset = offset
        shape.freeze()
        self.digests: dict[str, str] = {}
        """Digests of the bytes that were computed so far, by algorithm name."""

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes; each chunk is valid until the next one is requested."""
        return self.source.chunks(self.offset, self.nbytes)

    def __repr__(self) -> str:
        return f"{self._repr_base()}(name={self.name!r}, file={os.path.basename(self.source.path)!r}, offset={self.offset})"


def _read_tensor(source: WeightFile, offset: int, dtype: ir.DataType, shape: ir.Shape) -> ir.TensorProtocol:
    sizes = tuple(shape.numpy())
    count = math.prod(sizes)
    length = math.ceil(count * dtype.bitwidth / 8)
    if dtype.bitwidth < 8:
        packed = b"".join(map(bytes, source.chunks(offset, length)))
        return ir.PackedTensor(np.frombuffer(packed, dtype=np.uint8), dtype, shape=shape)
    content: Any
    if length < _MMAP_MIN_BYTES:
        content, leading_bytes = b"".join(map(bytes, source.chunks(offset, length))), 0
    else:
        leading_bytes = offset % mmap.ALLOCATIONGRANULARITY
        with source.open() as descriptor:
            content = mmap.mmap(descriptor, leading_bytes + length, access=mmap.ACCESS_READ, offset=offset - leading_bytes)
    array = np.frombuffer(content, dtype=dtype.numpy().newbyteorder("<"), offset=leading_bytes, count=count)
    return ir.Tensor(array.reshape(sizes), dtype=dtype)


def chunks(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in the layout of ONNX raw data; each chunk is valid until the next one is requested.

    String tensors have no raw data and are not supported.
    """
    if isinstance(tensor, StreamedTensor):
        yield from tensor.chunks()
        return
    if tensor.dtype.bitwidth < 8:
        content = memoryview(tensor.tobytes())
    else:
        array = np.ascontiguousarray(tensor.numpy()).reshape(-1)
        content = array.astype(array.dtype.newbyteorder("<"), copy=False).view(np.uint8).data
    for start in range(0, len(content), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES]


class TensorSlot(NamedTuple):
    """A place in a model that holds a tensor."""

    tensor: ir.TensorProtocol
    replace: Callable[[ir.TensorProtocol], None]
    """Put another tensor into this place."""
    is_initializer: bool
    """True for an initializer, False for an attribute of a node."""


def tensor_slots(model: ir.Model) -> Iterator[TensorSlot]:
    """Yield every place that holds a tensor, including those in functions and subgraphs."""
    graphs = [*top_level_graphs(model)]
    while graphs:
        graph = graphs.pop()
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield TensorSlot(value.const_value, functools.partial(setattr, value, "const_value"), is_initializer=True)
        for node in graph:
            for attr in node.attributes.values():
                attr_type = attr.type
                if attr_type == ir.AttributeType.TENSOR and not attr.is_ref():
                    yield TensorSlot(
                        attr.value, functools.partial(_set_tensor_attribute, node, attr.name), is_initializer=False
                    )
                elif attr_type in GRAPH_ATTRIBUTE_TYPES:
                    graphs.extend(attribute_graphs(attr))
                elif attr_type == ir.AttributeType.TENSORS and not attr.is_ref():
                    for index, tensor in enumerate(attr.value):
                        yield TensorSlot(
                            tensor, functools.partial(_set_tensors_attribute_item, node, attr.name, index), is_initializer=False
                        )


def _set_tensor_attribute(node: ir.Node, name: str, tensor: ir.TensorProtocol) -> None:
    node.attributes[name] = ir.Attr(name, ir.AttributeType.TENSOR, tensor, doc_string=node.attributes[name].doc_string)


def _set_tensors_attribute_item(node: ir.Node, name: str, index: int, tensor: ir.TensorProtocol) -> None:
    tensors = list(node.attributes[name].value)
    tensors[index] = tensor
    node.attributes[name] = ir.Attr(name, ir.AttributeType.TENSORS, tensors, doc_string=node.attributes[name].doc_string)
