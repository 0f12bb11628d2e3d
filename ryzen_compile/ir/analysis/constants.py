"""Constants in a graph: the tensors, integers and scalars of constant values, and the number attributes of nodes.

A constant value is an initializer or the output of a Constant node. An initializer that is also a graph input is only a
default, which a caller can override; it is constant only for a caller of this module that passes `overridable=True`.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import ModelError, printable

_IntDefault = TypeVar("_IntDefault", int, None)
_FloatDefault = TypeVar("_FloatDefault", float, None)

MAX_SHAPE_ELEMENTS = 16
"""The maximum number of elements of an integer tensor that is read as a shape."""
_NOT_REAL_TYPES = frozenset({ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128})


def constant_tensor(value: ir.Value | None, *, overridable: bool = False) -> ir.TensorProtocol | None:
    """Return the tensor of a constant value of any type and size, or None. This reads no data.

    Args:
        value: The value; None, an omitted input, is not constant.
        overridable: Whether to return the default of an initializer that is also a graph input.
    """
    if value is None or (not overridable and value.is_graph_input()):
        return None
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    return None if node is None else constant_node_tensor(node)


def constant_node_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the tensor of a Constant node.

    Return None if `node` is another op, if its tensor is sparse, or if it references an attribute of the enclosing function.
    """
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        if name == "value":
            # Not `as_tensor`: its protocol check takes longer than the rest of this function.
            return attribute.value  # type: ignore[no-any-return]
        if name in ("value_int", "value_ints"):
            return ir.Tensor(np.array(attribute.value, np.int64))
        if name in ("value_float", "value_floats"):
            return ir.Tensor(np.array(attribute.value, np.float32))
        if name in ("value_string", "value_strings"):
            return ir.StringTensor(np.array(attribute.value, np.bytes_))
    return None


def constant_ints(value: ir.Value | None, *, max_elements: int = MAX_SHAPE_ELEMENTS) -> tuple[int, ...] | None:
    """Return the elements of a constant integer or bool tensor of rank 0 or 1 with at most `max_elements` elements, or None."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size > max_elements or len(tensor.shape) > 1:
        return None
    if tensor.dtype != ir.DataType.BOOL and not tensor.dtype.is_integer():
        return None
    return tuple(tensor.numpy().reshape(-1).tolist())


def constant_scalar(value: ir.Value | None, *, overridable: bool = False) -> float | None:
    """Return the number in a constant of any rank with one element, or None. Strings and complex numbers are not read."""
    tensor = constant_tensor(value, overridable=overridable)
    if tensor is None or tensor.size != 1 or tensor.dtype in _NOT_REAL_TYPES:
        return None
    return float(tensor.numpy().reshape(()))


def int_attribute(node: ir.Node, name: str, default: _IntDefault) -> int | _IntDefault:
    """Return the integer attribute `name` of `node`, or `default` if it is absent. Raises ModelError if it has another type.

    Not for nodes in function bodies, where an attribute can reference an attribute of the function: see
    `int_attribute_or_none`.
    """
    attribute = node.attributes.get(name)
    return default if attribute is None else _typed(node, attribute, ir.AttributeType.INT).as_int()


def int_attribute_or_none(node: ir.Node, name: str, default: int) -> int | None:
    """Return `int_attribute`, or None for a reference to an attribute of the enclosing function."""
    attribute = node.attributes.get(name)
    return None if attribute is not None and attribute.is_ref() else int_attribute(node, name, default)


def shape_slice(node: ir.Node) -> slice:
    """Return the part of the shape of its input that a Shape node returns. Not for function bodies."""
    return slice(int_attribute(node, "start", 0), int_attribute(node, "end", None))


def float_attribute(node: ir.Node, name: str, default: _FloatDefault) -> float | _FloatDefault:
    """Return the float attribute `name` of `node`, or `default` if it is absent. Not for function bodies.

    Raises ModelError if it has another type.
    """
    attribute = node.attributes.get(name)
    return default if attribute is None else _typed(node, attribute, ir.AttributeType.FLOAT).as_float()


def ints_attribute(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """Return the integers attribute `name` of `node`, or None if it is absent. Not for function bodies.

    Raises ModelError if it has another type.
    """
    attribute = node.attributes.get(name)
    return None if attribute is None else tuple(_typed(node, attribute, ir.AttributeType.INTS).as_ints())


def _typed(node: ir.Node, attribute: ir.Attr, expected: ir.AttributeType) -> ir.Attr:
    """Return `attribute` if it has the type `expected`: ops without a schema are not checked when a model is loaded."""
    if attribute.type != expected:
        raise ModelError(
            f"attribute `{printable(attribute.name)}` of {node.op_type} `{printable(node.name)}` has the type "
            f"{attribute.type.name}, and {expected.name} is required",
            hint="export the model again",
        )
    return attribute
