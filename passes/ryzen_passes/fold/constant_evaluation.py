"""Computing a node whose operands are all constant, with ONNX's own reference implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ryzen_passes.fold.node_inputs import Operands
from ryzen_passes.fold.value_info import INTEGER_DTYPES, ValueInfo

Array = np.ndarray[Any, Any]

MAX_TOTAL_BYTES = 1 << 20
"""Most bytes that the operands and the results of a computed node may take together."""
SMALL_RESULT_BYTES = 1 << 16
"""A result of at most this many bytes is kept although it is larger than its operands."""
MAX_GROWTH_FACTOR = 2
"""A larger result may take at most this many times the bytes of its operands."""

DATA_MOVEMENT_OPS = frozenset(
    """ArgMax ArgMin Cast CastLike Concat ConstantOfShape EyeLike Expand Flatten Gather GatherElements GatherND
    Identity Pad Range ReduceMax ReduceMin Reshape Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze
    Where""".split()
)
ELEMENTWISE_OPS = frozenset(
    """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Clip Cos Cosh Div
    Equal Exp Floor Greater GreaterOrEqual IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mod Mul Neg Not Or Pow
    Reciprocal Relu Round Sigmoid Sign Sin Sinh Softplus Sqrt Sub Sum Tan Tanh Xor""".split()
)
ACCUMULATION_OPS = frozenset(
    """CumSum Einsum Gemm LogSoftmax MatMul ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean
    ReduceProd ReduceSum ReduceSumSquare Softmax""".split()
)
"""Not in half precision: there the reference rounds each partial sum, which no runtime does."""
FOLDABLE_OPS = DATA_MOVEMENT_OPS | ELEMENTWISE_OPS | ACCUMULATION_OPS
"""What constants are computed from in practice, and what the reference computes with whole arrays rather than element by
element. A DequantizeLinear is not among them: of constants, it is how a quantised weight is written down."""
NUMPY_DTYPES = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT16,
        ir.DataType.BOOL,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
    }
)
"""The types that numpy computes in."""


def evaluate(node: ir.Node, operands: Operands, outputs: Sequence[ValueInfo], opset: int) -> list[ir.TensorProtocol] | None:
    """Return the values of the outputs of `node`; None where it is not to be computed, or cannot be."""
    if not _is_foldable(node, operands, outputs):
        return None
    arrays = [None if known is None or known.tensor is None else known.tensor.numpy() for known in operands]
    if node.op_type in ("Div", "Mod") and arrays[1] is not None and arrays[1].dtype.kind in "iu" and not arrays[1].all():
        return None  # what a division by zero gives is for the runtime to say
    if node.op_type in ("Cast", "CastLike") and arrays[0] is not None and not _is_cast_in_range(arrays[0], outputs[0]):
        return None  # so is what an integer makes of NaN, infinity or too large a number
    results = _run_reference(node, arrays, opset)
    if results is None or not all(_matches_info(result, known) for result, known in zip(results, outputs, strict=True)):
        return None
    return [ir.Tensor(np.array(result, order="C")) for result in results]


def _is_foldable(node: ir.Node, operands: Operands, outputs: Sequence[ValueInfo]) -> bool:
    given = [known for known in operands if known is not None]
    if node.op_type not in FOLDABLE_OPS or not given or any(known.tensor is None for known in given):
        return False
    if any(known.dtype not in NUMPY_DTYPES for known in (*given, *outputs)):
        return False
    if node.op_type in ACCUMULATION_OPS and any(known.dtype is ir.DataType.FLOAT16 for known in given):
        return False
    if any(attribute.is_ref() or attribute.type in _UNSUPPORTED_ATTRIBUTE_TYPES for attribute in node.attributes.values()):
        return False
    read = sum(known.tensor.nbytes for known in given if known.tensor is not None)
    written = sum(_nbytes(known) for known in outputs)
    return read + written <= MAX_TOTAL_BYTES and (written <= SMALL_RESULT_BYTES or written <= MAX_GROWTH_FACTOR * read)


_UNSUPPORTED_ATTRIBUTE_TYPES = frozenset(
    {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.SPARSE_TENSOR, ir.AttributeType.TYPE_PROTO}
)


def _nbytes(info: ValueInfo) -> float:
    if info.dims is None or info.dtype is None:
        return math.inf
    return math.prod(dim if isinstance(dim, int) else math.inf for dim in info.dims) * info.dtype.itemsize


def _is_cast_in_range(array: Array, output: ValueInfo) -> bool:
    if array.dtype.kind != "f" or output.dtype not in INTEGER_DTYPES:
        return True
    bounds = np.iinfo(output.dtype.numpy())
    return bool(np.isfinite(array).all() and (array >= bounds.min).all() and (array < float(bounds.max) + 1).all())


def _matches_info(result: object, info: ValueInfo) -> bool:
    return (
        isinstance(result, (np.ndarray, np.generic))
        and info.dtype is not None
        and result.dtype == info.dtype.numpy()
        and result.shape == info.dims
    )


def _run_reference(node: ir.Node, arrays: Sequence[Array | None], opset: int) -> list[Any] | None:
    from onnx.reference import ReferenceEvaluator

    names = ["" if array is None else f"i{at}" for at, array in enumerate(arrays)]
    proto = onnx.NodeProto(op_type=node.op_type, input=names, output=[f"o{at}" for at in range(len(node.outputs))])
    proto.attribute.extend(ir.serde.serialize_attribute(attribute) for attribute in node.attributes.values())
    graph = onnx.GraphProto(
        name="constant",
        node=[proto],
        input=[onnx.ValueInfoProto(name=name) for name in names if name],
        output=[onnx.ValueInfoProto(name=name) for name in proto.output],
    )
    model = onnx.ModelProto(graph=graph, opset_import=[onnx.OperatorSetIdProto(version=opset)], ir_version=10)
    feeds = {name: array for name, array in zip(names, arrays, strict=True) if array is not None}
    try:
        with np.errstate(all="ignore"):
            return list(ReferenceEvaluator(model).run(None, feeds))
    except Exception:  # noqa: BLE001  an op or a case that the reference lacks stays as it is; it raises whatever comes up
        return None
