"""Computing a node whose operands are all constant, with ONNX's own reference implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ryzen_passes.fold.node_reading import Operands
from ryzen_passes.fold.value_info import INTEGERS, Known

Array = np.ndarray[Any, Any]

LIMIT = 1 << 20
"""Most bytes that the operands and the results of a computed node may take together."""
FREE = 1 << 16
"""A result of at most this many bytes is kept although it is larger than its operands."""
GROWTH = 2
"""A larger result may take at most this many times the bytes of its operands."""

MOVING = frozenset(
    """ArgMax ArgMin Cast CastLike Concat ConstantOfShape EyeLike Expand Flatten Gather GatherElements GatherND
    Identity Pad Range ReduceMax ReduceMin Reshape Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze
    Where""".split()
)
ELEMENTWISE = frozenset(
    """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Clip Cos Cosh Div
    Equal Exp Floor Greater GreaterOrEqual IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mod Mul Neg Not Or Pow
    Reciprocal Relu Round Sigmoid Sign Sin Sinh Softplus Sqrt Sub Sum Tan Tanh Xor""".split()
)
SUMMING = frozenset(
    """CumSum Einsum Gemm LogSoftmax MatMul ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean
    ReduceProd ReduceSum ReduceSumSquare Softmax""".split()
)
"""Not in half precision: there the reference rounds each partial sum, which no runtime does."""
COMPUTED = MOVING | ELEMENTWISE | SUMMING
"""What constants are computed from in practice, and what the reference computes with whole arrays rather than element by
element. A DequantizeLinear is not among them: of constants, it is how a quantised weight is written down."""
NATIVE = frozenset(
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


def compute(node: ir.Node, operands: Operands, outputs: Sequence[Known], opset: int) -> list[ir.TensorProtocol] | None:
    """Return the values of the outputs of `node`; None where it is not to be computed, or cannot be."""
    if not _may_be_computed(node, operands, outputs):
        return None
    arrays = [None if known is None or known.tensor is None else known.tensor.numpy() for known in operands]
    if node.op_type in ("Div", "Mod") and arrays[1] is not None and arrays[1].dtype.kind in "iu" and not arrays[1].all():
        return None  # what a division by zero gives is for the runtime to say
    if node.op_type in ("Cast", "CastLike") and arrays[0] is not None and not _is_in_range(arrays[0], outputs[0]):
        return None  # so is what an integer makes of NaN, infinity or too large a number
    results = _evaluate(node, arrays, opset)
    if results is None or not all(_fits(result, known) for result, known in zip(results, outputs, strict=True)):
        return None
    return [ir.Tensor(np.array(result, order="C")) for result in results]


def _may_be_computed(node: ir.Node, operands: Operands, outputs: Sequence[Known]) -> bool:
    given = [known for known in operands if known is not None]
    if node.op_type not in COMPUTED or not given or any(known.tensor is None for known in given):
        return False
    if any(known.dtype not in NATIVE for known in (*given, *outputs)):
        return False
    if node.op_type in SUMMING and any(known.dtype is ir.DataType.FLOAT16 for known in given):
        return False
    if any(attribute.is_ref() or attribute.type in _STRUCTURE for attribute in node.attributes.values()):
        return False
    read = sum(known.tensor.nbytes for known in given if known.tensor is not None)
    written = sum(_bytes(known) for known in outputs)
    return read + written <= LIMIT and (written <= FREE or written <= GROWTH * read)


_STRUCTURE = frozenset(
    {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.SPARSE_TENSOR, ir.AttributeType.TYPE_PROTO}
)


def _bytes(known: Known) -> float:
    if known.dims is None or known.dtype is None:
        return math.inf
    return math.prod(dim if isinstance(dim, int) else math.inf for dim in known.dims) * known.dtype.itemsize


def _is_in_range(array: Array, output: Known) -> bool:
    if array.dtype.kind != "f" or output.dtype not in INTEGERS:
        return True
    bounds = np.iinfo(output.dtype.numpy())
    return bool(np.isfinite(array).all() and (array >= bounds.min).all() and (array < float(bounds.max) + 1).all())


def _fits(result: object, known: Known) -> bool:
    return (
        isinstance(result, (np.ndarray, np.generic))
        and known.dtype is not None
        and result.dtype == known.dtype.numpy()
        and result.shape == known.dims
    )


def _evaluate(node: ir.Node, arrays: Sequence[Array | None], opset: int) -> list[Any] | None:
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
