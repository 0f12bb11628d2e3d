"""The elements of small integer tensors, followed through the ops that exporters compute shapes with.

An element is a number or a `Dim`. Each rule returns the elements of its node's only output, or None where it cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ryzen_compile.ir.analysis import dims as d
from ryzen_compile.ir.analysis.dims import Dim
from ryzen_passes.fold.node_reading import Operands, integer
from ryzen_passes.fold.shape_rules import slicing
from ryzen_passes.fold.value_info import FOLLOWED, MOST_ELEMENTS, Content, Known

Rule = Callable[[ir.Node, Sequence[Content], Operands], "Sequence[Dim | None] | None"]

RANGE = {ir.DataType.INT64: 63, ir.DataType.INT32: 31, ir.DataType.BOOL: 1}
"""Bits of the magnitude: numbers beyond would wrap around at run time."""


def follow(node: ir.Node, operands: Operands, output: Known) -> Content | None:
    """Return the elements that `node` computes, given what is known of its only output otherwise."""
    if output.content is not None:
        return output.content
    rule = RULES.get(node.op_type)
    if rule is None or output.dtype not in FOLLOWED or output.dims is None or len(output.dims) > 1 or len(node.outputs) > 1:
        return None
    if output.dims and not (isinstance(output.dims[0], int) and output.dims[0] <= MOST_ELEMENTS):
        return None
    contents = [known.content for known in operands if known is not None]
    needed = contents[:1] if node.op_type in _PARTIAL else contents
    if not needed or None in needed or len(contents) != len(operands):
        return None
    elements = rule(node, contents, operands)  # type: ignore[arg-type]
    if elements is None or None in elements or len(elements) != (output.dims[0] if output.dims else 1):
        return None
    bound = 1 << RANGE[output.dtype]
    if any(isinstance(element, int) and not -bound <= element < bound for element in elements):
        return None
    return tuple(elements)  # type: ignore[arg-type]


def _pairs(contents: Sequence[Content]) -> list[tuple[Dim, ...]] | None:
    """Return the elements that meet when `contents` are broadcast."""
    length = max(map(len, contents)) if all(map(len, contents)) else 0
    wide = [content * length if len(content) == 1 else content for content in contents]
    return list(zip(*wide, strict=True)) if len(set(map(len, wide))) == 1 else None


def _elementwise(compute: Callable[[Dim, Dim], Dim | None]) -> Rule:
    def rule(node: ir.Node, contents: Sequence[Content], operands: Operands) -> Sequence[Dim | None] | None:
        pairs = _pairs(contents)
        return None if pairs is None else [compute(a, b) for a, b in pairs]

    return rule


def _subtract(a: Dim, b: Dim) -> Dim | None:
    negative = d.multiply(b, -1)
    return None if negative is None else d.add(a, negative)


def _quotient(a: Dim, b: Dim) -> Dim | None:
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return d.divide(a, b) if isinstance(b, int) and b > 0 else None


def _sign(a: Dim, b: Dim) -> int | None:
    """Return the sign of `a - b` where it is the same whatever the symbols are."""
    difference = _subtract(a, b)
    if difference is None:
        return None
    if isinstance(difference, int):
        return (difference > 0) - (difference < 0)
    opposite = d.multiply(difference, -1)
    if (least := d.least(difference)) is not None and least > 0:
        return 1
    if opposite is not None and (least := d.least(opposite)) is not None and least > 0:
        return -1
    return None


def _comparing(holds: Callable[[int], bool]) -> Rule:
    def compare(a: Dim, b: Dim) -> Dim | None:
        sign = _sign(a, b)
        return None if sign is None else bool(holds(sign))

    return _elementwise(compare)


def _same(node: ir.Node, contents: Sequence[Content], operands: Operands) -> Sequence[Dim | None] | None:
    return contents[0]


def _cast(node: ir.Node, contents: Sequence[Content], operands: Operands) -> Sequence[Dim | None] | None:
    source = operands[0].dtype if operands[0] is not None else None
    to = integer(node, "to", 0)
    if source not in FOLLOWED:
        return None
    if to == ir.DataType.BOOL.value:
        if source is ir.DataType.BOOL:
            return contents[0]
        signs = [_sign(element, 0) for element in contents[0]]
        return [None if sign is None else bool(sign) for sign in signs]
    return [int(element) if isinstance(element, int) else element for element in contents[0]]


def _concat(node: ir.Node, contents: Sequence[Content], operands: Operands) -> Sequence[Dim | None] | None:
    return [element for content in contents for element in content]


def _gather(node: ir.Node, contents: Sequence[Content], operands: Operands) -> Sequence[Dim | None] | None:
    data, indices = contents
    if not all(isinstance(index, int) and -len(data) <= index < len(data) for index in indices):
        return None
    return [data[index] for index in indices if isinstance(index, int)]


def _slice(node: ir.Node, contents: Sequence[Content], operands: Operands) -> Sequence[Dim | None] | None:
    data = operands[0]
    bounds = slicing(node, operands)
    if data is None or data.content is None or bounds is None or set(bounds) != {0}:
        return None
    start, end, step = bounds[0]
    if not isinstance(start, int) or not isinstance(end, int) or step < 1:
        return None
    return data.content[start:end:step]


def _where(node: ir.Node, contents: Sequence[Content], operands: Operands) -> Sequence[Dim | None] | None:
    triples = _pairs(contents)
    if triples is None or not all(isinstance(condition, int) for condition, _, _ in triples):
        return None
    return [left if condition else right for condition, left, right in triples]


def _expand(node: ir.Node, contents: Sequence[Content], operands: Operands) -> Sequence[Dim | None] | None:
    data, shape = contents
    if len(shape) > 1 or not all(isinstance(dim, int) for dim in shape):
        return None
    length = shape[0] if shape else 1
    return data * length if len(data) == 1 and isinstance(length, int) else data  # `follow` compares the lengths


def _constant_of_shape(node: ir.Node, contents: Sequence[Content], operands: Operands) -> Sequence[Dim | None] | None:
    (shape,), value = contents, node.attributes.get("value")
    if len(shape) > 1 or not all(isinstance(dim, int) for dim in shape) or value is None or value.is_ref():
        return None
    fill = value.as_tensor().numpy().reshape(-1).tolist()
    length = shape[0] if shape else 1
    return fill * length if len(fill) == 1 and isinstance(length, int) else None


def _reduce_prod(node: ir.Node, contents: Sequence[Content], operands: Operands) -> Sequence[Dim | None] | None:
    return [d.product(contents[0])]


def _both(a: Dim, b: Dim) -> Dim | None:
    return bool(a and b) if isinstance(a, int) and isinstance(b, int) else None


def _either(a: Dim, b: Dim) -> Dim | None:
    return bool(a or b) if isinstance(a, int) and isinstance(b, int) else None


def _not(node: ir.Node, contents: Sequence[Content], operands: Operands) -> Sequence[Dim | None] | None:
    return [(not element) if isinstance(element, int) else None for element in contents[0]]


_PARTIAL = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Slice", "ReduceProd"})
"""Ops of which only the first operand need be known element by element; the others went into the sizes already."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(("Identity", "Reshape", "Squeeze", "Unsqueeze"), _same),
    "Add": _elementwise(d.add),
    "Sub": _elementwise(_subtract),
    "Mul": _elementwise(d.multiply),
    "Div": _elementwise(_quotient),
    "And": _elementwise(_both),
    "Or": _elementwise(_either),
    "Equal": _comparing(lambda sign: sign == 0),
    "Greater": _comparing(lambda sign: sign > 0),
    "GreaterOrEqual": _comparing(lambda sign: sign >= 0),
    "Less": _comparing(lambda sign: sign < 0),
    "LessOrEqual": _comparing(lambda sign: sign <= 0),
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
