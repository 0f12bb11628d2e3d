"""Which nodes go to half precision: the rules first, then islands grown where that saves casts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import Types, is_standard, named_type, signature
from ryzen_compile.ir.weights import GRAPHS
from ryzen_passes.precision.rules import RULES, SUMS, Evidence, Moves, constant

_FLOAT = ir.DataType.FLOAT
_RETYPED = frozenset({"Cast", "ConstantOfShape"})
"""Ops that take the type of their output from an attribute that is rewritten."""
_PINNED = {"Resize": {1, 2}, "Upsample": {1}}
"""Inputs that stay fp32 although their type may change: where to look, not what is there."""
_COMPUTE = frozenset("""MatMul Gemm Conv ConvTranspose DeformConv Einsum Attention TRT_Attention LSTM GRU RNN""".split())
_ATTENTIONS = frozenset({"Attention", "TRT_Attention"})
_BIG = 1 << 16
"""A node with a constant of that many elements is no cheaper in fp32 than the casts that this would save."""
_COUNTS = frozenset(ir.DataType[name] for name in ["INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64"])


@dataclass(frozen=True)
class Labels:
    """The nodes that go to half precision, and why the others with fp32 tensors do not."""

    half: frozenset[ir.Node]
    reasons: Mapping[ir.Node, str]


def find_moves(graph: ir.Graph, types: Types, dtype: ir.DataType) -> tuple[dict[ir.Node, Moves], dict[ir.Node, str]]:
    """Return what would change type in each node of `graph`, and for those that cannot go to half precision why."""
    moves: dict[ir.Node, Moves] = {}
    reasons: dict[ir.Node, str] = {}
    for node in graph:
        floats = any(types.get(value) == _FLOAT for value in (*node.inputs, *node.outputs) if value is not None)
        if not floats or (node.op_type == "Constant" and is_standard(node)):
            continue
        found = _moves(node, types, dtype, graph.opset_imports)
        if isinstance(found, Moves):
            moves[node] = found
        else:
            reasons[node] = found
    return moves, reasons


def _moves(node: ir.Node, types: Types, dtype: ir.DataType, opsets: Mapping[str, int]) -> Moves | str:
    """Return what would change type in `node`, or why nothing can."""
    if any(attribute.type in GRAPHS for attribute in node.attributes.values()):
        return "subgraph: what is inside of control flow stays fp32"
    known = signature(node, opsets)
    # Ops of ONNX's further domains (trees, training) hold parameters in attributes, which have types of their own.
    if known is None or node.domain.startswith("ai.onnx."):
        return "unknown: nothing says which types it takes"
    if node.op_type == "BitCast" and is_standard(node):
        return "bits: it reads the bits of an fp32 number"
    takes, gives = known.of(node)
    if any(not slot.allowed for slot in (*takes, *gives)):
        return "sequence: what is in sequences and optionals stays fp32"
    pinned = _PINNED.get(node.op_type, ()) if is_standard(node) else ()
    inputs = frozenset(
        index
        for index, (slot, value) in enumerate(zip(takes, node.inputs, strict=True))
        if value is not None and types.get(value) == _FLOAT and dtype in slot.allowed and index not in pinned
    )
    letters = {takes[index].letter for index in inputs}
    free = [index for index, value in enumerate(node.outputs) if types.get(value) == _FLOAT and dtype in gives[index].allowed]
    bound = [index for index in free if gives[index].letter in letters]
    if node.op_type in _RETYPED and is_standard(node):
        bound = free
    elif len(bound) < len(free) and named_type(node, types) is None:
        return "schema: what it gives takes a type that only the op itself knows"
    if not (inputs or bound):
        return f"schema: its fp32 tensors cannot be {dtype.name.lower()} in this opset"
    return Moves(inputs, frozenset(bound))


def gains(graph: ir.Graph, types: Types, dtype: ir.DataType, opset: int) -> bool:
    """Tell whether an op of `graph` that has no type `dtype` in the opset of the model has it in `opset`."""
    now, then = graph.opset_imports, {**graph.opset_imports, "": opset}
    floats = (node for node in graph if any(value is not None and types.get(value) == _FLOAT for value in node.inputs))
    return any(
        isinstance(_moves(node, types, dtype, now), str) and isinstance(_moves(node, types, dtype, then), Moves)
        for node in floats
        if is_standard(node)
    )


def find_positional(types: Types, moves: Mapping[ir.Node, Moves]) -> frozenset[ir.Node]:
    """Return the nodes that compute with nothing but whole numbers and vectors of constants: positions, angles, masks."""

    def starts(node: ir.Node) -> bool:
        casts = node.op_type == "Cast" and node.inputs[0] is not None and types.get(node.inputs[0]) in _COUNTS
        return casts or node.op_type == "Range"

    return _derived(types, moves, starts)


def find_statistics(types: Types, moves: Mapping[ir.Node, Moves]) -> frozenset[ir.Node]:
    """Return the nodes that compute with nothing but sums and vectors of constants: variances, and roots of them."""
    return _derived(types, moves, lambda node: node.op_type in SUMS)


def _derived(types: Types, moves: Mapping[ir.Node, Moves], starts: Callable[[ir.Node], bool]) -> frozenset[ir.Node]:
    """Return the nodes that `starts` holds of, and those that compute with nothing but their results and vectors."""
    found: set[ir.Node] = set()
    for node in moves:
        floats = [value for value in node.inputs if value is not None and types.get(value) == _FLOAT]
        variable = [value for value in floats if constant(value) is None]
        vectors = all(_is_vector(value) for value in floats if constant(value) is not None)
        goes_on = bool(variable) and vectors and all(value.producer() in found for value in variable)
        if is_standard(node) and (goes_on or starts(node)):
            found.add(node)
    return frozenset(found)


def _is_vector(value: ir.Value) -> bool:
    tensor = constant(value)
    return tensor is not None and sum(size != 1 for size in tensor.shape.numpy()) <= 1


def label(evidence: Evidence, keep: Collection[ir.Node], trust: Collection[ir.Node], *, border: Collection[ir.Value]) -> Labels:
    """Decide for each node that can go to half precision; `keep` stays fp32, and no rule holds `trust` back.

    `border` holds the inputs and outputs that change type.
    """
    reasons: dict[ir.Node, str] = {}
    for node in evidence.moves:
        if node in keep:
            reasons[node] = "keep: asked for"
        elif node not in trust and (reason := _first_reason(node, evidence)):
            reasons[node] = reason
    half = {node for node in evidence.moves if node not in reasons}
    for node in _behind_attentions(evidence, half):
        reasons[node] = "attention: it feeds one that stays fp32, and TensorRT-RTX builds none whose inputs are cast from half"
        half.remove(node)
    for node in _Islands(evidence, half, border=border).grow(trust):
        reasons[node] = "island: it lies between nodes that stay fp32, and saves casts there"
    return Labels(frozenset(half), reasons)


def _first_reason(node: ir.Node, evidence: Evidence) -> str | None:
    return next((reason for rule in RULES if (reason := rule.reason(node, evidence)) is not None), None)


def _behind_attentions(evidence: Evidence, half: Collection[ir.Node]) -> set[ir.Node]:
    """Return the nodes of `half` that make Q, K and V of an attention that stays fp32, back to the products they come from."""
    stay = [node for node in evidence.moves if node.op_type in _ATTENTIONS and node not in half]
    waiting = [value for node in stay for value in node.inputs[:3]]
    found: set[ir.Node] = set()
    while waiting:
        value = waiting.pop()
        maker = value.producer() if value is not None else None
        if maker is not None and maker in half and maker not in found:
            found.add(maker)
            if maker.op_type not in _COMPUTE:
                waiting.extend(maker.inputs)
    return found


class _Islands:
    """The fp32 islands of a graph, and how many casts they cost."""

    def __init__(self, evidence: Evidence, half: set[ir.Node], *, border: Collection[ir.Value]) -> None:
        self.evidence, self.half, self.border = evidence, half, border
        self.reads: dict[ir.Value, list[int]] = {}
        """For each tensor how often it is read as fp32, and how often as half."""

    def grow(self, fixed: Collection[ir.Node]) -> list[ir.Node]:
        """Take cheap nodes out of `half` where that leaves fewer casts, one by one and then in groups; return them."""
        taken: list[ir.Node] = []
        waiting = [node for node in self.evidence.moves if self.is_shore(node)]
        while waiting:
            node = waiting.pop()
            if node in self.half and node not in fixed and self.is_cheap(node) and self.saves([node]):
                self.take(node)
                taken.append(node)
                waiting.extend(neighbour for neighbour in self.neighbours(node) if neighbour in self.half)
        for group in self.groups(fixed):
            if any(self.is_shore(node) for node in group) and self.saves(group):
                for node in group:
                    self.take(node)
                taken.extend(group)
        return taken

    def take(self, node: ir.Node) -> None:
        for index in self.evidence.moves[node].inputs:
            if (value := node.inputs[index]) is None:
                continue
            counts = self.count(value)
            counts[0] += 1
            counts[1] -= 1
        self.half.remove(node)

    def neighbours(self, node: ir.Node) -> Iterator[ir.Node]:
        for value in self.variables(node):
            if (maker := value.producer()) is not None and maker is not node:
                yield maker
            yield from (reader for reader in value.consumers() if reader is not node)

    def variables(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in self.evidence.tensors(node) if constant(value) is None]

    def is_shore(self, node: ir.Node) -> bool:
        return node in self.half and any(other not in self.half for other in self.neighbours(node))

    def is_cheap(self, node: ir.Node) -> bool:
        tensors = [constant(value) for value in self.evidence.tensors(node)]
        return node.op_type not in _COMPUTE and all(tensor is None or tensor.size < _BIG for tensor in tensors)

    def groups(self, fixed: Collection[ir.Node]) -> Iterator[list[ir.Node]]:
        """Yield the cheap nodes that are still in `half`, those that hang together as one."""
        left = dict.fromkeys(node for node in self.evidence.moves if node in self.half and node not in fixed)
        left = {node: None for node in left if self.is_cheap(node)}
        while left:
            group, waiting = [], [left.popitem()[0]]
            while waiting:
                node = waiting.pop()
                group.append(node)
                for neighbour in self.neighbours(node):
                    if neighbour in left:
                        del left[neighbour]
                        waiting.append(neighbour)
            yield group

    def saves(self, group: Sequence[ir.Node]) -> bool:
        """Tell whether there are fewer casts when `group` stays fp32."""
        moves = self.evidence.moves
        read = Counter(value for node in group for index in moves[node].inputs if (value := node.inputs[index]) is not None)
        made = {node.outputs[index] for node in group for index in moves[node].outputs}
        saved = 0
        for value in {*read, *made}:
            if constant(value) is None:
                wide, half = self.count(value)
                saved += _casts(self.is_made_half(value), wide, half)
                saved -= _casts(value not in made and self.is_made_half(value), wide + read[value], half - read[value])
        return saved > 0

    def is_made_half(self, value: ir.Value) -> bool:
        maker = value.producer()
        if maker is None:
            return value in self.border
        return maker in self.half and value.index() in self.evidence.moves[maker].outputs

    def count(self, value: ir.Value) -> list[int]:
        if value not in self.reads:
            moves = self.evidence.moves
            half = [user in self.half and index in moves[user].inputs for user, index in value.uses()]
            half += [value in self.border] * value.is_graph_output()
            self.reads[value] = [half.count(False), half.count(True)]
        return self.reads[value]


def _casts(made_half: bool, read_wide: int, read_half: int) -> int:
    return int(read_wide > 0 if made_half else read_half > 0)
