"""The type and the sizes of what a node computes: by a rule of ours, else asked of ONNX's own shape inference."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from ryzen_compile.ir.analysis.dims import SymbolicDim
from ryzen_passes.fold.node_inputs import Operands
from ryzen_passes.fold.shape_rules import SHAPE_RULES
from ryzen_passes.fold.symbol_table import SymbolTable
from ryzen_passes.fold.value_info import ValueInfo


def infer(node: ir.Node, operands: Operands, symbols: SymbolTable, opset: int) -> list[ValueInfo]:
    """Return what is known of each output of a node of the standard domain."""
    rule = SHAPE_RULES.get(node.op_type)
    outputs = rule(node, operands, symbols) if rule is not None else None
    if outputs is None:
        outputs = _infer_with_onnx(node, operands, symbols, opset)
    outputs = [*outputs, *(ValueInfo() for _ in node.outputs)][: len(node.outputs)]
    for known, value in zip(outputs, node.outputs, strict=True):
        if known.dtype is None and isinstance(value.type, ir.TensorType):
            known.dtype = value.type.dtype
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
    for at, known in enumerate(operands):
        proto.input.append("" if known is None else f"i{at}")
        if known is None:
            continue
        if known.dtype is None:
            return []
        types[f"i{at}"] = _to_type_proto(known, names)
        if (array := known.small_array()) is not None and known.dtype in (
            ir.DataType.INT64,
            ir.DataType.INT32,
            ir.DataType.FLOAT,
        ):
            data[f"i{at}"] = onnx.numpy_helper.from_array(array)
    proto.output.extend(f"o{at}" for at in range(len(node.outputs)))
    proto.attribute.extend(ir.serde.serialize_attribute(attribute) for attribute in node.attributes.values())
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=[onnx.helper.make_opsetid("", opset)]
        )
    except onnx.shape_inference.InferenceError:
        return []
    return [_from_type_proto(inferred.get(f"o{at}"), names, symbols) for at in range(len(node.outputs))]


def _to_type_proto(info: ValueInfo, dims_by_name: dict[str, SymbolicDim]) -> onnx.TypeProto:
    assert info.dtype is not None
    if info.dims is None:
        return onnx.helper.make_tensor_type_proto(info.dtype.value, None)
    spelt: list[int | str] = []
    for dim in info.dims:
        if isinstance(dim, int):
            spelt.append(dim)
        else:
            spelt.append(name := f"d{dim}")
            dims_by_name[name] = dim
    return onnx.helper.make_tensor_type_proto(info.dtype.value, spelt)


def _from_type_proto(proto: onnx.TypeProto | None, dims_by_name: dict[str, SymbolicDim], symbols: SymbolTable) -> ValueInfo:
    if proto is None or not proto.HasField("tensor_type") or not proto.tensor_type.elem_type:
        return ValueInfo()
    dtype = ir.DataType(proto.tensor_type.elem_type)
    if not proto.tensor_type.HasField("shape"):
        return ValueInfo(dtype)
    dims: list[SymbolicDim] = []
    for dim in proto.tensor_type.shape.dim:
        if dim.dim_value > 0:  # what it does not know comes as 0 from some of its rules
            dims.append(dim.dim_value)
        else:
            dims.append(symbols.or_fresh(dims_by_name.get(dim.dim_param)))
    return ValueInfo(dtype, tuple(dims))
