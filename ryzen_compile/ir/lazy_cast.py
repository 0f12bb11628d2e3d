"""Tensors read as another element type, a piece at a time, so that no weight is ever held whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.weights import chunks

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK_ELEMENTS = 1 << 20
"""Elements converted at once."""
_SMALL_TENSOR_BYTES = 1 << 16
"""Tensors below this many bytes are read at once."""


def element_chunks(tensor: ir.TensorProtocol) -> Iterator[Array]:
    """Yield the elements of `tensor`, flat and in order, each piece valid until the next is asked for."""
    if isinstance(tensor, LazyCastTensor):
        for piece in element_chunks(tensor.source):
            yield tensor.convert(piece)
        return
    if tensor.dtype.bitwidth < 8 or tensor.nbytes < _SMALL_TENSOR_BYTES:
        if tensor.size:
            yield tensor.numpy().reshape(-1)
        return
    dtype = tensor.dtype.numpy().newbyteorder("<")
    rest = b""
    for chunk in chunks(tensor):
        content = memoryview(rest + bytes(chunk)) if rest else chunk
        count = len(content) // dtype.itemsize
        rest = bytes(content[count * dtype.itemsize :])
        flat = np.frombuffer(content, dtype=dtype, count=count)
        for start in range(0, count, _CHUNK_ELEMENTS):
            yield flat[start : start + _CHUNK_ELEMENTS]


class LazyCastTensor(ir.LazyTensor):
    """`source` read as `dtype`: rounded to the nearest, and first pulled into +-`bound` where one is given.

    Infinities and NaN stay what they are. Nothing is converted before it is read, and nothing is kept.
    """

    __slots__ = ("bound", "source")

    def __init__(self, source: ir.TensorProtocol, dtype: ir.DataType, *, bound: float | None = None) -> None:
        super().__init__(self._read, dtype, ir.Shape(source.shape.numpy()), name=source.name)
        self.source = source
        self.bound = bound

    def convert(self, chunk: Array) -> Array:
        """Return the elements of `piece`, which are of the source's type, as this tensor holds them."""
        if self.bound is not None:
            chunk = np.where(np.isfinite(chunk), np.clip(chunk, -self.bound, self.bound), chunk)
        with np.errstate(over="ignore", invalid="ignore"):
            return chunk.astype(self.dtype.numpy())

    def _read(self) -> ir.TensorProtocol:
        flat = np.empty(self.source.size, dtype=self.dtype.numpy())
        filled = 0
        for piece in element_chunks(self):
            flat[filled : filled + piece.size] = piece
            filled += piece.size
        return ir.Tensor(flat.reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes as ONNX's raw data."""
        for piece in element_chunks(self):
            yield np.ascontiguousarray(piece).view(np.uint8).data

    def tofile(self, file: Any) -> None:
        """Write the bytes to `file`, piece by piece."""
        for chunk in self.chunks():
            file.write(chunk)


def max_magnitude(tensor: ir.TensorProtocol) -> float:
    """Return the largest absolute value among the finite elements of a float tensor, 0 where there is none."""
    largest = 0.0
    for piece in element_chunks(tensor):
        found = max(abs(float(piece.min())), abs(float(piece.max())))
        if not np.isfinite(found):
            finite = piece[np.isfinite(piece)]
            found = float(np.abs(finite).max()) if finite.size else 0.0
        largest = max(largest, found)
    return largest
