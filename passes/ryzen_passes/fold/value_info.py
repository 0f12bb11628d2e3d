"""What is known of a value before the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.dims import SymbolicDim, SymbolicDims

ElementValues = tuple[SymbolicDim, ...]
"""The elements of a small integer or boolean tensor of rank 0 or 1."""

SMALL_CONSTANT_BYTES = 4096
"""Constants of at most this many bytes are read whenever that helps; those above, only to be computed with."""
MAX_TRACKED_ELEMENTS = 256
"""Longer tensors are not followed element by element."""

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
"""The types in which exporters compute shapes."""


@dataclass(slots=True)
class ValueInfo:
    """What is known of one value; None is: not known."""

    dtype: ir.DataType | None = None
    dims: SymbolicDims | None = None
    elements: ElementValues | None = None
    tensor: ir.TensorProtocol | None = None
    """Its value, where that is constant. Reading it may mean reading a file."""

    def small_array(self) -> np.ndarray[Any, Any] | None:
        """Return the value of a small constant, else None."""
        if self.tensor is None or self.tensor.nbytes > SMALL_CONSTANT_BYTES:
            return None
        return self.tensor.numpy()

    def ints(self) -> tuple[int, ...] | None:
        """Return the elements, where all of them are known numbers."""
        if self.elements is None or not all(isinstance(element, int) for element in self.elements):
            return None
        return self.elements  # type: ignore[return-value]


def constant_info(tensor: ir.TensorProtocol) -> ValueInfo:
    """Return all that is known of a constant."""
    dims = tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]
    content = None
    if len(dims) < 2 and tensor.dtype in SHAPE_DTYPES and (not dims or dims[0] <= MAX_TRACKED_ELEMENTS):
        content = tuple(tensor.numpy().reshape(-1).tolist())
    return ValueInfo(tensor.dtype, dims, content, tensor)


def constant_node_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """Return what a Constant node holds; None where it is sparse, a string, or taken from an attribute of a function."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        if name == "value":
            tensor: ir.TensorProtocol = (
                attribute.value
            )  # `as_tensor` checks the protocol, which takes longer than all else here
            return None if tensor.dtype == ir.DataType.STRING else tensor
        if name in ("value_int", "value_ints"):
            return ir.Tensor(np.array(attribute.value, np.int64))
        if name in ("value_float", "value_floats"):
            return ir.Tensor(np.array(attribute.value, np.float32))
    return None
