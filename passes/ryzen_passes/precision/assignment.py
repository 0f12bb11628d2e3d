"""Which nodes go to half precision: the rules first, then islands grown where that saves casts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import ElementTypes, is_standard_op, op_signature, type_from_attributes
from ryzen_compile.ir.weights import GRAPH_ATTRIBUTE_TYPES
from ryzen_passes.precision.rules import PRECISION_RULES, SUM_OPS, CastPlan, PrecisionAnalysis, constant_tensor

_FLOAT = ir.DataType.FLOAT
_DTYPE_ATTRIBUTE_OPS = frozenset({"Cast", "ConstantOfShape"})
"""Ops that take the type of their output from an attribute that is rewritten."""
_FP32_INPUTS = {"Resize": {1, 2}, "Upsample": {1}}
"""Inputs that stay fp32 although their type may change: where to look, not what is there."""
_COMPUTE_OPS = frozenset("""MatMul Gemm Conv ConvTranspose DeformConv Einsum Attention TRT_Attention LSTM GRU RNN""".split())
_ATTENTION_OPS = frozenset({"Attention", "TRT_Attention"})
_LARGE_CONSTANT_ELEMENTS = 1 << 16
"""A node with a constant of that many elements is no cheaper in fp32 than the casts that this would save."""
_INTEGER_DTYPES = frozenset(ir.DataType[name] for name in ["INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64"])


@dataclass(frozen=True)
class PrecisionAssignment:
    """The nodes that go to half precision, and why the others with fp32 tensors do not."""

    half_nodes: frozenset[ir.Node]
    fp32_reasons: Mapping[ir.Node, str]


def find_cast_plans(
    graph: ir.Graph, types: ElementTypes, dtype: ir.DataType
) -> tuple[dict[ir.Node, CastPlan], dict[ir.Node, str]]:
    """Return what would change type in each node of `graph`, and for those that cannot go to half precision why."""
    moves: dict[ir.Node, CastPlan] = {}
    reasons: dict[ir.Node, str] = {}
    for node in graph:
        floats = any(types.get(value) == _FLOAT for value in (*node.inputs, *node.outputs) if value is not None)
        if not floats or (node.op_type == "Constant" and is_standard_op(node)):
            continue
        found = _cast_plan(node, types, dtype, graph.opset_imports)
        if isinstance(found, CastPlan):
            moves[node] = found
        else:
            reasons[node] = found
    return moves, reasons


def _cast_plan(node: ir.Node, types: ElementTypes, dtype: ir.DataType, opsets: Mapping[str, int]) -> CastPlan | str:
    """Return what would change type in `node`, or why nothing can."""
    if any(attribute.type in GRAPH_ATTRIBUTE_TYPES for attribute in node.attributes.values()):
        return "subgraph: what is inside of control flow stays fp32"
    known = op_signature(node, opsets)
    # Ops of ONNX's further domains (trees, training) hold parameters in attributes, which have types of their own.
    if known is None or node.domain.startswith("ai.onnx."):
        return "unknown: nothing says which types it takes"
    if node.op_type == "BitCast" and is_standard_op(node):
        return "bits: it reads the bits of an fp32 number"
    takes, gives = known.bind(node)
    if any(not slot.allowed_types for slot in (*takes, *gives)):
        return "sequence: what is in sequences and optionals stays fp32"
    pinned = _FP32_INPUTS.get(node.op_type, ()) if is_standard_op(node) else ()
    inputs = frozenset(
        index
        for index, (slot, value) in enumerate(zip(takes, node.inputs, strict=True))
        if value is not None and types.get(value) == _FLOAT and dtype in slot.allowed_types and index not in pinned
    )
    letters = {takes[index].type_variable for index in inputs}
    free = [
        index for index, value in enumerate(node.outputs) if types.get(value) == _FLOAT and dtype in gives[index].allowed_types
    ]
    bound = [index for index in free if gives[index].type_variable in letters]
    if node.op_type in _DTYPE_ATTRIBUTE_OPS and is_standard_op(node):
        bound = free
    elif len(bound) < len(free) and type_from_attributes(node, types) is None:
        return "schema: what it gives takes a type that only the op itself knows"
    if not (inputs or bound):
        return f"schema: its fp32 tensors cannot be {dtype.name.lower()} in this opset"
    return CastPlan(inputs, frozenset(bound))


def gains_from_opset(graph: ir.Graph, types: ElementTypes, dtype: ir.DataType, opset: int) -> bool:
    """Tell whether an op of `graph` that has no type `dtype` in the opset of the model has it in `opset`."""
    now, then = graph.opset_imports, {**graph.opset_imports, "": opset}
    floats = (node for node in graph if any(value is not None and types.get(value) == _FLOAT for value in node.inputs))
    return any(
        isinstance(_cast_plan(node, types, dtype, now), str) and isinstance(_cast_plan(node, types, dtype, then), CastPlan)
        for node in floats
        if is_standard_op(node)
    )


def find_positional_nodes(types: ElementTypes, cast_plans: Mapping[ir.Node, CastPlan]) -> frozenset[ir.Node]:
    """Return the nodes that compute with nothing but whole numbers and vectors of constants: positions, angles, masks."""

    def starts(node: ir.Node) -> bool:
        casts = node.op_type == "Cast" and node.inputs[0] is not None and types.get(node.inputs[0]) in _INTEGER_DTYPES
        return casts or node.op_type == "Range"

    return _derived_nodes(types, cast_plans, starts)


def find_statistics_nodes(types: ElementTypes, cast_plans: Mapping[ir.Node, CastPlan]) -> frozenset[ir.Node]:
    """Return the nodes that compute with nothing but sums and vectors of constants: variances, and roots of them."""
    return _derived_nodes(types, cast_plans, lambda node: node.op_type in SUM_OPS)


def _derived_nodes(
    types: ElementTypes, cast_plans: Mapping[ir.Node, CastPlan], is_source: Callable[[ir.Node], bool]
) -> frozenset[ir.Node]:
    """Return the nodes that `starts` holds of, and those that compute with nothing but their results and vectors."""
    found: set[ir.Node] = set()
    for node in cast_plans:
        floats = [value for value in node.inputs if value is not None and types.get(value) == _FLOAT]
        variable = [value for value in floats if constant_tensor(value) is None]
        vectors = all(_is_vector(value) for value in floats if constant_tensor(value) is not None)
        goes_on = bool(variable) and vectors and all(value.producer() in found for value in variable)
        if is_standard_op(node) and (goes_on or is_source(node)):
            found.add(node)
    return frozenset(found)


def _is_vector(value: ir.Value) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and sum(size != 1 for size in tensor.shape.numpy()) <= 1


def assign_precision(
    analysis: PrecisionAnalysis, keep: Collection[ir.Node], force: Collection[ir.Node], *, converted_io: Collection[ir.Value]
) -> PrecisionAssignment:
    """Decide for each node that can go to half precision; `keep` stays fp32, and no rule holds `trust` back.

    `border` holds the inputs and outputs that change type.
    """
    reasons: dict[ir.Node, str] = {}
    for node in analysis.cast_plans:
        if node in keep:
            reasons[node] = "keep: asked for"
        elif node not in force and (reason := _first_reason(node, analysis)):
            reasons[node] = reason
    half = {node for node in analysis.cast_plans if node not in reasons}
    for node in _producers_of_fp32_attention(analysis, half):
        reasons[node] = "attention: it feeds one that stays fp32, and TensorRT-RTX builds none whose inputs are cast from half"
        half.remove(node)
    for node in _Fp32Islands(analysis, half, converted_io=converted_io).grow(force):
        reasons[node] = "island: it lies between nodes that stay fp32, and saves casts there"
    return PrecisionAssignment(frozenset(half), reasons)


def _first_reason(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    return next((reason for rule in PRECISION_RULES if (reason := rule.reason(node, analysis)) is not None), None)


def _producers_of_fp32_attention(analysis: PrecisionAnalysis, half_nodes: Collection[ir.Node]) -> set[ir.Node]:
    """Return the nodes of `half` that make Q, K and V of an attention that stays fp32, back to the products they come from."""
    stay = [node for node in analysis.cast_plans if node.op_type in _ATTENTION_OPS and node not in half_nodes]
    waiting = [value for node in stay for value in node.inputs[:3]]
    found: set[ir.Node] = set()
    while waiting:
        value = waiting.pop()
        maker = value.producer() if value is not None else None
        if maker is not None and maker in half_nodes and maker not in found:
            found.add(maker)
            if maker.op_type not in _COMPUTE_OPS:
                waiting.extend(maker.inputs)
    return found


class _Fp32Islands:
    """The fp32 islands of a graph, and how many casts they cost."""

    def __init__(self, analysis: PrecisionAnalysis, half_nodes: set[ir.Node], *, converted_io: Collection[ir.Value]) -> None:
        self.analysis, self.half_nodes, self.converted_io = analysis, half_nodes, converted_io
        self.read_counts: dict[ir.Value, list[int]] = {}
        """For each tensor how often it is read as fp32, and how often as half."""

    def grow(self, force: Collection[ir.Node]) -> list[ir.Node]:
        """Take cheap nodes out of `half` where that leaves fewer casts, one by one and then in groups; return them."""
        taken: list[ir.Node] = []
        waiting = [node for node in self.analysis.cast_plans if self.is_next_to_fp32(node)]
        while waiting:
            node = waiting.pop()
            if node in self.half_nodes and node not in force and self.is_cheap(node) and self.saves_casts([node]):
                self.move_to_fp32(node)
                taken.append(node)
                waiting.extend(neighbour for neighbour in self.neighbors(node) if neighbour in self.half_nodes)
        for group in self.cheap_groups(force):
            if any(self.is_next_to_fp32(node) for node in group) and self.saves_casts(group):
                for node in group:
                    self.move_to_fp32(node)
                taken.extend(group)
        return taken

    def move_to_fp32(self, node: ir.Node) -> None:
        for index in self.analysis.cast_plans[node].inputs:
            if (value := node.inputs[index]) is None:
                continue
            counts = self.count_reads(value)
            counts[0] += 1
            counts[1] -= 1
        self.half_nodes.remove(node)

    def neighbors(self, node: ir.Node) -> Iterator[ir.Node]:
        for value in self.activations(node):
            if (maker := value.producer()) is not None and maker is not node:
                yield maker
            yield from (reader for reader in value.consumers() if reader is not node)

    def activations(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in self.analysis.tensors(node) if constant_tensor(value) is None]

    def is_next_to_fp32(self, node: ir.Node) -> bool:
        return node in self.half_nodes and any(other not in self.half_nodes for other in self.neighbors(node))

    def is_cheap(self, node: ir.Node) -> bool:
        tensors = [constant_tensor(value) for value in self.analysis.tensors(node)]
        return node.op_type not in _COMPUTE_OPS and all(
            tensor is None or tensor.size < _LARGE_CONSTANT_ELEMENTS for tensor in tensors
        )

    def cheap_groups(self, force: Collection[ir.Node]) -> Iterator[list[ir.Node]]:
        """Yield the cheap nodes that are still in `half`, those that hang together as one."""
        left = dict.fromkeys(node for node in self.analysis.cast_plans if node in self.half_nodes and node not in force)
        left = {node: None for node in left if self.is_cheap(node)}
        while left:
            group, waiting = [], [left.popitem()[0]]
            while waiting:
                node = waiting.pop()
                group.append(node)
                for neighbour in self.neighbors(node):
                    if neighbour in left:
                        del left[neighbour]
                        waiting.append(neighbour)
            yield group

    def saves_casts(self, group: Sequence[ir.Node]) -> bool:
        """Tell whether there are fewer casts when `group` stays fp32."""
        moves = self.analysis.cast_plans
        read = Counter(value for node in group for index in moves[node].inputs if (value := node.inputs[index]) is not None)
        made = {node.outputs[index] for node in group for index in moves[node].outputs}
        saved = 0
        for value in {*read, *made}:
            if constant_tensor(value) is None:
                wide, half = self.count_reads(value)
                saved += _cast_count(self.is_produced_as_half(value), wide, half)
                saved -= _cast_count(
                    value not in made and self.is_produced_as_half(value), wide + read[value], half - read[value]
                )
        return saved > 0

    def is_produced_as_half(self, value: ir.Value) -> bool:
        maker = value.producer()
        if maker is None:
            return value in self.converted_io
        return maker in self.half_nodes and value.index() in self.analysis.cast_plans[maker].outputs

    def count_reads(self, value: ir.Value) -> list[int]:
        if value not in self.read_counts:
            moves = self.analysis.cast_plans
            half = [user in self.half_nodes and index in moves[user].inputs for user, index in value.uses()]
            half += [value in self.converted_io] * value.is_graph_output()
            self.read_counts[value] = [half.count(False), half.count(True)]
        return self.read_counts[value]


def _cast_count(produced_as_half: bool, fp32_reads: int, half_reads: int) -> int:
    return int(fp32_reads > 0 if produced_as_half else half_reads > 0)
