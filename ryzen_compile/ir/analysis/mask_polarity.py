"""Mask polarity: which value of a mask input marks padding, derived from what the graph computes from it.

A mask has the elements 0 and 1. The analysis follows what a 0 and what a 1 become, through casts, negations, comparisons,
`(1 - mask) * -1e9` and selections, up to an op that removes elements: a Softmax whose input is a large negative fill, an
attention op with a mask input, or the sequence lengths of an attention or recurrent op. The value that is removed there marks
padding. A product with activations in which one of the two values becomes 0 is evidence too, if there is no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_tensor, int_attribute_or_none
from ryzen_compile.ir.analysis.op_traits import LAYOUT_OPS
from ryzen_compile.ir.traversal import node_subgraphs
from ryzen_compile.spec.interface import PaddingValue

_FILL_THRESHOLD = -1e3
"""The largest number that counts as the fill value of masked scores."""
_MAX_UNIFORM_ELEMENTS = 4096
"""The maximum size of a constant that is read to find out whether its elements are equal."""
_MAX_NODES = 200_000
"""The maximum number of nodes that are visited for one input, with the nodes of subgraphs and of function calls."""
_MAX_INDEPENDENT_VALUES = 500
"""The maximum number of values that are visited to find out whether a tensor is independent of the inputs."""
_NOT_REAL_TYPES = frozenset({ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128})

_DATA_INPUTS = {"Concat": None, "ScatterElements": (0, 2), "ScatterND": (0, 2)} | dict.fromkeys(
    LAYOUT_OPS | {"CastLike", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Split", "Tile", "Trilu"}, (0,)
)
"""Op whose outputs contain elements of some inputs at other places or among others -> these inputs; None: all."""
_UNIFORM_OPS = LAYOUT_OPS | {"Cast", "CastLike", "Identity", "Tile"}
"""Ops whose output is uniform if their first input is."""
_NORMALIZING_OPS = frozenset({"Softmax", "Exp"})
"""Ops that turn a large negative element into 0. Exp belongs to a Softmax that is written as single ops."""
_CONJUNCTIONS, _DISJUNCTIONS = frozenset({"And", "BitwiseAnd"}), frozenset({"Or", "BitwiseOr"})
_UNARY: dict[str, Callable[[float], float]] = {
    "Abs": abs,
    "Neg": lambda a: -a,
    "Not": lambda a: float(not a),
    "Relu": lambda a: max(a, 0.0),
    "Sign": lambda a: float((a > 0) - (a < 0)),
}
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "Equal": lambda a, b: a == b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
    "Xor": lambda a, b: bool(a) != bool(b),
}

_MASK_INPUTS = {
    ("", "Attention"): 3,
    ("com.microsoft", "Attention"): 3,
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): 3,
    ("com.microsoft", "EmbedLayerNormalization"): 7,
    ("com.microsoft", "MultiHeadAttention"): 4,
    ("com.microsoft", "QAttention"): 5,
}
"""Op -> its mask input: 0 or false excludes an element, in a float mask a large negative number does; or lengths."""
_BIAS_INPUTS = {
    ("com.microsoft", "Attention"): 5,
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): 4,
    ("com.microsoft", "GroupQueryAttention"): 10,
    ("com.microsoft", "MultiHeadAttention"): 5,
}
"""Op -> its input that is added to the scores."""
_LENGTH_INPUTS = {
    ("", "Attention"): 6,
    ("", "GRU"): 4,
    ("", "LSTM"): 4,
    ("", "RNN"): 4,
    ("com.microsoft", "GroupQueryAttention"): 5,
}
"""Op -> its input of sequence lengths."""


class _Elements(NamedTuple):
    """What the elements of a tensor are where the mask is 0 and where it is 1."""

    zero: float | None
    """A number; minus infinity for a fill plus an unknown number; None: unknown."""
    one: float | None


class _Counts(NamedTuple):
    """A tensor that counts the elements of the mask with one value, up to a constant."""

    counted: PaddingValue


_Tracked: TypeAlias = _Elements | _Counts
_UNKNOWN = _Elements(None, None)


def find_padding_value(
    value: ir.Value, graph: ir.Graph, functions: Iterable[ir.Function] = (), *, removal_only: bool = False
) -> PaddingValue | None:
    """Return the value, 0 or 1, that marks padding in the input `value` of `graph`, or None if it is not known.

    It is not known if the graph does not use the input as a mask, uses it in a way that this module does not follow, or in
    two contradicting ways.

    Args:
        value: A graph input whose elements are 0 and 1.
        graph: The main graph, sorted topologically.
        functions: The functions of the model.
        removal_only: Whether zeroed activations are no evidence: for inputs that may also hold other numbers.
    """
    analysis = _PolarityAnalysis(functions)
    analysis.tracked[value] = _Elements(0.0, 1.0)
    analysis.run(graph)
    evidence = analysis.removed if analysis.removed or removal_only else analysis.zeroed
    return next(iter(evidence)) if len(evidence) == 1 and analysis.visited <= _MAX_NODES else None


class _PolarityAnalysis:
    """Follows one mask through a graph."""

    def __init__(self, functions: Iterable[ir.Function]) -> None:
        self.tracked: dict[ir.Value, _Tracked] = {}
        self.removed: set[PaddingValue] = set()
        """The values whose elements are removed by a normalization or by the lengths of sequences."""
        self.zeroed: set[PaddingValue] = set()
        """The values whose elements become 0 in a product with activations."""
        self.visited = 0
        self._functions = {(function.domain, function.name): function for function in functions}
        self._constants: dict[ir.Value, float | None] = {}

    def run(self, graph: ir.Graph | ir.Function) -> None:
        """Follow the mask through the nodes of `graph`, in order."""
        for node in graph:
            self.visited += 1
            if self.visited > _MAX_NODES:
                return
            if subgraphs := node_subgraphs(node):
                self._enter_subgraphs(node, subgraphs)
            elif any(operand in self.tracked for operand in node.inputs if operand is not None):
                self._visit(node)

    def _visit(self, node: ir.Node) -> None:
        function = self._functions.get((node.domain, node.op_type))
        if function is not None:
            self._pass_on(node.inputs, function.inputs)
            self.run(function)
            self._pass_on(function.outputs, node.outputs)
            return
        self._find_evidence(node)
        if node.domain not in ("", "ai.onnx"):
            return
        result = self._transfer(node)
        if result is not None and result != _UNKNOWN:
            self.tracked.update(dict.fromkeys(node.outputs, result))

    def _enter_subgraphs(self, node: ir.Node, subgraphs: Sequence[ir.Graph]) -> None:
        """Follow the mask through the branches of an If, or once through the body of a loop."""
        first_input, first_output = {"Loop": (2, 1)}.get(node.op_type, (0, 0))
        for graph in subgraphs:
            if node.op_type != "If":
                self._pass_on(node.inputs[first_input:], graph.inputs[first_input:])
            self.run(graph)
            self._pass_on(graph.outputs[first_output:], node.outputs)

    def _pass_on(self, sources: Sequence[ir.Value | None], targets: Sequence[ir.Value]) -> None:
        for source, target in zip(sources, targets, strict=False):
            if source in self.tracked:
                self.tracked[target] = self.tracked[source]
            else:
                self.tracked.pop(target, None)

    # Evidence

    def _find_evidence(self, node: ir.Node) -> None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        op = (domain, node.op_type)
        if node.op_type in _NORMALIZING_OPS and not domain:
            self._add_filled(self._operand(node, 0))
        self._add_filled(self._operand(node, _BIAS_INPUTS.get(op)))
        self._add_shorter(self._operand(node, _LENGTH_INPUTS.get(op)))
        mask = self._operand(node, _MASK_INPUTS.get(op))
        self._add_filled(mask)
        self._add_shorter(mask)
        if isinstance(mask, _Elements) and not any(map(_is_fill, mask)) and mask.count(0.0) == 1:
            dtype = node.inputs[_MASK_INPUTS[op]].dtype  # type: ignore[union-attr]
            if dtype is None or not dtype.is_floating_point():
                self.removed.add(0 if mask.zero == 0.0 else 1)

    def _operand(self, node: ir.Node, index: int | None) -> _Tracked | None:
        value = None if index is None or index >= len(node.inputs) else node.inputs[index]
        return None if value is None else self.tracked.get(value)

    def _add_filled(self, operand: _Tracked | None) -> None:
        """Add the value whose elements are fill, if exactly one of the two is."""
        if isinstance(operand, _Elements) and _is_fill(operand.zero) != _is_fill(operand.one):
            self.removed.add(0 if _is_fill(operand.zero) else 1)

    def _add_shorter(self, lengths: _Tracked | None) -> None:
        """Add the value that is not counted by the lengths of sequences."""
        if isinstance(lengths, _Counts):
            self.removed.add(_other(lengths.counted))

    def _add_zeroed(self, result: _Elements) -> None:
        """Add the value where `result` is 0, if it is an activation where the mask has the other one.

        A blend of two tensors, `m * a + (1 - m) * b`, adds both values, and so shows no padding.
        """
        zero, one = result
        if (zero, one) in ((0.0, None), (None, 0.0)):
            self.zeroed.add(0 if zero == 0.0 else 1)

    # Transfer

    def _transfer(self, node: ir.Node) -> _Tracked | None:
        """Return what the outputs of `node` are, or None if that is unknown."""
        op_type = node.op_type
        if op_type in _DATA_INPUTS:
            return self._transfer_moved(node)
        first = self._operand(node, 0)
        if op_type in ("CumSum", "ReduceSum"):
            return _Counts(1) if first == (0.0, 1.0) else _Counts(0) if first == (1.0, 0.0) else None
        if op_type == "Cast":
            to_bool = int_attribute_or_none(node, "to", 0) == ir.DataType.BOOL
            return _map(first, lambda number: float(number != 0)) if to_bool else first
        if op_type in _UNARY:
            return _map(first, _UNARY[op_type])
        if op_type == "Einsum" and len(node.inputs) == 1:
            return first if _is_transposition(node) else None
        if op_type == "Clip":
            return self._transfer_clip(node, first)
        if op_type == "Where":
            return self._transfer_where(node)
        if len(node.inputs) == 2:
            return self._transfer_binary(node)
        return None

    def _transfer_moved(self, node: ir.Node) -> _Tracked | None:
        indices = _DATA_INPUTS[node.op_type]
        operands = [self._operand(node, index) for index in (range(len(node.inputs)) if indices is None else indices)]
        found = {operand for operand in operands if operand is not None}
        return found.pop() if len(found) == 1 else None

    def _transfer_clip(self, node: ir.Node, first: _Tracked | None) -> _Tracked | None:
        bounds = [self._constant(node.inputs[i]) if i < len(node.inputs) else None for i in (1, 2)]
        if "min" in node.attributes or "max" in node.attributes:  # before opset 11
            return None
        low, high = (-math.inf if bounds[0] is None else bounds[0]), (math.inf if bounds[1] is None else bounds[1])
        return _map(first, lambda number: min(max(number, low), high))

    def _transfer_where(self, node: ir.Node) -> _Elements:
        operands = [self._elements(operand) for operand in node.inputs]
        result = _Elements(_select(*(each.zero for each in operands)), _select(*(each.one for each in operands)))
        if node.inputs[0] in self.tracked:
            self._add_zeroed(result)
        return result

    def _transfer_binary(self, node: ir.Node) -> _Tracked | None:
        op_type, (left_value, right_value) = node.op_type, node.inputs
        left, right = self._elements(left_value), self._elements(right_value)
        if op_type in ("Add", "Sub"):
            counts = [self._operand(node, index) for index in (0, 1)]
            if isinstance(counts[0], _Counts) and counts[1] is None:
                return counts[0]
            if isinstance(counts[1], _Counts) and counts[0] is None:
                return counts[1] if op_type == "Add" else _Counts(_other(counts[1].counted))
            left, right = self._as_visible(left_value, left), self._as_visible(right_value, right)
        combine = _BINARY.get(op_type)
        if combine is None:
            return None
        result = _Elements(combine(left.zero, right.zero), combine(left.one, right.one))
        other = right_value if left_value in self.tracked else left_value
        if op_type == "Mul" and self._constant(other) is None:
            self._add_zeroed(result)
        return result

    def _as_visible(self, value: ir.Value | None, elements: _Elements) -> _Elements:
        """Return 0 for an addend of the mask that is itself a mask of scores, as where it hides nothing; else `elements`.

        Masks of scores that are independent of the inputs are causal: they are 0, or a fill where they hide.
        """
        return _Elements(0.0, 0.0) if elements == _UNKNOWN and self._is_independent(value) else elements

    def _is_independent(self, value: ir.Value | None) -> bool:
        """Return whether `value` is computed from constants and shapes only."""
        pending, visited = [value], {value}
        while pending and len(visited) <= _MAX_INDEPENDENT_VALUES:
            current = pending.pop()
            if current is None or constant_tensor(current) is not None:
                continue
            node = current.producer()
            if node is None or node_subgraphs(node):
                return False
            if node.op_type in ("Shape", "Size") and not node.domain:
                continue
            operands = {operand for operand in node.inputs if operand not in visited}
            visited |= operands
            pending += operands
        return not pending

    def _elements(self, value: ir.Value | None) -> _Elements:
        """Return what the elements of an operand are; both are the same number for a constant of equal elements."""
        found = self.tracked.get(value) if value is not None else None
        if isinstance(found, _Elements):
            return found
        number = None if found is not None else self._constant(value)
        return _Elements(number, number)

    def _constant(self, value: ir.Value | None) -> float | None:
        """Return the number that all elements of a tensor are, or None if it is not such a constant."""
        if value is None or value in self._constants:
            return None if value is None else self._constants[value]
        self._constants[value] = None
        tensor, node = constant_tensor(value), value.producer()
        number = None
        if tensor is not None:
            number = _uniform_number(tensor)
        elif node is not None and not node.domain and node.inputs and node.op_type in _UNIFORM_OPS:
            number = self._constant(node.inputs[0])
        elif node is not None and not node.domain and node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            number = 0.0 if fill is None else None if fill.is_ref() else _uniform_number(fill.as_tensor())
        elif node is not None and not node.domain and node.op_type == "Neg":
            operand = self._constant(node.inputs[0])
            number = None if operand is None else -operand
        self._constants[value] = number
        return number


def _is_transposition(einsum: ir.Node) -> bool:
    """Return whether an Einsum of one operand only reorders its axes."""
    attribute = einsum.attributes.get("equation")
    equation = "" if attribute is None or attribute.is_ref() else attribute.as_string().replace(" ", "")
    source, _, target = equation.partition("->")
    return bool(target) and sorted(source) == sorted(target) and len(set(source)) == len(source)


def _uniform_number(tensor: ir.TensorProtocol) -> float | None:
    if not 0 < tensor.size <= _MAX_UNIFORM_ELEMENTS or tensor.dtype in _NOT_REAL_TYPES:
        return None
    array = tensor.numpy().reshape(-1)
    return float(array[0]) if bool((array == array[0]).all()) else None


def _other(value: PaddingValue) -> PaddingValue:
    return 1 if value == 0 else 0


def _is_fill(number: float | None) -> bool:
    return number is not None and number <= _FILL_THRESHOLD


def _map(operand: _Tracked | None, function: Callable[[float], float]) -> _Tracked | None:
    if not isinstance(operand, _Elements):
        return None
    return _Elements(*(None if number is None else function(number) for number in operand))


def _select(condition: float | None, chosen: float | None, otherwise: float | None) -> float | None:
    if condition is not None:
        return chosen if condition else otherwise
    if chosen == otherwise:
        return chosen
    return -math.inf if _is_fill(chosen) and _is_fill(otherwise) else None


def _add(left: float | None, right: float | None) -> float | None:
    if left is not None and right is not None:
        return left + right
    return -math.inf if _is_fill(left) or _is_fill(right) else None


def _subtract(left: float | None, right: float | None) -> float | None:
    return _add(left, None if right is None else -right)


def _multiply(left: float | None, right: float | None) -> float | None:
    if left == 0.0 or right == 0.0:
        return 0.0
    return None if left is None or right is None else left * right


def _divide(left: float | None, right: float | None) -> float | None:
    if left == 0.0:
        return 0.0
    return left / right if left is not None and right else None


def _minimum(left: float | None, right: float | None) -> float | None:
    if left is not None and right is not None:
        return min(left, right)
    return -math.inf if _is_fill(left) or _is_fill(right) else None


def _maximum(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else max(left, right)


def _comparison(compare: Callable[[float, float], bool]) -> Callable[[float | None, float | None], float | None]:
    return lambda left, right: None if left is None or right is None else float(compare(left, right))


def _logical(absorbing: float) -> Callable[[float | None, float | None], float | None]:
    """Return And (absorbing 0) or Or (absorbing 1)."""

    def combine(left: float | None, right: float | None) -> float | None:
        if absorbing in (left, right):
            return absorbing
        return None if left is None or right is None else 1.0 - absorbing

    return combine


_BINARY: Mapping[str, Callable[[float | None, float | None], float | None]] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "Min": _minimum,
    "Max": _maximum,
    **{op_type: _comparison(compare) for op_type, compare in _COMPARISONS.items()},
    **dict.fromkeys(_CONJUNCTIONS, _logical(0.0)),
    **dict.fromkeys(_DISJUNCTIONS, _logical(1.0)),
}
