"""Reading a node: its attributes and constant operands, whatever the opset puts where."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ryzen_compile.ir.weights import GRAPH_ATTRIBUTE_TYPES, attribute_graphs
from ryzen_passes.fold.value_info import ValueInfo

Operands = Sequence[ValueInfo | None]
"""What is known of each input of a node; None where an optional input is left out."""


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """Return the graphs that a node holds."""
    return [
        graph
        for attribute in node.attributes.values()
        if attribute.type in GRAPH_ATTRIBUTE_TYPES
        for graph in attribute_graphs(attribute)
    ]


def int_attribute_or_none(node: ir.Node, name: str, default: int) -> int | None:
    """Return an integer attribute; None where it comes from the attribute of a function."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return None if attribute.is_ref() else attribute.as_int()


def operand(operands: Operands, index: int) -> ValueInfo | None:
    """Return what is known of an optional input; None where it is left out."""
    return operands[index] if index < len(operands) else None


def ints_attribute_or_input(node: ir.Node, operands: Operands, name: str, index: int) -> tuple[int, ...] | None:
    """Return what older opsets hold in the attribute `name` and newer ones take as input `index`; None where not known."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return None if attribute.is_ref() else tuple(attribute.as_ints())
    given = operand(operands, index)
    return given.ints() if given is not None else None


def has_attribute_or_input(node: ir.Node, name: str, index: int) -> bool:
    """Tell whether a node has the attribute `name` or the input `index`."""
    return name in node.attributes or (index < len(node.inputs) and node.inputs[index] is not None)


def normalize_axes(axes: Sequence[int], rank: int) -> tuple[int, ...] | None:
    """Return `axes` counted from the front, or None where one lies outside of `rank`."""
    counted = tuple(axis + rank if axis < 0 else axis for axis in axes)
    return counted if all(0 <= axis < rank for axis in counted) else None
