"""Roles: what an input is for, told from what the graph does with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile.spec.interface import InputSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_VALUE_PRESERVING_OPS = frozenset(
    {
        "Cast",
        "Identity",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Flatten",
        "Transpose",
        "Expand",
        "Slice",
        "Split",
        "Tile",
        "Concat",
    }
)
"""Ops whose outputs hold values of their first input and, at most, others beside them."""
_COMPARISONS = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
_MAX_VISITED = 64


@dataclass
class _InputUses:
    """What becomes of an integer input."""

    max_indices: list[int] = field(default_factory=list)
    """The largest value that each table which it indexes takes."""
    is_boolean: bool = False
    """Whether it is compared with a constant, negated, or cast to bool."""


def infer_role(value: ir.Value, spec: InputSpec) -> InputSpec:
    """Return `spec` with the role of `value` and the range that means something."""
    if not (spec.dtype == "bool" or spec.dtype.startswith(("int", "uint"))):
        return spec
    name, uses = spec.name.lower(), _collect_uses(value)
    if "mask" in name:
        return msgspec.structs.replace(spec, role="mask", low=0, high=1)
    high = float(min(uses.max_indices)) if uses.max_indices else None
    if "position" in name:
        return msgspec.structs.replace(spec, role="positions", low=0, high=high)
    if high is not None and high >= 0:
        return msgspec.structs.replace(spec, role="ids", low=0, high=high)
    if uses.is_boolean:
        return msgspec.structs.replace(spec, role="mask", low=0, high=1)
    return spec


def _collect_uses(value: ir.Value) -> _InputUses:
    uses = _InputUses()
    seen = {value}
    waiting = [(value, 0)]
    while waiting and len(seen) < _MAX_VISITED:
        at, added = waiting.pop()
        for node, index in at.uses():
            if node.op_type == "Gather" and index == 1:
                if (rows := _table_rows(node)) is not None:
                    uses.max_indices.append(rows - 1 - added)
                continue
            uses.is_boolean |= _is_boolean_use(node, index)
            step = _constant_added(node, index)
            if (node.op_type in _VALUE_PRESERVING_OPS or step is not None) and not node.domain:
                for output in node.outputs:
                    if output not in seen:
                        seen.add(output)
                        waiting.append((output, added + (step or 0)))
    return uses


def _table_rows(gather: ir.Node) -> int | None:
    """Return how many rows the table of a Gather has, if it is a table: a weight with two axes or more, not data."""
    table = _constant_source(gather.inputs[0])
    dims = tuple(table.shape.numpy()) if table is not None else ()
    axis = gather.attributes.get_int("axis", 0)
    return dims[axis] if len(dims) >= 2 and -len(dims) <= axis < len(dims) else None


def _constant_source(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the constant that `value` is, but for its element type."""
    import onnx_ir as ir

    while value is not None:
        if (tensor := ir.convenience.get_const_tensor(value)) is not None:
            return tensor
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "Identity", "DequantizeLinear"):
            return None
        value = node.inputs[0] if node.inputs else None
    return None


def _scalar_value(value: ir.Value | None) -> float | None:
    """Return the value of a constant with one element."""
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    return float(tensor.numpy().reshape(()))


def _constant_added(node: ir.Node, index: int) -> int | None:
    if node.op_type != "Add" or node.domain:
        return None
    scalar = _scalar_value(node.inputs[1 - index])
    return int(scalar) if scalar is not None and scalar.is_integer() else None


def _is_boolean_use(node: ir.Node, index: int) -> bool:
    import onnx_ir as ir

    if node.domain:
        return False
    if node.op_type in ("Not", "And", "Or") or (node.op_type == "Where" and index == 0):
        return True
    if node.op_type == "Cast":
        return node.attributes.get_int("to", 0) == ir.DataType.BOOL
    if node.op_type in _COMPARISONS:
        return _scalar_value(node.inputs[1 - index]) in (0.0, 1.0)
    return node.op_type == "Sub" and index == 1 and _scalar_value(node.inputs[0]) == 1.0
