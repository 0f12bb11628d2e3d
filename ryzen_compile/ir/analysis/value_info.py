"""Static information about a value: element type, symbolic dims, elements, constant tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.dims import SymbolicDim, SymbolicDims

ElementValues = tuple[SymbolicDim, ...]
"""The elements of a small integer or boolean tensor of rank 0 or 1."""

SMALL_CONSTANT_BYTES = 4096
"""Constants up to this many bytes (4 KiB) are read whenever useful, larger ones only to evaluate a node."""
MAX_TRACKED_ELEMENTS = 256
"""The maximum number of elements of a tensor whose elements are tracked."""

INTEGER_DTYPES = frozenset(
    {
        ir.DataType.INT64,
        ir.DataType.INT32,
        ir.DataType.INT16,
        ir.DataType.INT8,
        ir.DataType.UINT64,
        ir.DataType.UINT32,
        ir.DataType.UINT16,
        ir.DataType.UINT8,
    }
)
SHAPE_DTYPES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
"""The element types of shape computations."""


@dataclass(slots=True)
class ValueInfo:
    """The static information about one value; None means unknown."""

    dtype: ir.DataType | None = None
    dims: SymbolicDims | None = None
    elements: ElementValues | None = None
    tensor: ir.TensorProtocol | None = None
    """The constant tensor of the value. Reading its data may read a file."""

    def small_array(self) -> np.ndarray[Any, Any] | None:
        """Return the array of a constant up to SMALL_CONSTANT_BYTES, else None."""
        if self.tensor is None or self.tensor.nbytes > SMALL_CONSTANT_BYTES:
            return None
        return self.tensor.numpy()

    def ints(self) -> tuple[int, ...] | None:
        """Return the elements if all of them are numbers, else None."""
        if self.elements is None or not all(isinstance(element, int) for element in self.elements):
            return None
        return self.elements  # type: ignore[return-value]


def constant_info(tensor: ir.TensorProtocol) -> ValueInfo:
    """Return the info of a constant."""
    dims = tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]
    elements = None
    if len(dims) < 2 and tensor.dtype in SHAPE_DTYPES and (not dims or dims[0] <= MAX_TRACKED_ELEMENTS):
        elements = tuple(tensor.numpy().reshape(-1).tolist())
    return ValueInfo(tensor.dtype, dims, elements, tensor)
