"""Element type inference: the type of every tensor of a graph, declared or inferred from op signatures."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from ryzen_compile import registry
from ryzen_compile.ir.analysis.block_quantized import TYPE_SOURCE_INPUTS, op_key
from ryzen_compile.ir.traversal import node_subgraphs
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import TensorParam

ElementTypes = dict[ir.Value, ir.DataType]

HALF_TYPES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""The half-precision types."""

DTYPE_ATTRIBUTES = {
    "Cast": "to",
    "BitCast": "to",
    "LayerNormalization": "stash_type",
    "RandomNormal": "dtype",
    "RandomUniform": "dtype",
    "RandomNormalLike": "dtype",
    "RandomUniformLike": "dtype",
    "EyeLike": "dtype",
    "Bernoulli": "dtype",
    "Multinomial": "dtype",
    "HannWindow": "output_datatype",
    "HammingWindow": "output_datatype",
    "BlackmanWindow": "output_datatype",
    "MelWeightMatrix": "output_datatype",
    "QuantizeLinear": "output_dtype",
    "DequantizeLinear": "output_dtype",
}
"""The attribute of each standard op that specifies its output type."""

_DEFAULT_OUTPUT_TYPES = {
    "LayerNormalization": ir.DataType.FLOAT,
    "RandomNormal": ir.DataType.FLOAT,
    "RandomUniform": ir.DataType.FLOAT,
    "HannWindow": ir.DataType.FLOAT,
    "HammingWindow": ir.DataType.FLOAT,
    "BlackmanWindow": ir.DataType.FLOAT,
    "MelWeightMatrix": ir.DataType.FLOAT,
    "Multinomial": ir.DataType.INT32,
    "ConstantOfShape": ir.DataType.FLOAT,
}
_TYPE_SOURCE_INPUTS = {"RandomNormalLike": 0, "RandomUniformLike": 0, "EyeLike": 0, "Bernoulli": 0, "DequantizeLinear": 1}


@dataclass(frozen=True)
class FormalParameter:
    """A formal input or output of an op."""

    type_variable: str
    """`?` for a parameter that shares its type with no other."""
    allowed_types: frozenset[ir.DataType]
    """The element types that the type variable can be bound to."""


@dataclass(frozen=True)
class OpSignature:
    """The formal inputs and outputs of an op."""

    inputs: tuple[FormalParameter, ...]
    outputs: tuple[FormalParameter, ...]
    variadic: tuple[bool, bool] = (False, False)
    """Whether the last input and the last output may repeat."""

    def bind(self, node: ir.Node) -> tuple[Sequence[FormalParameter], Sequence[FormalParameter]]:
        """Return the formal parameter of each input and of each output of `node`."""
        return (
            _expand_formals(self.inputs, len(node.inputs), self.variadic[0]),
            _expand_formals(self.outputs, len(node.outputs), self.variadic[1]),
        )


def _expand_formals(formals: tuple[FormalParameter, ...], count: int, variadic: bool) -> Sequence[FormalParameter]:
    if count <= len(formals):
        return formals[:count]
    last = formals[-1] if formals and variadic else FormalParameter("?", frozenset())
    return (*formals, *[last] * (count - len(formals)))


def is_standard_op(node: ir.Node) -> bool:
    """Tell whether `node` is an op of the default ONNX domain."""
    return node.domain in ("", "ai.onnx")


def op_signature(node: ir.Node, opsets: Mapping[str, int]) -> OpSignature | None:
    """Return the signature of the op of `node`, or None if it is neither an ONNX op nor a registered op."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opsets.get(domain, opsets.get("ai.onnx", 0) if domain == "" else 0)
    return _schema_signature(domain, node.op_type, version) or _registered_signature(domain, node.op_type)


@functools.cache
def _schema_signature(domain: str, op_type: str, version: int) -> OpSignature | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    type_constraints = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic

    def formal_parameters(formals: Sequence[onnx.defs.OpSchema.FormalParameter]) -> tuple[FormalParameter, ...]:
        return tuple(
            FormalParameter(
                # Repetitions of a heterogeneous variadic parameter do not share a type.
                formal.type_str if formal.is_homogeneous else "?",
                _parse_tensor_types(type_constraints.get(formal.type_str, [formal.type_str])),
            )
            for formal in formals
        )

    def is_variadic(formals: Sequence[onnx.defs.OpSchema.FormalParameter]) -> bool:
        return bool(formals) and formals[-1].option == variadic

    return OpSignature(
        formal_parameters(schema.inputs),
        formal_parameters(schema.outputs),
        variadic=(is_variadic(schema.inputs), is_variadic(schema.outputs)),
    )


def _parse_tensor_types(type_strings: Iterable[str]) -> frozenset[ir.DataType]:
    # Sequences and optionals are not plain tensors and have no element type here.
    return frozenset(
        ir.DataType[type_string[len("tensor(") : -1].upper()]
        for type_string in type_strings
        if type_string.startswith("tensor(")
    )


@functools.cache
def _registered_signature(domain: str, op_type: str) -> OpSignature | None:
    op = registry.ops().get(op_type)
    if op is None or op.domain != domain:
        return None

    def formal_parameter(param: TensorParam) -> FormalParameter:
        element_names = op.type_constraints.get(param.type_str, (param.type_str,))
        return FormalParameter(
            param.type_str, frozenset(ir.DataType.from_numpy(numpy_dtype(element_name)) for element_name in element_names)
        )

    return OpSignature(tuple(map(formal_parameter, op.inputs)), tuple(map(formal_parameter, op.outputs)))


def element_types(model: ir.Model) -> ElementTypes:
    """Return the element type of every tensor of the main graph and its subgraphs.

    Declared types take precedence. All others are inferred from op signatures and from the bodies of model functions. Values
    that are not tensors or whose type cannot be inferred are omitted. Takes one pass over the nodes.
    """
    types: ElementTypes = {}
    _TypeInference(model).infer_graph(model.graph, types)
    return types


def annotate_types(types: ElementTypes) -> None:
    """Set the type of each value without a type to its element type in `types`."""
    for value, dtype in types.items():
        if value.type is None:
            value.type = ir.TensorType(dtype)


class _TypeInference:
    def __init__(self, model: ir.Model) -> None:
        self.functions = model.functions
        self.opsets = model.graph.opset_imports
        self.function_results: dict[tuple[object, ...], list[ir.DataType | None]] = {}

    def infer_graph(self, graph: ir.Graph | ir.Function, types: ElementTypes) -> None:
        values = list(graph.inputs)
        if isinstance(graph, ir.Graph):
            values += graph.initializers.values()
        for value in values:
            self.record_type(value, None, types)
        for node in graph:
            self.infer_node(node, types)

    def record_type(self, value: ir.Value, inferred: ir.DataType | None, types: ElementTypes) -> None:
        if value.type is not None:
            if isinstance(value.type, ir.TensorType):
                types[value] = value.type.dtype
        elif value.const_value is not None:
            types[value] = value.const_value.dtype
        elif inferred is not None:
            types.setdefault(value, inferred)

    def infer_node(self, node: ir.Node, types: ElementTypes) -> None:
        subgraphs = node_subgraphs(node)
        for graph in subgraphs:
            self.record_body_inputs(node, graph, types)
            self.infer_graph(graph, types)
        for output, inferred in zip(node.outputs, self.output_types(node, subgraphs, types), strict=False):
            self.record_type(output, inferred, types)

    def record_body_inputs(self, node: ir.Node, body: ir.Graph, types: ElementTypes) -> None:
        """Record the types of the inputs of a Loop or Scan body: a Loop passes its iteration number and condition first."""
        leading_inputs = 2 if node.op_type == "Loop" else 0
        for value, inferred in zip(body.inputs[:leading_inputs], (ir.DataType.INT64, ir.DataType.BOOL), strict=False):
            self.record_type(value, inferred, types)
        for value, source in zip(body.inputs[leading_inputs:], node.inputs[leading_inputs:], strict=False):
            self.record_type(value, types.get(source) if source is not None else None, types)

    def output_types(self, node: ir.Node, subgraphs: Sequence[ir.Graph], types: ElementTypes) -> Sequence[ir.DataType | None]:
        if all(output.type is not None for output in node.outputs):
            return [None] * len(node.outputs)
        if subgraphs:
            # The first output of a Loop body is the condition, which is not an output of the Loop.
            body_outputs = list(subgraphs[0].outputs)[1 if node.op_type == "Loop" else 0 :]
            return [types.get(value) for value in body_outputs]
        signature = op_signature(node, self.opsets)
        if signature is not None:
            return _types_from_signature(node, signature, types)
        if (function := self.functions.get(node.op_identifier())) is not None:
            return self.infer_call(function, [types.get(value) if value is not None else None for value in node.inputs])
        index = TYPE_SOURCE_INPUTS.get(op_key(node))
        if index is not None and index < len(node.inputs) and (source := node.inputs[index]) is not None:
            return [types.get(source)]
        return [None] * len(node.outputs)

    def infer_call(self, function: ir.Function, input_types: list[ir.DataType | None]) -> list[ir.DataType | None]:
        key = (function.identifier(), *input_types)
        if key not in self.function_results:
            self.function_results[key] = []
            types: ElementTypes = {
                value: type_ for value, type_ in zip(function.inputs, input_types, strict=False) if type_ is not None
            }
            self.infer_graph(function, types)
            self.function_results[key] = [types.get(value) for value in function.outputs]
        return self.function_results[key]


def _types_from_signature(node: ir.Node, signature: OpSignature, types: ElementTypes) -> list[ir.DataType | None]:
    input_formals, output_formals = signature.bind(node)
    bound_types: dict[str, ir.DataType] = {}
    for formal, value in zip(input_formals, node.inputs, strict=True):
        if value is not None and value in types and formal.type_variable != "?":
            bound_types.setdefault(formal.type_variable, types[value])
    attribute_type = type_from_attributes(node, types) if is_standard_op(node) else None
    result: list[ir.DataType | None] = []
    for formal in output_formals:
        if formal.type_variable in bound_types:
            result.append(bound_types[formal.type_variable])
        elif len(formal.allowed_types) == 1:
            result.append(next(iter(formal.allowed_types)))
        else:
            result.append(attribute_type)
    return result


def type_from_attributes(node: ir.Node, types: ElementTypes) -> ir.DataType | None:
    """Return the output type of `node` that an attribute specifies, explicitly or by its default, or None."""
    attribute = node.attributes.get(DTYPE_ATTRIBUTES.get(node.op_type, ""))
    if attribute is not None and not attribute.is_ref() and attribute.value:
        return ir.DataType(attribute.as_int())
    for attribute in node.attributes.values():
        if node.op_type in ("Constant", "ConstantOfShape") and not attribute.is_ref():
            return _constant_type(attribute)
    index = _TYPE_SOURCE_INPUTS.get(node.op_type)
    if index is not None and index < len(node.inputs) and (value := node.inputs[index]) is not None:
        return types.get(value)
    return _DEFAULT_OUTPUT_TYPES.get(node.op_type)


def _constant_type(attribute: ir.Attr) -> ir.DataType | None:
    if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.SPARSE_TENSOR):
        dtype: ir.DataType = attribute.value.dtype
        return dtype
    return {
        ir.AttributeType.FLOAT: ir.DataType.FLOAT,
        ir.AttributeType.FLOATS: ir.DataType.FLOAT,
        ir.AttributeType.INT: ir.DataType.INT64,
        ir.AttributeType.INTS: ir.DataType.INT64,
        ir.AttributeType.STRING: ir.DataType.STRING,
        ir.AttributeType.STRINGS: ir.DataType.STRING,
    }.get(attribute.type)
