"""The element type of every tensor of a graph, declared or inferred from the signatures of its ops."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from ryzen_compile import registry
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import Port

Types = dict[ir.Value, ir.DataType]

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""The half-precision types."""

TYPE_ATTRIBUTES = {
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

_TYPED_BY_DEFAULT = {
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
_TYPED_BY_INPUT = {"RandomNormalLike": 0, "RandomUniformLike": 0, "EyeLike": 0, "Bernoulli": 0, "DequantizeLinear": 1}


@dataclass(frozen=True)
class Slot:
    """A formal input or output: its type variable, and the element types that this may stand for."""

    letter: str
    allowed: frozenset[ir.DataType]


@dataclass(frozen=True)
class Signature:
    """The formal inputs and outputs of an op; the last of either may repeat."""

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    repeats: tuple[bool, bool] = (False, False)

    def of(self, node: ir.Node) -> tuple[Sequence[Slot], Sequence[Slot]]:
        """Return a slot for each input and each output of `node`."""
        return (
            _spread(self.inputs, len(node.inputs), self.repeats[0]),
            _spread(self.outputs, len(node.outputs), self.repeats[1]),
        )


def _spread(slots: tuple[Slot, ...], count: int, repeats: bool) -> Sequence[Slot]:
    if count <= len(slots):
        return slots[:count]
    last = slots[-1] if slots and repeats else Slot("?", frozenset())
    return (*slots, *[last] * (count - len(slots)))


def is_standard(node: ir.Node) -> bool:
    """Tell whether `node` is an op of ONNX's own default domain."""
    return node.domain in ("", "ai.onnx")


def signature(node: ir.Node, opsets: Mapping[str, int]) -> Signature | None:
    """Return the signature of the op of `node`, or None where neither ONNX nor the register of ops knows it."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opsets.get(domain, opsets.get("ai.onnx", 0) if domain == "" else 0)
    return _standard(domain, node.op_type, version) or _declared(domain, node.op_type)


@functools.cache
def _standard(domain: str, op_type: str, version: int) -> Signature | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    variables = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    many = onnx.defs.OpSchema.FormalParameterOption.Variadic

    def slots(formals: Sequence[onnx.defs.OpSchema.FormalParameter]) -> tuple[Slot, ...]:
        return tuple(
            Slot(
                # Each of several inputs that need not share a type stands for itself.
                formal.type_str if formal.is_homogeneous else "?",
                _elements(variables.get(formal.type_str, [formal.type_str])),
            )
            for formal in formals
        )

    def repeats(formals: Sequence[onnx.defs.OpSchema.FormalParameter]) -> bool:
        return bool(formals) and formals[-1].option == many

    return Signature(slots(schema.inputs), slots(schema.outputs), repeats=(repeats(schema.inputs), repeats(schema.outputs)))


def _elements(spellings: Iterable[str]) -> frozenset[ir.DataType]:
    # What is not a plain tensor (a sequence, an optional) has no element type here.
    return frozenset(
        ir.DataType[spelling[len("tensor(") : -1].upper()] for spelling in spellings if spelling.startswith("tensor(")
    )


@functools.cache
def _declared(domain: str, op_type: str) -> Signature | None:
    op = registry.ops().get(op_type)
    if op is None or op.domain != domain:
        return None

    def slot(port: Port) -> Slot:
        elements = op.elements.get(port.element, (port.element,))
        return Slot(port.element, frozenset(ir.DataType.from_numpy(numpy_dtype(element)) for element in elements))

    return Signature(tuple(map(slot, op.inputs)), tuple(map(slot, op.outputs)))


def element_types(model: ir.Model) -> Types:
    """Return the element type of every tensor of the main graph and of its subgraphs.

    What a file declares is believed; the rest follows from the signatures of the ops, and from the bodies of local
    functions. A value that is no tensor, or whose type cannot be known, is left out. Takes one walk over the nodes.
    """
    types: Types = {}
    _Walk(model).graph(model.graph, types)
    return types


def declare(types: Types) -> None:
    """Let each value that does not say its type say the one that it has in `types`."""
    for value, dtype in types.items():
        if value.type is None:
            value.type = ir.TensorType(dtype)


class _Walk:
    def __init__(self, model: ir.Model) -> None:
        self.functions = model.functions
        self.opsets = model.graph.opset_imports
        self.called: dict[tuple[object, ...], list[ir.DataType | None]] = {}

    def graph(self, graph: ir.Graph | ir.Function, types: Types) -> None:
        values = list(graph.inputs)
        if isinstance(graph, ir.Graph):
            values += graph.initializers.values()
        for value in values:
            self.note(value, None, types)
        for node in graph:
            self.node(node, types)

    def note(self, value: ir.Value, guess: ir.DataType | None, types: Types) -> None:
        if value.type is not None:
            if isinstance(value.type, ir.TensorType):
                types[value] = value.type.dtype
        elif value.const_value is not None:
            types[value] = value.const_value.dtype
        elif guess is not None:
            types.setdefault(value, guess)

    def node(self, node: ir.Node, types: Types) -> None:
        inner: list[ir.Graph] = []
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                inner.append(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
                inner.extend(attribute.as_graphs())
        for graph in inner:
            self.given(node, graph, types)
            self.graph(graph, types)
        for output, guess in zip(node.outputs, self.outputs(node, inner, types), strict=False):
            self.note(output, guess, types)

    def given(self, node: ir.Node, body: ir.Graph, types: Types) -> None:
        """Note the types of what a loop gives its body: a Loop its count and its condition first, and both what they take."""
        own = 2 if node.op_type == "Loop" else 0
        for value, guess in zip(body.inputs[:own], (ir.DataType.INT64, ir.DataType.BOOL), strict=False):
            self.note(value, guess, types)
        for value, source in zip(body.inputs[own:], node.inputs[own:], strict=False):
            self.note(value, types.get(source) if source is not None else None, types)

    def outputs(self, node: ir.Node, inner: Sequence[ir.Graph], types: Types) -> Sequence[ir.DataType | None]:
        if all(output.type is not None for output in node.outputs):
            return [None] * len(node.outputs)
        if inner:
            # A Loop gives its condition to itself alone; each of the others gives what its body gives.
            given = list(inner[0].outputs)[1 if node.op_type == "Loop" else 0 :]
            return [types.get(value) for value in given]
        known = signature(node, self.opsets)
        if known is not None:
            return _from_signature(node, known, types)
        if (function := self.functions.get(node.op_identifier())) is not None:
            return self.call(function, [types.get(value) if value is not None else None for value in node.inputs])
        return [None] * len(node.outputs)

    def call(self, function: ir.Function, given: list[ir.DataType | None]) -> list[ir.DataType | None]:
        key = (function.identifier(), *given)
        if key not in self.called:
            self.called[key] = []
            types: Types = {value: type_ for value, type_ in zip(function.inputs, given, strict=False) if type_ is not None}
            self.graph(function, types)
            self.called[key] = [types.get(value) for value in function.outputs]
        return self.called[key]


def _from_signature(node: ir.Node, known: Signature, types: Types) -> list[ir.DataType | None]:
    takes, gives = known.of(node)
    bound: dict[str, ir.DataType] = {}
    for slot, value in zip(takes, node.inputs, strict=True):
        if value is not None and value in types and slot.letter != "?":
            bound.setdefault(slot.letter, types[value])
    named = named_type(node, types) if is_standard(node) else None
    found: list[ir.DataType | None] = []
    for slot in gives:
        if slot.letter in bound:
            found.append(bound[slot.letter])
        elif len(slot.allowed) == 1:
            found.append(next(iter(slot.allowed)))
        else:
            found.append(named)
    return found


def named_type(node: ir.Node, types: Types) -> ir.DataType | None:
    """Return the type that an attribute of `node` names for its output, be it by default, or None."""
    attribute = node.attributes.get(TYPE_ATTRIBUTES.get(node.op_type, ""))
    if attribute is not None and not attribute.is_ref() and attribute.value:
        return ir.DataType(attribute.as_int())
    for attribute in node.attributes.values():
        if node.op_type in ("Constant", "ConstantOfShape") and not attribute.is_ref():
            return _constant_type(attribute)
    at = _TYPED_BY_INPUT.get(node.op_type)
    if at is not None and at < len(node.inputs) and (value := node.inputs[at]) is not None:
        return types.get(value)
    return _TYPED_BY_DEFAULT.get(node.op_type)


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
