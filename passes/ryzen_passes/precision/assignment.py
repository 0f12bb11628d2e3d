"""Assign a precision to each node: apply the precision rules, then extend the fp32 regions where that saves casts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_tensor
from ryzen_compile.ir.analysis.element_types import ElementTypes, is_standard_op, op_signature, type_from_attributes
from ryzen_compile.ir.analysis.op_traits import ATTENTION_OPS
from ryzen_compile.ir.traversal import node_subgraphs
from ryzen_passes.precision.rules import PRECISION_RULES, SUM_OPS, CastPlan, PrecisionAnalysis

_FLOAT = ir.DataType.FLOAT
_DTYPE_ATTRIBUTE_OPS = frozenset({"Cast", "ConstantOfShape"})
"""Ops whose output type is set by an attribute, which is rewritten."""
_FP32_INPUTS = {"Resize": {1, 2}, "Upsample": {1}}
"""Op type to input indices that stay fp32 although half precision is allowed: they hold scales and coordinates."""
_COMPUTE_OPS = frozenset("""MatMul Gemm Conv ConvTranspose DeformConv Einsum Attention TRT_Attention LSTM GRU RNN""".split())
_LARGE_CONSTANT_ELEMENTS = 1 << 16
"""A node with a constant of at least this many elements costs more in fp32 than the casts that it would save."""
_INTEGER_DTYPES = frozenset(ir.DataType[name] for name in ["INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64"])


@dataclass(frozen=True)
class PrecisionAssignment:
    """The nodes to convert to half precision, and for each other node with fp32 tensors the reason why it stays fp32."""

    half_nodes: frozenset[ir.Node]
    fp32_reasons: Mapping[ir.Node, str]


def find_cast_plans(
    graph: ir.Graph, types: ElementTypes, dtype: ir.DataType
) -> tuple[dict[ir.Node, CastPlan], dict[ir.Node, str]]:
    """Return the cast plan of each node of `graph` that can be converted, and the reason for each node that cannot."""
    cast_plans: dict[ir.Node, CastPlan] = {}
    reasons: dict[ir.Node, str] = {}
    for node in graph:
        has_fp32 = any(types.get(value) == _FLOAT for value in (*node.inputs, *node.outputs) if value is not None)
        if not has_fp32 or (node.op_type == "Constant" and is_standard_op(node)):
            continue
        plan = _cast_plan(node, types, dtype, graph.opset_imports)
        if isinstance(plan, CastPlan):
            cast_plans[node] = plan
        else:
            reasons[node] = plan
    return cast_plans, reasons


def _cast_plan(node: ir.Node, types: ElementTypes, dtype: ir.DataType, opsets: Mapping[str, int]) -> CastPlan | str:
    """Return the cast plan of `node`, or the reason why it cannot be converted."""
    if node_subgraphs(node):
        return "subgraph: subgraphs of control flow stay fp32"
    signature = op_signature(node, opsets)
    # Ops of the other ONNX domains (trees, training) hold parameters in attributes, whose types are fixed.
    if signature is None or node.domain.startswith("ai.onnx."):
        return "unknown: no schema states which types it takes"
    if node.op_type == "BitCast" and is_standard_op(node):
        return "bits: it reinterprets the bits of fp32 elements"
    input_params, output_params = signature.bind(node)
    if any(not param.allowed_types for param in (*input_params, *output_params)):
        return "sequence: tensors in sequences and optionals stay fp32"
    pinned = _FP32_INPUTS.get(node.op_type, ()) if is_standard_op(node) else ()
    inputs = frozenset(
        index
        for index, (param, value) in enumerate(zip(input_params, node.inputs, strict=True))
        if value is not None and types.get(value) == _FLOAT and dtype in param.allowed_types and index not in pinned
    )
    type_variables = {input_params[index].type_variable for index in inputs}
    convertible = [
        index
        for index, value in enumerate(node.outputs)
        if types.get(value) == _FLOAT and dtype in output_params[index].allowed_types
    ]
    converted = [index for index in convertible if output_params[index].type_variable in type_variables]
    if node.op_type in _DTYPE_ATTRIBUTE_OPS and is_standard_op(node):
        converted = convertible
    elif len(converted) < len(convertible) and type_from_attributes(node, types) is None:
        return "schema: its output type cannot be derived from its inputs"
    if not (inputs or converted):
        return f"schema: its fp32 tensors cannot be {dtype.name.lower()} in this opset"
    return CastPlan(inputs, frozenset(converted))


def gains_from_opset(graph: ir.Graph, types: ElementTypes, dtype: ir.DataType, opset: int) -> bool:
    """Return whether an op of `graph` that does not support `dtype` in the opset of the model supports it in `opset`."""
    current_opsets, raised_opsets = graph.opset_imports, {**graph.opset_imports, "": opset}
    fp32_readers = (node for node in graph if any(value is not None and types.get(value) == _FLOAT for value in node.inputs))
    return any(
        isinstance(_cast_plan(node, types, dtype, current_opsets), str)
        and isinstance(_cast_plan(node, types, dtype, raised_opsets), CastPlan)
        for node in fp32_readers
        if is_standard_op(node)
    )


def find_positional_nodes(types: ElementTypes, cast_plans: Mapping[ir.Node, CastPlan]) -> frozenset[ir.Node]:
    """Return the nodes that compute only with integers and constant vectors: positions, angles, masks."""

    def is_source(node: ir.Node) -> bool:
        is_integer_cast = node.op_type == "Cast" and node.inputs[0] is not None and types.get(node.inputs[0]) in _INTEGER_DTYPES
        return is_integer_cast or node.op_type == "Range"

    return _derived_nodes(types, cast_plans, is_source)


def find_statistics_nodes(types: ElementTypes, cast_plans: Mapping[ir.Node, CastPlan]) -> frozenset[ir.Node]:
    """Return the nodes that compute only with sums and constant vectors: variances and their roots."""
    return _derived_nodes(types, cast_plans, lambda node: node.op_type in SUM_OPS)


def _derived_nodes(
    types: ElementTypes, cast_plans: Mapping[ir.Node, CastPlan], is_source: Callable[[ir.Node], bool]
) -> frozenset[ir.Node]:
    """Return the nodes that satisfy `is_source`, and the nodes that compute only with their results and constant vectors."""
    derived: set[ir.Node] = set()
    for node in cast_plans:
        fp32_inputs = [value for value in node.inputs if value is not None and types.get(value) == _FLOAT]
        activations = [value for value in fp32_inputs if constant_tensor(value) is None]
        only_vectors = all(_is_vector(value) for value in fp32_inputs if constant_tensor(value) is not None)
        is_derived = bool(activations) and only_vectors and all(value.producer() in derived for value in activations)
        if is_standard_op(node) and (is_derived or is_source(node)):
            derived.add(node)
    return frozenset(derived)


def _is_vector(value: ir.Value) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and sum(size != 1 for size in tensor.shape.numpy()) <= 1


def assign_precision(
    analysis: PrecisionAnalysis, keep: Collection[ir.Node], force: Collection[ir.Node], *, converted_io: Collection[ir.Value]
) -> PrecisionAssignment:
    """Assign a precision to each node that has a cast plan.

    Nodes in `keep` stay fp32; rules do not apply to nodes in `force`. `converted_io` has the graph inputs and outputs that are
    converted.
    """
    reasons: dict[ir.Node, str] = {}
    for node in analysis.cast_plans:
        if node in keep:
            reasons[node] = "keep: selected by the option `keep`"
        elif node not in force and (reason := _first_reason(node, analysis)):
            reasons[node] = reason
    half_nodes = {node for node in analysis.cast_plans if node not in reasons}
    for node in _producers_of_fp32_attention(analysis, half_nodes):
        reasons[node] = (
            "attention: it feeds an fp32 attention, and TensorRT-RTX cannot build one with inputs cast from half precision"
        )
        half_nodes.remove(node)
    for node in _Fp32Regions(analysis, half_nodes, converted_io=converted_io).extend(force):
        reasons[node] = "region: it is between nodes that stay fp32, and fp32 saves casts"
    return PrecisionAssignment(frozenset(half_nodes), reasons)


def _first_reason(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    return next((reason for rule in PRECISION_RULES if (reason := rule.reason(node, analysis)) is not None), None)


def _producers_of_fp32_attention(analysis: PrecisionAnalysis, half_nodes: Collection[ir.Node]) -> set[ir.Node]:
    """Return the nodes of `half_nodes` that produce Q, K and V of an fp32 attention, back to the MatMuls they come from."""
    fp32_attentions = [node for node in analysis.cast_plans if node.op_type in ATTENTION_OPS and node not in half_nodes]
    worklist = [value for node in fp32_attentions for value in node.inputs[:3]]
    producers: set[ir.Node] = set()
    while worklist:
        value = worklist.pop()
        producer = value.producer() if value is not None else None
        if producer is not None and producer in half_nodes and producer not in producers:
            producers.add(producer)
            if producer.op_type not in _COMPUTE_OPS:
                worklist.extend(producer.inputs)
    return producers


class _Fp32Regions:
    """The fp32 regions of a graph and their cast counts; `extend` moves cheap nodes from `half_nodes` to the regions."""

    def __init__(self, analysis: PrecisionAnalysis, half_nodes: set[ir.Node], *, converted_io: Collection[ir.Value]) -> None:
        self.analysis, self.half_nodes, self.converted_io = analysis, half_nodes, converted_io
        self.read_counts: dict[ir.Value, list[int]] = {}
        """For each tensor, the number of fp32 reads and of half-precision reads."""

    def extend(self, force: Collection[ir.Node]) -> list[ir.Node]:
        """Move cheap nodes from `half_nodes` to fp32 if that reduces casts, first single nodes, then groups; return them."""
        moved: list[ir.Node] = []
        worklist = [node for node in self.analysis.cast_plans if self.is_next_to_fp32(node)]
        while worklist:
            node = worklist.pop()
            if node in self.half_nodes and node not in force and self.is_cheap(node) and self.saves_casts([node]):
                self.move_to_fp32(node)
                moved.append(node)
                worklist.extend(neighbor for neighbor in self.neighbors(node) if neighbor in self.half_nodes)
        for group in self.cheap_groups(force):
            if any(self.is_next_to_fp32(node) for node in group) and self.saves_casts(group):
                for node in group:
                    self.move_to_fp32(node)
                moved.extend(group)
        return moved

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
            if (producer := value.producer()) is not None and producer is not node:
                yield producer
            yield from (consumer for consumer in value.consumers() if consumer is not node)

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
        """Yield the connected groups of cheap nodes that are still in `half_nodes`."""
        remaining = dict.fromkeys(node for node in self.analysis.cast_plans if node in self.half_nodes and node not in force)
        remaining = {node: None for node in remaining if self.is_cheap(node)}
        while remaining:
            group, worklist = [], [remaining.popitem()[0]]
            while worklist:
                node = worklist.pop()
                group.append(node)
                for neighbor in self.neighbors(node):
                    if neighbor in remaining:
                        del remaining[neighbor]
                        worklist.append(neighbor)
            yield group

    def saves_casts(self, group: Sequence[ir.Node]) -> bool:
        """Return whether there are fewer casts if `group` stays fp32."""
        cast_plans = self.analysis.cast_plans
        reads = Counter(
            value for node in group for index in cast_plans[node].inputs if (value := node.inputs[index]) is not None
        )
        produced = {node.outputs[index] for node in group for index in cast_plans[node].outputs}
        saved = 0
        for value in {*reads, *produced}:
            if constant_tensor(value) is None:
                fp32_reads, half_reads = self.count_reads(value)
                saved += _cast_count(self.is_produced_as_half(value), fp32_reads, half_reads)
                saved -= _cast_count(
                    value not in produced and self.is_produced_as_half(value),
                    fp32_reads + reads[value],
                    half_reads - reads[value],
                )
        return saved > 0

    def is_produced_as_half(self, value: ir.Value) -> bool:
        producer = value.producer()
        if producer is None:
            return value in self.converted_io
        return producer in self.half_nodes and value.index() in self.analysis.cast_plans[producer].outputs

    def count_reads(self, value: ir.Value) -> list[int]:
        if value not in self.read_counts:
            cast_plans = self.analysis.cast_plans
            is_half_read = [user in self.half_nodes and index in cast_plans[user].inputs for user, index in value.uses()]
            is_half_read += [value in self.converted_io] * value.is_graph_output()
            self.read_counts[value] = [is_half_read.count(False), is_half_read.count(True)]
        return self.read_counts[value]


def _cast_count(produced_as_half: bool, fp32_reads: int, half_reads: int) -> int:
    return int(fp32_reads > 0 if produced_as_half else half_reads > 0)
