"""Read the operands of a node, independent of whether the opset has an attribute or an input for them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ryzen_compile.ir.analysis.value_info import ValueInfo

Operands = Sequence[ValueInfo | None]
"""The info of each input of a node; None for an omitted optional input."""


def operand(operands: Operands, index: int) -> ValueInfo | None:
    """Return the info of an optional input; None if it is omitted."""
    return operands[index] if index < len(operands) else None


def ints_attribute_or_input(node: ir.Node, operands: Operands, name: str, index: int) -> tuple[int, ...] | None:
    """Return the integers in the attribute `name` (older opsets) or the input `index` (newer opsets); None if unknown."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return None if attribute.is_ref() else tuple(attribute.as_ints())
    info = operand(operands, index)
    return info.ints() if info is not None else None


def has_attribute_or_input(node: ir.Node, name: str, index: int) -> bool:
    """Return whether a node has the attribute `name` or the input `index`."""
    return name in node.attributes or (index < len(node.inputs) and node.inputs[index] is not None)


def normalize_axes(axes: Sequence[int], rank: int) -> tuple[int, ...] | None:
    """Return `axes` as non-negative indices; None if one is out of range for `rank`."""
    normalized = tuple(axis + rank if axis < 0 else axis for axis in axes)
    return normalized if all(0 <= axis < rank for axis in normalized) else None
