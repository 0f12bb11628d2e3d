"""Infer type and shape of node outputs: by the shape rules of fold, else by the shape inference of ONNX."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from ryzen_compile.ir.analysis.dims import SymbolicDim
from ryzen_compile.ir.analysis.node_inputs import Operands
from ryzen_compile.ir.analysis.shape_rules import SHAPE_RULES
from ryzen_compile.ir.analysis.symbols import SymbolTable
from ryzen_compile.ir.analysis.value_info import ValueInfo


def infer(node: ir.Node, operands: Operands, symbols: SymbolTable, opset: int) -> list[ValueInfo]:
    """Return the inferred info of each output of a node of the standard domain."""
    rule = SHAPE_RULES.get(node.op_type)
    inferred = rule(node, operands, symbols) if rule is not None else None
    outputs = (
        _infer_with_onnx(node, operands, symbols, opset)
        if inferred is None
        else [output.complete(symbols) for output in inferred]
    )
    outputs = [*outputs, *(ValueInfo() for _ in node.outputs)][: len(node.outputs)]
    for info, value in zip(outputs, node.outputs, strict=True):
        if info.dtype is None and isinstance(value.type, ir.TensorType):
            info.dtype = value.type.dtype
    return outputs


def _infer_with_onnx(node: ir.Node, operands: Operands, symbols: SymbolTable, opset: int) -> list[ValueInfo]:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return []
    names: dict[str, SymbolicDim] = {}
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
    for index, info in enumerate(operands):
        proto.input.append("" if info is None else f"i{index}")
        if info is None:
            continue
        if info.dtype is None:
            return []
        types[f"i{index}"] = _to_type_proto(info, names)
        if (array := info.small_array()) is not None and info.dtype in (
            ir.DataType.INT64,
            ir.DataType.INT32,
            ir.DataType.FLOAT,
        ):
            data[f"i{index}"] = onnx.numpy_helper.from_array(array)
    proto.output.extend(f"o{index}" for index in range(len(node.outputs)))
    proto.attribute.extend(ir.serde.serialize_attribute(attribute) for attribute in node.attributes.values())
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=[onnx.helper.make_opsetid("", opset)]
        )
    except onnx.shape_inference.InferenceError:
        return []
    return [_from_type_proto(inferred.get(f"o{index}"), names, symbols) for index in range(len(node.outputs))]


def _to_type_proto(info: ValueInfo, dims_by_name: dict[str, SymbolicDim]) -> onnx.TypeProto:
    assert info.dtype is not None
    if info.dims is None:
        return onnx.helper.make_tensor_type_proto(info.dtype.value, None)
    dims: list[int | str] = []
    for dim in info.dims:
        if isinstance(dim, int):
            dims.append(dim)
        else:
            dims.append(dim_name := f"d{dim}")
            dims_by_name[dim_name] = dim
    return onnx.helper.make_tensor_type_proto(info.dtype.value, dims)


def _from_type_proto(proto: onnx.TypeProto | None, dims_by_name: dict[str, SymbolicDim], symbols: SymbolTable) -> ValueInfo:
    if proto is None or not proto.HasField("tensor_type") or not proto.tensor_type.elem_type:
        return ValueInfo()
    dtype = ir.DataType(proto.tensor_type.elem_type)
    if not proto.tensor_type.HasField("shape"):
        return ValueInfo(dtype)
    dims: list[SymbolicDim] = []
    for dim in proto.tensor_type.shape.dim:
        if dim.dim_value > 0:  # some ONNX rules return 0 for an unknown dim
            dims.append(dim.dim_value)
        else:
            dims.append(symbols.or_fresh(dims_by_name.get(dim.dim_param)))
    return ValueInfo(dtype, tuple(dims))
