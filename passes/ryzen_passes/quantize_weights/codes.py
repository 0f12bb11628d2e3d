"""Codes of weights: each block of a weight becomes small integers, or small floats, times one scale, rounded to nearest.

A weight of any rank is read as (leading, length, trailing), where `length` is the axis along which products are summed. A
block is `block` consecutive elements of that axis; its scale is its largest magnitude divided by the largest code. Tensors are
read in slabs, so that memory does not grow with their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.lazy_cast import element_chunks
from ryzen_compile.ir.weights import StreamedTensor, chunks
from ryzen_passes.quantize_weights.scale_search import SHARES, best_candidates, squared_errors

Array = np.ndarray[Any, np.dtype[Any]]

_SLAB_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CodeFormat:
    """The element type of codes."""

    name: str
    dtype: ir.DataType
    lowest: float
    largest: float
    """The range of the codes."""

    @property
    def has_signed_scales(self) -> bool:
        """Whether a scale may be negative, so that `lowest`, of the larger magnitude, stands for any largest magnitude."""
        return self.lowest < -self.largest

    def encode(self, scaled: Array) -> Array:
        """Return the codes of float32 elements that were divided by their scale; modifies `scaled`."""
        if self.dtype == ir.DataType.FLOAT8E4M3FN:
            np.clip(scaled, self.lowest, self.largest, out=scaled)
            return scaled.astype(ml_dtypes.float8_e4m3fn)
        np.rint(scaled, out=scaled)
        np.clip(scaled, self.lowest, self.largest, out=scaled)
        return scaled.astype(np.int8)


FORMATS = {
    "int8": CodeFormat(name="int8", dtype=ir.DataType.INT8, lowest=-127, largest=127),
    "int4": CodeFormat(name="int4", dtype=ir.DataType.INT4, lowest=-7, largest=7),
    "fp8": CodeFormat(name="fp8", dtype=ir.DataType.FLOAT8E4M3FN, lowest=-448, largest=448),
}
SIGNED_INT4 = CodeFormat(name="int4", dtype=ir.DataType.INT4, lowest=-8, largest=7)
"""All 16 codes of 4 bits, with scales of both signs."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the elements of a weight are divided into blocks."""

    leading: int
    length: int
    trailing: int
    size: int
    """The elements of a block; divides `length`."""

    @property
    def scale_shape(self) -> tuple[int, int, int]:
        """The shape of the scales: (leading, blocks, trailing)."""
        return self.leading, self.length // self.size, self.trailing

    @property
    def elements(self) -> int:
        """The number of elements of the weight."""
        return self.leading * self.length * self.trailing


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """The codes and the scales of a weight."""

    codes: ir.TensorProtocol
    scales: Array
    """float32 values that the type of the weight represents, (leading, blocks, trailing)."""
    relative_error: float
    """The Frobenius norm of the difference from the weight, divided by that of the weight; 0 for a weight of zeros."""


def quantize(
    tensor: ir.TensorProtocol, blocks: Blocks, code_format: CodeFormat, *, searches: bool = False
) -> QuantizedWeight | None:
    """Round `tensor` to the nearest codes; None if an element is not finite.

    `tensor` is float32, float16 or bfloat16, and the scales are rounded to its type before the codes are computed. With
    `searches` a scale is the candidate with the smallest error, else that of the largest magnitude.
    """
    extremes = _extremes(tensor, blocks)
    if not np.isfinite(extremes).all():
        return None
    candidates = scale_candidates(extremes, code_format, tensor.dtype.numpy())
    scales = _search(tensor, blocks, code_format, candidates) if searches else candidates[-1]
    codes = CodesTensor(tensor, blocks, scales, code_format)
    return QuantizedWeight(codes=codes, scales=scales, relative_error=codes.relative_error())


def quantized_with_codes(
    tensor: ir.TensorProtocol, blocks: Blocks, code_format: CodeFormat, codes: Array, scales: Array
) -> QuantizedWeight:
    """Return `codes`, float32 values in the shape of `tensor`, with their scales, (leading, blocks, trailing)."""
    squared, total, start = 0.0, 0.0, 0
    flat = codes.reshape(-1)
    for elements, factors in scaled_slabs(tensor, blocks, scales):
        kept = flat[start : start + elements.size].reshape(elements.shape) * factors
        squared, total, start = squared + _squared_norm(elements - kept), total + _squared_norm(elements), start + elements.size
    if code_format.dtype == ir.DataType.INT4:
        packed = ir.PackedTensor(pack_int4(flat.astype(np.int8)), code_format.dtype, shape=ir.Shape(tensor.shape.numpy()))
        stored: ir.TensorProtocol = packed
    else:
        stored = ir.Tensor(codes.astype(code_format.dtype.numpy()), dtype=code_format.dtype)
    return QuantizedWeight(codes=stored, scales=scales, relative_error=math.sqrt(squared / total) if total else 0.0)


def scale_candidates(extremes: Array, code_format: CodeFormat, stored: np.dtype[Any]) -> list[Array]:
    """Return candidates for the scales of blocks whose elements of the largest magnitude are these; the last represents them.

    They are float32 values that the type `stored` represents. The scale of a block of zeros is 1.
    """
    code = code_format.lowest if code_format.has_signed_scales else code_format.largest
    magnitudes = extremes if code_format.has_signed_scales else np.abs(extremes)
    candidates = []
    for share in SHARES:
        scales = (magnitudes * np.float32(share / code)).astype(stored).astype(np.float32)
        scales[scales == 0] = 1.0
        candidates.append(scales)
    return candidates


class CodesTensor(StreamedTensor):
    """The codes of `source` for given scales, in its shape, computed in slabs on each read."""

    __slots__ = ("blocks", "code_format", "scales", "source")

    def __init__(self, source: ir.TensorProtocol, blocks: Blocks, scales: Array, code_format: CodeFormat) -> None:
        super().__init__(self._read, code_format.dtype, ir.Shape(source.shape.numpy()), name=source.name)
        self.source, self.blocks, self.scales, self.code_format = source, blocks, scales, code_format

    def relative_error(self) -> float:
        """Return the error of the codes times the scales, relative to the source, as in `QuantizedWeight`."""
        squared, total = 0.0, 0.0
        for elements, scales in scaled_slabs(self.source, self.blocks, self.scales):
            squared += float(squared_errors(elements, scales, self.code_format.encode).sum())
            total += _squared_norm(elements)
        return math.sqrt(squared / total) if total else 0.0

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in the layout of ONNX raw data, in which two codes of 4 bits share a byte."""
        for elements, scales in scaled_slabs(self.source, self.blocks, self.scales):
            codes = np.ascontiguousarray(self.code_format.encode(elements / scales)).reshape(-1)
            yield (pack_int4(codes) if self.dtype == ir.DataType.INT4 else codes.view(np.uint8)).data

    def _read(self) -> ir.TensorProtocol:
        content = np.frombuffer(self.tobytes(), np.uint8)
        shape = ir.Shape(self.shape.numpy())
        if self.dtype == ir.DataType.INT4:
            return ir.PackedTensor(content, self.dtype, shape=shape, name=self.name)
        return ir.Tensor(content.view(self.dtype.numpy()).reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)


class PackedPairs(StreamedTensor):
    """The bytes of codes of 4 bits as int8, (..., length / 2): the first code of each pair is in the lower half of a byte."""

    __slots__ = ("codes",)

    def __init__(self, codes: ir.TensorProtocol) -> None:
        *leading, length = codes.shape.numpy()
        super().__init__(self._read, ir.DataType.INT8, ir.Shape([*leading, length // 2]), name=codes.name)
        self.codes = codes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes."""
        return chunks(self.codes)

    def _read(self) -> ir.TensorProtocol:
        return ir.Tensor(np.frombuffer(self.tobytes(), np.int8).reshape(self.shape.numpy()), name=self.name)


def scaled_slabs(tensor: ir.TensorProtocol, blocks: Blocks, *per_block: Array) -> Iterator[tuple[Array, ...]]:
    """Yield the elements, (blocks, size, trailing) float32, with views of arrays per block that broadcast to them.

    A slab holds whole blocks or a part of one block. The elements are valid until the next ones are requested.
    """
    flat = [array.reshape(-1, 1, blocks.trailing) for array in per_block]
    block_elements, start = blocks.size * blocks.trailing, 0
    for slab in _slabs(tensor, blocks):
        first, inside = divmod(start, block_elements)
        if inside or slab.size < block_elements:
            yield slab.reshape(1, -1, blocks.trailing), *(array[first : first + 1] for array in flat)
        else:
            count = slab.size // block_elements
            yield slab.reshape(count, blocks.size, blocks.trailing), *(array[first : first + count] for array in flat)
        start += slab.size


def pack_int4(codes: Array) -> Array:
    """Return int8 codes in [-8, 7] packed into uint8: two a byte, the first one in the lower half."""
    halves = codes.astype(np.uint8) & 0x0F
    if halves.size % 2:
        halves = np.append(halves, np.uint8(0))
    return halves[0::2] | (halves[1::2] << 4)


def _extremes(tensor: ir.TensorProtocol, blocks: Blocks) -> Array:
    """Return the element of the largest magnitude of each block, (leading, blocks, trailing); not finite if one is not."""
    highs, lows = np.zeros(blocks.scale_shape, np.float32), np.zeros(blocks.scale_shape, np.float32)
    for elements, high, low in scaled_slabs(tensor, blocks, highs, lows):
        np.maximum(high[:, 0], elements.max(axis=1), out=high[:, 0])
        np.minimum(low[:, 0], elements.min(axis=1), out=low[:, 0])
    return extreme(highs, lows)


def extreme(highs: Array, lows: Array) -> Array:
    """Return the value of the larger magnitude of each pair; NaN if one is."""
    values: Array = np.where((highs >= -lows) | np.isnan(highs), highs, lows)
    return values


def _search(tensor: ir.TensorProtocol, blocks: Blocks, code_format: CodeFormat, candidates: Sequence[Array]) -> Array:
    """Return the candidate with the smallest squared error of each block."""
    errors = [np.zeros(blocks.scale_shape, np.float32) for _ in candidates]
    for elements, *views in scaled_slabs(tensor, blocks, *candidates, *errors):
        for scales, sums in zip(views[: len(candidates)], views[len(candidates) :], strict=True):
            sums[:, 0] += squared_errors(elements, scales, code_format.encode)
    return best_candidates(candidates, errors)


def _squared_norm(elements: Array) -> float:
    flat = elements.reshape(-1)
    return float(np.dot(flat, flat))


def _slabs(tensor: ir.TensorProtocol, blocks: Blocks) -> Iterator[Array]:
    """Yield the elements as flat float32 arrays, each of whole blocks, or of an even number of rows of one large block."""
    sizes = _slab_sizes(blocks)
    size = next(sizes)
    parts: list[Array] = []
    missing = size
    for chunk in element_chunks(tensor):
        while chunk.size >= missing:
            parts.append(chunk[:missing])
            yield np.concatenate(parts).astype(np.float32, copy=False) if len(parts) > 1 else parts[0].astype(np.float32)
            chunk, parts = chunk[missing:], []
            size = next(sizes, 0)
            missing = size
            if not size:
                return
        if chunk.size:
            parts.append(chunk.copy())
            missing -= chunk.size


def _slab_sizes(blocks: Blocks) -> Iterator[int]:
    """Yield the number of elements of each slab."""
    block_elements = blocks.size * blocks.trailing
    if block_elements <= _SLAB_ELEMENTS:
        size = _SLAB_ELEMENTS // block_elements * block_elements
        whole, rest = divmod(blocks.elements, size)
        yield from [size] * whole + [rest] * (rest > 0)
        return
    size = max(2, _SLAB_ELEMENTS // blocks.trailing // 2 * 2) * blocks.trailing
    whole, rest = divmod(block_elements, size)
    for _ in range(blocks.elements // block_elements):
        yield from [size] * whole + [rest] * (rest > 0)
