"""Weights that stay in their file until somebody asks for their values."""

from __future__ import annotations

import functools
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.weight_files import WeightFile
from ryzen_compile.utils.files import CHUNK_BYTES

GRAPH_ATTRIBUTE_TYPES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})
_MMAP_MIN_BYTES = 1 << 20
"""Arrays from this many bytes on are mapped, smaller ones are read."""


class FileTensor(ir.LazyTensor):
    """A tensor whose bytes lie in a file, packed and little-endian as ONNX's raw data.

    Nothing is kept: each call reads anew, and the array of a large tensor is a read-only map that goes with the array.
    """

    __slots__ = ("digests", "offset", "source")

    def __init__(self, source: WeightFile, offset: int, dtype: ir.DataType, shape: ir.Shape, **labels: Any) -> None:
        super().__init__(functools.partial(_read_tensor, source, offset, dtype, shape), dtype, shape, **labels)
        self.source = source
        self.offset = offset
        shape.freeze()
        self.digests: dict[str, str] = {}
        """Digests of the bytes that were computed so far, by the algorithm's name."""

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes, each chunk valid until the next is asked for."""
        return self.source.chunks(self.offset, self.nbytes)

    def tobytes(self) -> bytes:
        """Return the bytes."""
        return b"".join(map(bytes, self.chunks()))

    def tofile(self, file: Any) -> None:
        """Write the bytes to `file`."""
        for chunk in self.chunks():
            file.write(chunk)

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
        content, skipped = b"".join(map(bytes, source.chunks(offset, length))), 0
    else:
        skipped = offset % mmap.ALLOCATIONGRANULARITY
        with source.open() as descriptor:
            content = mmap.mmap(descriptor, skipped + length, access=mmap.ACCESS_READ, offset=offset - skipped)
    array = np.frombuffer(content, dtype=dtype.numpy().newbyteorder("<"), offset=skipped, count=count)
    return ir.Tensor(array.reshape(sizes), dtype=dtype)


def chunks(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    """Yield the bytes of any tensor but one of strings, as ONNX's raw data; each chunk valid until the next is asked for."""
    if isinstance(tensor, ir.LazyTensor) and (streamed := getattr(tensor, "chunks", None)) is not None:
        yield from streamed()
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
    """Let the place hold another tensor."""
    is_initializer: bool
    """Or else an attribute."""


def tensor_slots(model: ir.Model) -> Iterator[TensorSlot]:
    """Yield every place that holds a tensor, also in functions and subgraphs."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    while graphs:
        graph = graphs.pop()
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield TensorSlot(value.const_value, functools.partial(setattr, value, "const_value"), is_initializer=True)
        for node in graph:
            for attr in node.attributes.values():
                kind = attr.type
                if kind == ir.AttributeType.TENSOR and not attr.is_ref():
                    yield TensorSlot(
                        attr.value, functools.partial(_set_tensor_attribute, node, attr.name), is_initializer=False
                    )
                elif kind in GRAPH_ATTRIBUTE_TYPES:
                    graphs.extend(attribute_graphs(attr))
                elif kind == ir.AttributeType.TENSORS and not attr.is_ref():
                    for index, tensor in enumerate(attr.value):
                        yield TensorSlot(
                            tensor, functools.partial(_set_tensors_attribute_item, node, attr.name, index), is_initializer=False
                        )


def attribute_graphs(attr: ir.Attr) -> Sequence[ir.Graph]:
    """Return the graphs that an attribute holds."""
    if attr.is_ref():
        return ()
    return (attr.value,) if attr.type == ir.AttributeType.GRAPH else tuple(attr.value)


def _set_tensor_attribute(node: ir.Node, name: str, tensor: ir.TensorProtocol) -> None:
    node.attributes[name] = ir.Attr(name, ir.AttributeType.TENSOR, tensor, doc_string=node.attributes[name].doc_string)


def _set_tensors_attribute_item(node: ir.Node, name: str, index: int, tensor: ir.TensorProtocol) -> None:
    tensors = list(node.attributes[name].value)
    tensors[index] = tensor
    node.attributes[name] = ir.Attr(name, ir.AttributeType.TENSORS, tensors, doc_string=node.attributes[name].doc_string)
