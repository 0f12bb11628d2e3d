"""Data propagation: infer the elements of small integer tensors through the ops that exporters use in shape computations.

An element is a number or a `SymbolicDim`. Each rule returns the elements of the only output of its node, or None if unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ryzen_compile.ir.analysis import dims as d
from ryzen_compile.ir.analysis.constants import int_attribute_or_none
from ryzen_compile.ir.analysis.dims import SymbolicDim
from ryzen_compile.ir.analysis.node_inputs import Operands
from ryzen_compile.ir.analysis.op_traits import COMPARISON_OPS
from ryzen_compile.ir.analysis.shape_rules import slice_bounds
from ryzen_compile.ir.analysis.symbols import SymbolTable
from ryzen_compile.ir.analysis.value_info import MAX_TRACKED_ELEMENTS, SHAPE_DTYPES, ElementValues, ValueInfo

InferredElements = Sequence[SymbolicDim | None]
ElementRule = Callable[[ir.Node, Sequence[ElementValues], Operands, SymbolTable], InferredElements | None]

MAGNITUDE_BITS = {ir.DataType.INT64: 63, ir.DataType.INT32: 31, ir.DataType.BOOL: 1}
"""Bits of the magnitude; larger numbers would overflow at run time."""


def propagate(node: ir.Node, operands: Operands, output: ValueInfo, symbols: SymbolTable) -> ElementValues | None:
    """Return the elements of the only output of `node`, whose type and dims are in `output`; None if unknown."""
    if output.elements is not None:
        return output.elements
    rule = ELEMENT_RULES.get(node.op_type)
    if rule is None or output.dtype not in SHAPE_DTYPES or output.dims is None or len(output.dims) > 1 or len(node.outputs) > 1:
        return None
    if output.dims and not (isinstance(output.dims[0], int) and output.dims[0] <= MAX_TRACKED_ELEMENTS):
        return None
    operand_elements = [info.elements for info in operands if info is not None]
    required = operand_elements[:1] if node.op_type in _FIRST_OPERAND_OPS else operand_elements
    if not required or None in required or len(operand_elements) != len(operands):
        return None
    if len(operands) < _MIN_OPERANDS.get(node.op_type, 1):
        return None
    elements = rule(node, operand_elements, operands, symbols)  # type: ignore[arg-type]
    if elements is None or None in elements or len(elements) != (output.dims[0] if output.dims else 1):
        return None
    bound = 1 << MAGNITUDE_BITS[output.dtype]
    if any(isinstance(element, int) and not -bound <= element < bound for element in elements):
        return None
    return tuple(elements)  # type: ignore[arg-type]


def _broadcast_elements(operand_elements: Sequence[ElementValues]) -> list[tuple[SymbolicDim, ...]] | None:
    """Return the tuples of elements that broadcasting `operand_elements` combines; None if the lengths do not broadcast."""
    length = max(map(len, operand_elements)) if all(map(len, operand_elements)) else 0
    expanded = [elements * length if len(elements) == 1 else elements for elements in operand_elements]
    return list(zip(*expanded, strict=True)) if len(set(map(len, expanded))) == 1 else None


def _elementwise(function: Callable[[SymbolicDim, SymbolicDim], SymbolicDim | None]) -> ElementRule:
    def rule(
        node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
    ) -> InferredElements | None:
        pairs = _broadcast_elements(operand_elements[:2])
        return None if pairs is None else [function(a, b) for a, b in pairs]

    return rule


def _divide(
    node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
) -> InferredElements | None:
    pairs = _broadcast_elements(operand_elements[:2])
    return None if pairs is None else [_quotient(a, b, symbols) for a, b in pairs]


def _quotient(a: SymbolicDim, b: SymbolicDim, symbols: SymbolTable) -> SymbolicDim | None:
    if isinstance(a, int) and isinstance(b, int):
        return d.truncated_quotient(a, b)
    is_divisor = b > 0 if isinstance(b, int) else symbols.assume_nonempty
    return symbols.quotient([a], [b]) if is_divisor else None


def _comparison(predicate: Callable[[int], bool]) -> ElementRule:
    def compare(a: SymbolicDim, b: SymbolicDim) -> SymbolicDim | None:
        sign = d.sign_of_difference(a, b)
        return None if sign is None else bool(predicate(sign))

    return _elementwise(compare)


def _copy_elements(
    node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
) -> InferredElements | None:
    return operand_elements[0]


def _cast(
    node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
) -> InferredElements | None:
    source = operands[0].dtype if operands[0] is not None else None
    target = int_attribute_or_none(node, "to", 0)
    if source not in SHAPE_DTYPES:
        return None
    if target == ir.DataType.BOOL.value:
        if source is ir.DataType.BOOL:
            return operand_elements[0]
        signs = [d.sign_of_difference(element, 0) for element in operand_elements[0]]
        return [None if sign is None else bool(sign) for sign in signs]
    return [int(element) if isinstance(element, int) else element for element in operand_elements[0]]


def _concat(
    node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
) -> InferredElements | None:
    return [element for elements in operand_elements for element in elements]


def _gather(
    node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
) -> InferredElements | None:
    data, indices = operand_elements[:2]
    if not all(isinstance(index, int) and -len(data) <= index < len(data) for index in indices):
        return None
    return [data[index] for index in indices if isinstance(index, int)]


def _slice(
    node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
) -> InferredElements | None:
    data = operands[0]
    bounds = slice_bounds(node, operands)
    if data is None or data.elements is None or bounds is None or set(bounds) != {0}:
        return None
    start, end, step = bounds[0]
    if not isinstance(start, int) or not isinstance(end, int) or step < 1:
        return None
    return data.elements[start:end:step]


def _where(
    node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
) -> InferredElements | None:
    triples = _broadcast_elements(operand_elements[:3])
    if triples is None or not all(isinstance(condition, int) for condition, _, _ in triples):
        return None
    return [left if condition else right for condition, left, right in triples]


def _expand(
    node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
) -> InferredElements | None:
    data, shape = operand_elements[:2]
    if len(shape) > 1 or not all(isinstance(dim, int) for dim in shape):
        return None
    length = shape[0] if shape else 1
    return data * length if len(data) == 1 and isinstance(length, int) else data  # `propagate` checks the length


def _constant_of_shape(
    node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
) -> InferredElements | None:
    shape, value = operand_elements[0], node.attributes.get("value")
    if len(shape) > 1 or not all(isinstance(dim, int) for dim in shape) or value is None or value.is_ref():
        return None
    fill = value.as_tensor().numpy().reshape(-1).tolist()
    length = shape[0] if shape else 1
    return fill * length if len(fill) == 1 and isinstance(length, int) else None


def _reduce_prod(
    node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
) -> InferredElements | None:
    return [d.product(operand_elements[0])]


def _logical_and(a: SymbolicDim, b: SymbolicDim) -> SymbolicDim | None:
    return bool(a and b) if isinstance(a, int) and isinstance(b, int) else None


def _logical_or(a: SymbolicDim, b: SymbolicDim) -> SymbolicDim | None:
    return bool(a or b) if isinstance(a, int) and isinstance(b, int) else None


def _not(
    node: ir.Node, operand_elements: Sequence[ElementValues], operands: Operands, symbols: SymbolTable
) -> InferredElements | None:
    return [(not element) if isinstance(element, int) else None for element in operand_elements[0]]


_MIN_OPERANDS = {**dict.fromkeys(("Add", "Sub", "Mul", "Div", "And", "Or", *COMPARISON_OPS, "Gather", "Expand"), 2), "Where": 3}
"""The minimum number of operands of the ops that need more than one."""

_FIRST_OPERAND_OPS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Slice", "ReduceProd"})
"""Ops that need the elements of their first operand only; shape inference has evaluated the others."""

ELEMENT_RULES: dict[str, ElementRule] = {
    **dict.fromkeys(("Identity", "Reshape", "Squeeze", "Unsqueeze"), _copy_elements),
    "Add": _elementwise(d.add),
    "Sub": _elementwise(d.subtract),
    "Mul": _elementwise(d.multiply),
    "Div": _divide,
    "And": _elementwise(_logical_and),
    "Or": _elementwise(_logical_or),
    "Equal": _comparison(lambda sign: sign == 0),
    "Greater": _comparison(lambda sign: sign > 0),
    "GreaterOrEqual": _comparison(lambda sign: sign >= 0),
    "Less": _comparison(lambda sign: sign < 0),
    "LessOrEqual": _comparison(lambda sign: sign <= 0),
    "Not": _not,
    "Cast": _cast,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Where": _where,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "ReduceProd": _reduce_prod,
}
