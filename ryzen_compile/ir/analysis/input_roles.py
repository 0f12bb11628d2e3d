"""Input role inference: the purpose of an input, from what the graph does with it.

Names decide only between purposes that graphs do not tell apart, positions and ids of a table, and whether an integer that
the graph does not use as a table index is drawn as a mask. They never decide which value of a mask marks padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile.ir.analysis.op_traits import COMPARISON_OPS, CONVERSION_OPS, LAYOUT_OPS
from ryzen_compile.spec.interface import InputSpec

if TYPE_CHECKING:
    from collections.abc import Collection

    import onnx_ir as ir

_VALUE_PRESERVING_OPS = LAYOUT_OPS | CONVERSION_OPS | {"Concat", "Split", "Tile"}
"""Ops whose outputs contain the values of their first input, possibly together with other values."""
_TABLE_INPUTS = {
    ("", "Gather"): {1: 0},
    ("com.microsoft", "EmbedLayerNormalization"): {0: 2, 1: 4, 8: 3},
    ("com.microsoft", "GatherBlockQuantized"): {1: 0},
}
"""Op -> its inputs of indices, and the input that each of them indexes."""
_WEIGHT_CONVERSION_OPS = CONVERSION_OPS | {"DequantizeLinear", "Reshape", "Transpose"}
"""Ops whose output is a weight if their first input is one."""
_TELLS_0_FROM_1 = {
    ("Equal", 0.0),
    ("Equal", 1.0),
    ("Greater", 0.0),
    ("GreaterOrEqual", 1.0),
    ("Less", 1.0),
    ("LessOrEqual", 0.0),
}
"""Comparisons with a constant whose results for 0 and for 1 differ. A division of integers compares its operands with 0."""
_MIRRORED = {"Greater": "Less", "GreaterOrEqual": "LessOrEqual", "Less": "Greater", "LessOrEqual": "GreaterOrEqual"}
"""The comparison with its operands exchanged."""
_MAX_VISITED = 64
"""The maximum number of values that are followed from one input."""
_MAX_MASK_RANK = 4


@dataclass
class _InputUses:
    """The uses of an integer input."""

    max_indices: list[int] = field(default_factory=list)
    """The largest valid value for each table that the input indexes."""
    is_boolean: bool = False
    """Whether the input is compared with 0 or 1, negated, or cast to bool."""


def infer_role(value: ir.Value, spec: InputSpec, graph: ir.Graph, functions: Collection[ir.Function] = ()) -> InputSpec:
    """Return `spec` with the inferred role, value range and padding value of `value`, an input of `graph`.

    A floating-point input is a mask if the graph turns one of 0 and 1 into the fill value of scores; other inputs that are not
    integers or bools are unchanged.
    """
    is_integer = spec.dtype == "bool" or spec.dtype.startswith(("int", "uint"))
    uses = _collect_uses(value) if is_integer else _InputUses()
    high = float(min(uses.max_indices)) if uses.max_indices else None
    name = spec.name.lower()
    if is_integer and high is not None and high >= 0:
        role = "positions" if "position" in name else "ids"
        return msgspec.structs.replace(spec, role=role, low=0, high=high)
    if (mask := _infer_mask(value, spec, graph, functions)) is not None:
        return mask
    if is_integer and "position" in name:
        return msgspec.structs.replace(spec, role="positions", low=0)
    has_several_elements = any(dim != 1 for dim in spec.dims or ())
    if is_integer and has_several_elements and ("mask" in name or uses.is_boolean):
        return msgspec.structs.replace(spec, role="mask", low=0, high=1)
    return spec


def _infer_mask(value: ir.Value, spec: InputSpec, graph: ir.Graph, functions: Collection[ir.Function]) -> InputSpec | None:
    """Return `spec` as a mask with its padding value, or None if the graph does not show which value marks padding."""
    from ryzen_compile.ir.analysis.mask_polarity import find_padding_value

    if not 1 <= len(spec.dims or ()) <= _MAX_MASK_RANK or spec.dtype == "string":
        return None
    # A product with positions zeroes activations at position 0, which is no padding.
    is_number = spec.dtype.startswith(("float", "bfloat")) or "position" in spec.name.lower()
    padding_value = find_padding_value(value, graph, functions, removal_only=is_number)
    if padding_value is None:
        return None
    return msgspec.structs.replace(spec, role="mask", low=0, high=1, padding_value=padding_value)


def _collect_uses(value: ir.Value) -> _InputUses:
    uses = _InputUses()
    visited = {value}
    pending = [(value, 0)]
    while pending and len(visited) < _MAX_VISITED:
        current, offset = pending.pop()
        for node, index in current.uses():
            table_input = _TABLE_INPUTS.get((node.domain, node.op_type), {}).get(index)
            if table_input is not None:
                if (rows := _table_rows(node, table_input)) is not None:
                    uses.max_indices.append(rows - 1 - offset)
                continue
            uses.is_boolean |= offset == 0 and _is_boolean_use(node, index)
            constant = _constant_added(node, index)
            if (node.op_type in _VALUE_PRESERVING_OPS or constant is not None) and not node.domain:
                for output in node.outputs:
                    if output not in visited:
                        visited.add(output)
                        pending.append((output, offset + (constant or 0)))
    return uses


def _table_rows(node: ir.Node, table_input: int) -> int | None:
    """Return the number of rows of the table that `node` reads, or None if it is not a weight of rank 2 or more."""
    dims = _weight_dims(node.inputs[table_input])
    axis = node.attributes.get_int("gather_axis" if node.domain else "axis", 0)
    return dims[axis] if len(dims) >= 2 and -len(dims) <= axis < len(dims) else None


def _weight_dims(value: ir.Value | None) -> tuple[int, ...]:
    """Return the shape of `value`, a constant or one in another element type or layout; () if it is none, or is unknown.

    Tied embeddings are such a layout: the transposed or reshaped weights of the last layer.
    """
    from ryzen_compile.ir.analysis.constants import constant_ints, constant_tensor

    conversions: list[ir.Node] = []
    while (tensor := constant_tensor(value, overridable=True)) is None:
        node = value.producer() if value is not None else None
        if node is None or node.domain or node.op_type not in _WEIGHT_CONVERSION_OPS or not node.inputs:
            return ()
        conversions.append(node)
        value = node.inputs[0]
    dims = tuple(tensor.shape.numpy())
    for node in reversed(conversions):
        if node.op_type == "Transpose":
            perm = tuple(node.attributes.get_ints("perm", range(len(dims))[::-1]))
            if sorted(perm) != list(range(len(dims))):
                return ()
            dims = tuple(dims[axis] for axis in perm)
        elif node.op_type == "Reshape":
            dims = tuple(constant_ints(node.inputs[1]) or ()) if len(node.inputs) > 1 else ()
            if any(dim < 1 for dim in dims):
                return ()
    return dims


def _constant_added(node: ir.Node, index: int) -> int | None:
    if node.op_type != "Add" or node.domain:
        return None
    from ryzen_compile.ir.analysis.constants import constant_scalar

    scalar = constant_scalar(node.inputs[1 - index], overridable=True)
    return int(scalar) if scalar is not None and scalar.is_integer() else None


def _is_boolean_use(node: ir.Node, index: int) -> bool:
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.constants import constant_scalar

    if node.domain:
        return False
    if node.op_type in ("Not", "And", "Or") or (node.op_type == "Where" and index == 0):
        return True
    if node.op_type == "Cast":
        return node.attributes.get_int("to", 0) == ir.DataType.BOOL
    if node.op_type in COMPARISON_OPS:
        other = constant_scalar(node.inputs[1 - index], overridable=True)
        return (node.op_type if index == 0 else _MIRRORED.get(node.op_type, node.op_type), other) in _TELLS_0_FROM_1
    return node.op_type == "Sub" and index == 1 and constant_scalar(node.inputs[0], overridable=True) == 1.0
