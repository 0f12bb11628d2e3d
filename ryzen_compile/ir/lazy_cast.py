"""Tensors that are cast to another element type in chunks while they are read, so that no weight is fully in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.weights import StreamedTensor, chunks

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK_ELEMENTS = 1 << 20
"""Elements that are converted per chunk."""
_SMALL_TENSOR_BYTES = 1 << 16
"""Tensors below this size are read in one chunk."""


def element_chunks(tensor: ir.TensorProtocol) -> Iterator[Array]:
    """Yield the elements of `tensor` as flat arrays in row-major order; each is valid until the next one is requested."""
    if isinstance(tensor, LazyCastTensor):
        for chunk in element_chunks(tensor.source):
            yield tensor.convert(chunk)
        return
    if tensor.dtype.bitwidth < 8 or tensor.nbytes < _SMALL_TENSOR_BYTES:
        if tensor.size:
            yield tensor.numpy().reshape(-1)
        return
    dtype = tensor.dtype.numpy().newbyteorder("<")
    remainder = b""
    for data in chunks(tensor):
        content = memoryview(remainder + bytes(data)) if remainder else data
        count = len(content) // dtype.itemsize
        remainder = bytes(content[count * dtype.itemsize :])
        flat = np.frombuffer(content, dtype=dtype, count=count)
        for start in range(0, count, _CHUNK_ELEMENTS):
            yield flat[start : start + _CHUNK_ELEMENTS]


class LazyCastTensor(StreamedTensor):
    """A view of `source` as `dtype`: values are clipped to [-bound, bound] if `bound` is set, then rounded to nearest even.

    Infinities and NaN are kept. Conversion happens on each read, and no result is cached.
    """

    __slots__ = ("bound", "source")

    def __init__(self, source: ir.TensorProtocol, dtype: ir.DataType, *, bound: float | None = None) -> None:
        super().__init__(self._read, dtype, ir.Shape(source.shape.numpy()), name=source.name)
        self.source = source
        self.bound = bound

    def convert(self, chunk: Array) -> Array:
        """Return `chunk`, elements of the source's type, converted to this tensor's type."""
        if self.bound is not None:
            chunk = np.where(np.isfinite(chunk), np.clip(chunk, -self.bound, self.bound), chunk)
        with np.errstate(over="ignore", invalid="ignore"):
            return chunk.astype(self.dtype.numpy())

    def _read(self) -> ir.TensorProtocol:
        flat = np.empty(self.source.size, dtype=self.dtype.numpy())
        filled = 0
        for chunk in element_chunks(self):
            flat[filled : filled + chunk.size] = chunk
            filled += chunk.size
        return ir.Tensor(flat.reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in the layout of ONNX raw data."""
        for chunk in element_chunks(self):
            yield np.ascontiguousarray(chunk).view(np.uint8).data


def max_magnitude(tensor: ir.TensorProtocol) -> float:
    """Return the largest absolute value of the finite elements of a float tensor, or 0 if it has no finite element."""
    largest = 0.0
    for chunk in element_chunks(tensor):
        magnitude = max(abs(float(chunk.min())), abs(float(chunk.max())))
        if not np.isfinite(magnitude):
            finite = chunk[np.isfinite(chunk)]
            magnitude = float(np.abs(finite).max()) if finite.size else 0.0
        largest = max(largest, magnitude)
    return largest
