"""The element type of every tensor of a graph, declared or inferred from the signatures of its ops."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from ryzen_compile import registry
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
"""The attribute by which an op of ONNX's own domain names the type that it gives."""

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
    """A formal input or output: its type variable, and the element types that this may stand for."""

    type_variable: str
    allowed_types: frozenset[ir.DataType]


@dataclass(frozen=True)
class OpSignature:
    """The formal inputs and outputs of an op; the last of either may repeat."""

    inputs: tuple[FormalParameter, ...]
    outputs: tuple[FormalParameter, ...]
    variadic: tuple[bool, bool] = (False, False)

    def bind(self, node: ir.Node) -> tuple[Sequence[FormalParameter], Sequence[FormalParameter]]:
        """Return a slot for each input and each output of `node`."""
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
    """Tell whether `node` is an op of ONNX's own default domain."""
    return node.domain in ("", "ai.onnx")


def op_signature(node: ir.Node, opsets: Mapping[str, int]) -> OpSignature | None:
    """Return the signature of the op of `node`, or None where neither ONNX nor the register of ops knows it."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opsets.get(domain, opsets.get("ai.onnx", 0) if domain == "" else 0)
    return _schema_signature(domain, node.op_type, version) or _registered_signature(domain, node.op_type)


@functools.cache
def _schema_signature(domain: str, op_type: str, version: int) -> OpSignature | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    variables = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    many = onnx.defs.OpSchema.FormalParameterOption.Variadic

    def slots(formals: Sequence[onnx.defs.OpSchema.FormalParameter]) -> tuple[FormalParameter, ...]:
        return tuple(
            FormalParameter(
                # Each of several inputs that need not share a type stands for itself.
                formal.type_str if formal.is_homogeneous else "?",
                _parse_tensor_types(variables.get(formal.type_str, [formal.type_str])),
            )
            for formal in formals
        )

    def repeats(formals: Sequence[onnx.defs.OpSchema.FormalParameter]) -> bool:
        return bool(formals) and formals[-1].option == many

    return OpSignature(slots(schema.inputs), slots(schema.outputs), variadic=(repeats(schema.inputs), repeats(schema.outputs)))


def _parse_tensor_types(type_strings: Iterable[str]) -> frozenset[ir.DataType]:
    # What is not a plain tensor (a sequence, an optional) has no element type here.
    return frozenset(
        ir.DataType[spelling[len("tensor(") : -1].upper()] for spelling in type_strings if spelling.startswith("tensor(")
    )


@functools.cache
def _registered_signature(domain: str, op_type: str) -> OpSignature | None:
    op = registry.ops().get(op_type)
    if op is None or op.domain != domain:
        return None

    def slot(port: TensorParam) -> FormalParameter:
        elements = op.type_constraints.get(port.type_str, (port.type_str,))
        return FormalParameter(port.type_str, frozenset(ir.DataType.from_numpy(numpy_dtype(element)) for element in elements))

    return OpSignature(tuple(map(slot, op.inputs)), tuple(map(slot, op.outputs)))


def element_types(model: ir.Model) -> ElementTypes:
    """Return the element type of every tensor of the main graph and of its subgraphs.

    What a file declares is believed; the rest follows from the signatures of the ops, and from the bodies of local
    functions. A value that is no tensor, or whose type cannot be known, is left out. Takes one walk over the nodes.
    """
    types: ElementTypes = {}
    _TypeInference(model).infer_graph(model.graph, types)
    return types


def annotate_types(types: ElementTypes) -> None:
    """Let each value that does not say its type say the one that it has in `types`."""
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
        inner: list[ir.Graph] = []
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                inner.append(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
                inner.extend(attribute.as_graphs())
        for graph in inner:
            self.record_body_inputs(node, graph, types)
            self.infer_graph(graph, types)
        for output, guess in zip(node.outputs, self.output_types(node, inner, types), strict=False):
            self.record_type(output, guess, types)

    def record_body_inputs(self, node: ir.Node, body: ir.Graph, types: ElementTypes) -> None:
        """Note the types of what a loop gives its body: a Loop its count and its condition first, and both what they take."""
        own = 2 if node.op_type == "Loop" else 0
        for value, guess in zip(body.inputs[:own], (ir.DataType.INT64, ir.DataType.BOOL), strict=False):
            self.record_type(value, guess, types)
        for value, source in zip(body.inputs[own:], node.inputs[own:], strict=False):
            self.record_type(value, types.get(source) if source is not None else None, types)

    def output_types(self, node: ir.Node, subgraphs: Sequence[ir.Graph], types: ElementTypes) -> Sequence[ir.DataType | None]:
        if all(output.type is not None for output in node.outputs):
            return [None] * len(node.outputs)
        if subgraphs:
            # A Loop gives its condition to itself alone; each of the others gives what its body gives.
            given = list(subgraphs[0].outputs)[1 if node.op_type == "Loop" else 0 :]
            return [types.get(value) for value in given]
        known = op_signature(node, self.opsets)
        if known is not None:
            return _types_from_signature(node, known, types)
        if (function := self.functions.get(node.op_identifier())) is not None:
            return self.infer_call(function, [types.get(value) if value is not None else None for value in node.inputs])
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
    takes, gives = signature.bind(node)
    bound: dict[str, ir.DataType] = {}
    for slot, value in zip(takes, node.inputs, strict=True):
        if value is not None and value in types and slot.type_variable != "?":
            bound.setdefault(slot.type_variable, types[value])
    named = type_from_attributes(node, types) if is_standard_op(node) else None
    found: list[ir.DataType | None] = []
    for slot in gives:
        if slot.type_variable in bound:
            found.append(bound[slot.type_variable])
        elif len(slot.allowed_types) == 1:
            found.append(next(iter(slot.allowed_types)))
        else:
            found.append(named)
    return found


def type_from_attributes(node: ir.Node, types: ElementTypes) -> ir.DataType | None:
    """Return the type that an attribute of `node` names for its output, be it by default, or None."""
    attribute = node.attributes.get(DTYPE_ATTRIBUTES.get(node.op_type, ""))
    if attribute is not None and not attribute.is_ref() and attribute.value:
        return ir.DataType(attribute.as_int())
    for attribute in node.attributes.values():
        if node.op_type in ("Constant", "ConstantOfShape") and not attribute.is_ref():
            return _constant_type(attribute)
    at = _TYPE_SOURCE_INPUTS.get(node.op_type)
    if at is not None and at < len(node.inputs) and (value := node.inputs[at]) is not None:
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
