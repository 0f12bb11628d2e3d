"""Evaluate nodes with constant operands, with the ONNX reference implementation and within limits.

Bytes and operations are estimated before a node is evaluated. A node above a limit stays in the graph. The limits count
operations and not seconds, so that the folded graph does not depend on the machine. Nodes with subgraphs (Loop, Scan, If,
SequenceMap) and calls of local functions are never evaluated, since their number of steps may be unbounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute_or_none
from ryzen_compile.ir.analysis.node_inputs import Operands
from ryzen_compile.ir.analysis.op_traits import ACCUMULATING_REDUCE_OPS, DATA_MOVEMENT_OPS
from ryzen_compile.ir.analysis.value_info import INTEGER_DTYPES, ValueInfo

Array = np.ndarray[Any, Any]

MAX_TOTAL_BYTES = 1 << 20
"""The maximum number of bytes of the operands and results of an evaluated node together: 1 MiB."""
SMALL_RESULT_BYTES = 1 << 16
"""Results up to this many bytes (64 KiB) may have any size relative to the operands."""
MAX_GROWTH_FACTOR = 2
"""Larger results may have at most this many times the bytes of the operands."""
MAX_OPERATIONS = 1 << 28
"""The maximum estimated operation count of an evaluated node: 268 million, at most about 1 s on one core.

One operation reads one operand element in one iteration of the loop nest that defines the op; an elementwise op also counts its
results. Only Einsum can reach the limit with operands of MAX_TOTAL_BYTES.
"""
MAX_PASS_OPERATIONS = 1 << 32
"""The maximum estimated operation count of all nodes that one run of the pass evaluates: 4.3 billion.

That takes about 10 s on one core for arithmetic ops, and up to 1 minute for the slowest elementwise ops (float16).
"""
MAX_PASS_RESULT_BYTES = 1 << 30
"""The maximum number of bytes of all results that one run of the pass computes: 1 GiB."""

MOVEMENT_OPS = (DATA_MOVEMENT_OPS - {"DepthToSpace", "ReverseSequence", "SpaceToDepth"}) | frozenset(
    "ArgMax ArgMin Cast CastLike ConstantOfShape EyeLike Range ReduceMax ReduceMin Shape Size Where".split()
)
ELEMENTWISE_OPS = frozenset(
    """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Clip Cos Cosh Div
    Equal Exp Floor Greater GreaterOrEqual IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mod Mul Neg Not Or Pow
    Reciprocal Relu Round Sigmoid Sign Sin Sinh Softplus Sqrt Sub Sum Tan Tanh Xor""".split()
)
ACCUMULATION_OPS = ACCUMULATING_REDUCE_OPS | {"CumSum", "Einsum", "Gemm", "LogSoftmax", "MatMul", "Softmax"}
"""Ops that are not evaluated in half precision: the reference rounds each partial sum, which no runtime does."""
FOLDABLE_OPS = MOVEMENT_OPS | ELEMENTWISE_OPS | ACCUMULATION_OPS
"""Ops that occur with constant operands in practice, and that the reference evaluates with array operations instead of a loop
over elements. DequantizeLinear is not included: with constant operands it represents a quantized weight."""
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
"""The element types that numpy supports natively."""


@dataclass(frozen=True)
class LimitExceeded:
    """The reason why a node with constant operands stays in the graph."""

    reason: str


@dataclass
class EvaluationBudget:
    """The operations and result bytes that are left for one run of the pass."""

    operations: float = MAX_PASS_OPERATIONS
    result_bytes: float = MAX_PASS_RESULT_BYTES

    def spend(self, operations: float, result_bytes: float) -> LimitExceeded | None:
        """Subtract the cost of one node; return the limit and leave the budget unchanged if it is not sufficient."""
        if operations > self.operations:
            return LimitExceeded(f"the run of the pass has reached its limit of {MAX_PASS_OPERATIONS:,} operations")
        if result_bytes > self.result_bytes:
            return LimitExceeded(f"the run of the pass has reached its limit of {MAX_PASS_RESULT_BYTES:,} result bytes")
        self.operations -= operations
        self.result_bytes -= result_bytes
        return None


def evaluate(
    node: ir.Node, operands: Operands, outputs: Sequence[ValueInfo], opset: int, budget: EvaluationBudget
) -> list[ir.TensorProtocol] | LimitExceeded | None:
    """Return the output tensors of `node` and subtract its cost from `budget`.

    Return the exceeded limit if the node is too large, None if it must not or cannot be evaluated for another reason.
    """
    if not _is_foldable(node, operands, outputs):
        return None
    if (exceeded := _check_limits(node, operands, outputs, budget)) is not None:
        return exceeded
    arrays = [None if info is None or info.tensor is None else info.tensor.numpy() for info in operands]
    if node.op_type in ("Div", "Mod") and arrays[1] is not None and arrays[1].dtype.kind in "iu" and not arrays[1].all():
        return None  # the result of an integer division by zero depends on the runtime
    if node.op_type in ("Cast", "CastLike") and arrays[0] is not None and not _is_cast_in_range(arrays[0], outputs[0]):
        return None  # so does an integer cast of NaN, infinity or an out-of-range value
    results = _run_reference(node, arrays, opset)
    if results is None or not all(_matches_info(result, info) for result, info in zip(results, outputs, strict=True)):
        return None
    return [ir.Tensor(np.array(result, order="C")) for result in results]


def _is_foldable(node: ir.Node, operands: Operands, outputs: Sequence[ValueInfo]) -> bool:
    present_operands = [info for info in operands if info is not None]
    if node.op_type not in FOLDABLE_OPS or not present_operands or any(info.tensor is None for info in present_operands):
        return False
    if any(info.dtype not in NUMPY_DTYPES for info in (*present_operands, *outputs)):
        return False
    if node.op_type in ACCUMULATION_OPS and any(info.dtype is ir.DataType.FLOAT16 for info in present_operands):
        return False
    if any(attribute.is_ref() or attribute.type in _UNSUPPORTED_ATTRIBUTE_TYPES for attribute in node.attributes.values()):
        return False
    return all(math.isfinite(_nbytes(info)) for info in outputs)


def _check_limits(
    node: ir.Node, operands: Operands, outputs: Sequence[ValueInfo], budget: EvaluationBudget
) -> LimitExceeded | None:
    operand_bytes = sum(info.tensor.nbytes for info in operands if info is not None and info.tensor is not None)
    result_bytes = sum(_nbytes(info) for info in outputs)
    if operand_bytes + result_bytes > MAX_TOTAL_BYTES:
        return LimitExceeded(
            f"operands and results take {operand_bytes + result_bytes:,.0f} bytes, the limit is {MAX_TOTAL_BYTES:,}"
        )
    if result_bytes > SMALL_RESULT_BYTES and result_bytes > MAX_GROWTH_FACTOR * operand_bytes:
        limit = max(SMALL_RESULT_BYTES, MAX_GROWTH_FACTOR * operand_bytes)
        return LimitExceeded(f"the results take {result_bytes:,.0f} bytes, the limit is {limit:,.0f} for these operands")
    operations = _operation_count(node, operands, outputs)
    if operations > MAX_OPERATIONS:
        return LimitExceeded(f"it takes about {operations:.2g} operations, the limit is {MAX_OPERATIONS:,}")
    return budget.spend(operations, result_bytes)


def _operation_count(node: ir.Node, operands: Operands, outputs: Sequence[ValueInfo]) -> float:
    """Return an upper bound of the number of operations; see MAX_OPERATIONS."""
    shapes = [_static_dims(info) for info in operands if info is not None]
    result_elements = sum(math.prod(_static_dims(info)) for info in outputs)
    if node.op_type == "Einsum":
        return _einsum_operation_count(node.attributes.get_string("equation", ""), shapes)
    if node.op_type in ("MatMul", "Gemm") and shapes[0]:
        is_transposed = node.op_type == "Gemm" and int_attribute_or_none(node, "transA", 0)
        return result_elements * shapes[0][0 if is_transposed else -1] * len(shapes)
    return sum(map(math.prod, shapes)) + result_elements


def _einsum_operation_count(equation: str, shapes: Sequence[Sequence[int]]) -> float:
    """Return the operation count of an Einsum that iterates over all of its indices at once.

    numpy contracts pairs of operands instead if that needs no large intermediate tensor, but that is not guaranteed.
    """
    sizes: dict[str | int, int] = {}
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term, shape in zip(terms, shapes, strict=False):
        before, ellipsis, after = term.partition("...")
        axes: list[str | int] = [*before, *range(len(before) + len(after) - len(shape), 0), *after] if ellipsis else [*before]
        for axis, size in zip(axes, shape, strict=False):
            sizes[axis] = max(sizes.get(axis, 1), size)
    return math.prod(sizes.values()) * len(shapes)


def _static_dims(info: ValueInfo) -> tuple[int, ...]:
    return tuple(dim for dim in info.dims or () if isinstance(dim, int))


_UNSUPPORTED_ATTRIBUTE_TYPES = frozenset(
    {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.SPARSE_TENSOR, ir.AttributeType.TYPE_PROTO}
)


def _nbytes(info: ValueInfo) -> float:
    """Return the size of a tensor; infinity if it is unknown or invalid."""
    if info.dims is None or info.dtype is None or not all(isinstance(dim, int) and dim >= 0 for dim in info.dims):
        return math.inf
    return math.prod(_static_dims(info)) * info.dtype.itemsize


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

    names = ["" if array is None else f"i{index}" for index, array in enumerate(arrays)]
    proto = onnx.NodeProto(op_type=node.op_type, input=names, output=[f"o{index}" for index in range(len(node.outputs))])
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
    except Exception:  # noqa: BLE001  the reference raises any exception for an op or a case that it does not support
        return None
